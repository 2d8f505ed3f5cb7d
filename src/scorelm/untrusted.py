"""Input that may be hostile: files are read up to a bound, and what they hold is quoted in one short line."""

from __future__ import annotations

import reprlib
import stat
from pathlib import Path

_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxlong = _QUOTE.maxother = 100


def brief(value: object, most: int = 300) -> str:
    """A text as it is, or any other value as Python writes it, in one printable line of about `most` characters."""
    try:
        text = value if isinstance(value, str) else _QUOTE.repr(value)
    except ValueError:  # an integer too large for its digits to be written
        text = f"a huge {type(value).__name__}"
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_bounded(path: Path, most: int) -> bytes:
    """The contents of a regular file.

    Raises:
        ValueError: it is a pipe or a device, or longer than `most` bytes.
        OSError: it cannot be read.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise ValueError(f"larger than {most:,} bytes")
    return contents


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; a name that the file system refuses is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False

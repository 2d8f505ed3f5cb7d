"""What is told a user in one line, and the careful reading of what a user, or a stranger, has written.

`InputError` is the only exception that the command line turns into a message; any other is a bug and shows itself.
"""

from __future__ import annotations

import errno
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxlong = _QUOTE.maxother = 100


class InputError(ValueError):
    """Something that a user gave cannot be used; the message says what is wrong and what to do about it."""

    exit_code = 2


class DivergedError(InputError, FloatingPointError):
    """Training has come to numbers that are not finite."""

    exit_code = 1


class DiskError(InputError, OSError):
    """A file could not be written, for want of space or otherwise."""

    exit_code = 1


@contextmanager
def writing(target: Path, advice: str = "") -> Iterator[None]:
    """Turn an OSError inside into one line about `target`, with advice where there is any.

    Raises:
        InputError: a name that cannot be written to.
        DiskError: writing failed, as on a full disk.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        refused = (PermissionError, FileExistsError, NotADirectoryError, FileNotFoundError, IsADirectoryError)
        name_is_bad = isinstance(error, refused) or error.errno == errno.ENAMETOOLONG
        kind = InputError if name_is_bad else DiskError
        reason = str(error.strerror or error)
        raise kind(f"cannot write {target}: {f'{reason}; {advice}' if advice else reason}") from None


def brief(value: object, most: int = 300) -> str:
    """A text as it is, or any other value as Python writes it, in one printable line of about `most` characters."""
    try:
        text = value if isinstance(value, str) else _QUOTE.repr(value)
    except ValueError:  # an integer too large for its digits to be written
        text = f"a huge {type(value).__name__}"
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def at_home(path: Path) -> Path:
    """The path with ``~`` at its beginning read as the home directory, as a shell reads it.

    Raises:
        InputError: there is no such home.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(f"{brief(str(path))}: there is no such home directory") from None


def read_bounded(path: Path, most: int) -> bytes:
    """The contents of a regular file.

    Raises:
        InputError: it is a pipe or a device, or longer than `most` bytes.
        OSError: it cannot be read.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError("not a regular file")
    with path.open("rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise InputError(f"larger than {most:,} bytes")
    return contents


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; a name that the file system refuses is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False

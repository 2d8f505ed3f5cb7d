"""What a verb prints: results on stdout, and everything else on stderr."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from contextlib import suppress

from scorelm.errors import DiskError


def show(text: str) -> None:
    """Print a result, and see that it is written.

    Raises:
        BrokenPipeError: its reader has gone.
        DiskError: it could not be written, as where stdout is a file on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop()
        raise
    except OSError as error:
        drop()
        raise DiskError(f"cannot write the output: {error.strerror or error}") from None


def tell(text: str) -> None:
    """Print a line that is no result, if anyone reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def filled(text: str, indent: int = 0) -> str:
    """Text as a paragraph as wide as the terminal, or as 100 columns where that is less."""
    width = min(shutil.get_terminal_size().columns, 100)
    margin, text = " " * indent, " ".join(text.split())
    return textwrap.fill(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def drop() -> None:
    """Let what is not yet written vanish, so that the interpreter does not try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

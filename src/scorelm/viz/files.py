"""What all pictures share: pages that carry their data as JSON, and files that are written whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from scorelm.errors import InputError, writing

PLACE = "{{data}}"
"""Where the JSON goes in a page."""


def fill_page(name: str, data: Any) -> str:
    """Return a page of this package with data in it as JSON; nothing in the data can end the element that holds it."""
    before, after = files("scorelm.viz").joinpath(name).read_text(encoding="utf-8").split(PLACE)
    escaped = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        escaped = escaped.replace(sign, f"\\u{ord(sign):04x}")
    return before + escaped + after


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give the name of a draft to write, which takes the place of `target` at the end if nothing goes wrong.

    Raises:
        InputError: the file cannot be written.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with writing(target):
        try:
            yield draft
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


def check_directory(target: Path) -> None:
    """Refuse a name in a directory that does not exist.

    Raises:
        InputError: there is no such directory.
    """
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: {target.parent} is not a directory")


def check_installed(package: str) -> None:
    """Refuse to draw without a package of the viz extra.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is not installed: pip install 'scorelm[viz]'")

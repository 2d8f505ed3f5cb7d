"""The report of an evaluation as a web page: one file with the figures as JSON, which loads nothing and sends nothing.

The page shows what `scorelm.evaluation.report.evaluate` returns: prices, tables, curves and samples.
"""

from __future__ import annotations

import json
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

PLACE = "{{report}}"
"""Where the JSON goes in report.html."""


def check_report(target: Path | None) -> None:
    """Refuse, before long work, a name that `save_report` could not write to.

    Raises:
        ValueError: the suffix is not .html, or the directory does not exist.
    """
    if target is None:
        return
    if target.suffix.lower() != ".html":
        raise ValueError(f"a report is written to a name that ends in .html, got {str(target)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: {target.parent} is not a directory")


def save_report(report: dict[str, Any], target: Path) -> None:
    """Write the page of a report, and its figures beside it as .json; each all of it or nothing.

    Args:
        report: what `scorelm.evaluation.report.evaluate` returned.
        target: an .html file, replaced where there is one.

    Raises:
        ValueError: another suffix, no such directory, or the file can't be written.
    """
    check_report(target)
    write(target, page(report))
    write(target.with_suffix(".json"), json.dumps(finite(report), allow_nan=False, indent=1) + "\n")


def write(target: Path, text: str) -> None:
    """Write a file through a draft beside it."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def page(report: dict[str, Any]) -> str:
    """The web page that shows a report; nothing in it can end the element that holds it."""
    before, after = files("scorelm.viz").joinpath("report.html").read_text(encoding="utf-8").split(PLACE)
    escaped = json.dumps(finite(report), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        escaped = escaped.replace(sign, f"\\u{ord(sign):04x}")
    return before + escaped + after


def finite(value: Any) -> Any:
    """The same values with null for numbers that JSON does not have, such as the loss of a model that diverged."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

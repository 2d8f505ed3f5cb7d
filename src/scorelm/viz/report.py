"""The report of an evaluation as a web page: one file with the figures as JSON, which loads nothing and sends nothing.

The page shows what `scorelm.evaluation.report.evaluate` returns: prices, tables, curves and samples.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from scorelm.errors import InputError
from scorelm.viz.files import check_directory, fill_page, replacing


def check_report(target: Path | None) -> None:
    """Refuse, before long work, a name that `save_report` could not write to.

    Raises:
        InputError: the suffix is not .html, or the directory does not exist.
    """
    if target is None:
        return
    if target.suffix.lower() != ".html":
        raise InputError(f"the name of a report must end in .html, not {str(target)!r}")
    check_directory(target)


def save_report(report: dict[str, Any], target: Path) -> None:
    """Write the page of a report, and its figures beside it as .json, each of them whole or not at all.

    Args:
        report: what `scorelm.evaluation.report.evaluate` returned.
        target: an .html file, replaced where there is one.

    Raises:
        InputError: another suffix, no such directory, or the file cannot be written.
    """
    check_report(target)
    finite = replace_nonfinite(report)
    page, figures = fill_page("report.html", finite), json.dumps(finite, allow_nan=False, indent=1) + "\n"
    for file, text in ((target, page), (target.with_suffix(".json"), figures)):
        with replacing(file) as draft:
            draft.write_text(text, encoding="utf-8")


def replace_nonfinite(value: Any) -> Any:
    """The same values with None for numbers that JSON does not have, such as the loss of a model that diverged."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

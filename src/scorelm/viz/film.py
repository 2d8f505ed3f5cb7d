"""The film of a generation: tokens and their noise after every step, as a web page, an animated gif or a still.

The page is one file that plays anywhere, with the frames as JSON; it loads nothing and sends nothing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scorelm.text.tokenizer import Tokenizer
from scorelm.viz.frames import Array, Frame, Row, Token, by_row, following, opening

if TYPE_CHECKING:
    from scorelm.sampling.generate import StepRecord

SUFFIXES = (".html", ".gif", ".png")
PLACE = "{{film}}"
"""Where the JSON goes in film.html."""


class Film:
    """Watches a generation, and writes what it has seen.

    >>> film = Film(lm.tokenizer, norm=lm.denoiser.embedding.norm, title="All together")
    >>> lm.generate(n=4, watch=film)
    >>> film.save("together.html")

    Args:
        tokenizer: of the model.
        norm: of an embedding; noise is drawn as norm / (norm + sigma).
        title: heading.
        subtitle: a line below it, such as the command.

    Raises:
        ValueError: norm is not positive.
    """

    def __init__(self, tokenizer: Tokenizer, *, norm: float, title: str = "", subtitle: str = "") -> None:
        if not 0 < norm < math.inf:
            raise ValueError(f"the norm of an embedding is above 0, got {norm:g}")
        self.tokenizer, self.norm = tokenizer, norm
        self.title, self.subtitle = title, subtitle
        self.frames: list[Frame] = []
        """One for the state before the first step, then one for every record."""

    def __call__(self, record: StepRecord) -> None:
        """Take a step's record; the first of another generation starts the film over."""
        if record.step == 1 or not self.frames:
            self.frames = [opening(record)]
        self.frames.append(following(self.frames[-1], record))

    def rows(self) -> list[Row]:
        """Every row by itself, from the state before the first step to the end.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.frames:
            raise ValueError("there is no step to show: every token was given")
        return by_row(self.frames, self.tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the film, all of it or nothing: ``.html`` plays, ``.gif`` moves, ``.png`` is a still.

        The last two show at most four rows and need the extra ``viz``.

        Raises:
            ValueError: another suffix, nothing recorded, matplotlib is missing, or the file can't be written.
        """
        check_suffix(path)
        target, rows = Path(path), self.rows()
        partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix.lower()}")
        try:
            self._write(rows, partial)
            partial.replace(target)
        except OSError as error:
            raise ValueError(f"cannot write {target}: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, rows: list[Row], path: Path) -> None:
        from scorelm.viz import figure

        if path.suffix == ".html":
            path.write_text(page(film_data(rows, self)), encoding="utf-8")
        elif path.suffix == ".gif":
            figure.animate(rows, self.norm, self.title, path)
        else:
            figure.still(rows, self.norm, self.title, path)


def check_suffix(path: str | Path) -> None:
    """Refuse a name that `Film.save` could not write to; to be called before a long generation.

    Raises:
        ValueError: the suffix is none of .html, .gif and .png, the directory does not exist, or matplotlib is missing.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"a film is written to a name that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: {target.parent} is not a directory")
    if suffix != ".html" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed: pip install 'scorelm[viz]'")


def film_data(rows: list[Row], film: Film) -> dict[str, Any]:
    """The film as JSON values; a row's token is an index into ``tokens``, and sigma null is inf."""
    table: dict[tuple[int, Token], int] = {}
    data = [
        {
            "given": row.given_N.tolist(),
            "nfe": row.nfe_K.tolist(),
            "token": [
                [table.setdefault(pair, len(table)) for pair in zip(ids_N.tolist(), tokens, strict=True)]
                for ids_N, tokens in zip(row.ids_KN, row.tokens, strict=True)
            ],
            "sigma": [rounded(sigma_N) for sigma_N in row.sigma_KN],
            "confidence": [rounded(confidence_N) for confidence_N in row.confidence_KN],
        }
        for row in rows
    ]
    return {
        "title": film.title,
        "subtitle": film.subtitle,
        "norm": film.norm,
        "steps": [frame.step for frame in film.frames],
        "tokens": [{"id": token, "text": shown.text, "kind": shown.kind} for token, shown in table],
        "rows": data,
    }


def rounded(values_N: Array) -> list[float | int | None]:
    """Three significant digits of each value, null for inf."""
    kept = [float(f"{value:.3g}") for value in values_N.tolist()]
    return [None if value == math.inf else int(value) if value.is_integer() else value for value in kept]


def page(data: dict[str, Any]) -> str:
    """The web page that plays a film; nothing in the data can end the element that holds it."""
    before, after = files("scorelm.viz").joinpath("film.html").read_text(encoding="utf-8").split(PLACE)
    escaped = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        escaped = escaped.replace(sign, f"\\u{ord(sign):04x}")
    return before + escaped + after

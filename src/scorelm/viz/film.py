"""The film of a generation: tokens and their noise after every step, as a web page, an animated gif or a still.

The page is one file that plays anywhere, with the frames as JSON; it loads nothing and sends nothing.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scorelm.errors import InputError
from scorelm.text.tokenizer import Tokenizer
from scorelm.viz import figure
from scorelm.viz.files import check_directory, check_installed, fill_page, replacing
from scorelm.viz.frames import Array, Frame, Row, Token, first_frame, next_frame, split_rows

if TYPE_CHECKING:
    from scorelm.sampling.denoise import StepRecord

SUFFIXES = (".html", ".gif", ".png")


class Film:
    """Watches a generation, and writes what it has seen.

    >>> film = Film(lm.tokenizer, norm=lm.denoiser.embedding.norm, title="All together")
    >>> lm.generate(n=4, watch=film)
    >>> film.save("together.html")

    Args:
        tokenizer: of the model.
        norm: of an embedding; a noise level sigma is drawn as norm / (norm + sigma).
        title: heading.
        subtitle: a line below it, such as the command.

    Raises:
        InputError: norm is not positive.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, norm: float, title: str = "From noise to text", subtitle: str = ""
    ) -> None:
        if not 0 < norm < math.inf:
            raise InputError(f"the norm of an embedding must be above 0 and finite, not {norm:g}")
        self.tokenizer, self.norm = tokenizer, norm
        self.title, self.subtitle = title, subtitle
        self.frames: list[Frame] = []
        """One for the state before the first step, then one for every record."""

    def __call__(self, record: StepRecord) -> None:
        """Add the state after a step; the first step of another generation starts the film over."""
        if record.step == 1 or not self.frames:
            self.frames = [first_frame(record, self.tokenizer)]
        self.frames.append(next_frame(self.frames[-1], record))

    def rows(self) -> list[Row]:
        """Every row by itself, from the state before the first step to the end.

        Raises:
            InputError: nothing was recorded.
        """
        if not self.frames:
            raise InputError("there is no step to show: every token was given")
        return split_rows(self.frames, self.tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the film, all of it or nothing: ``.html`` plays, ``.gif`` moves, ``.png`` is a still.

        The last two show at most four rows and need the extra ``viz``.

        Raises:
            InputError: another suffix, nothing recorded, matplotlib is missing, or the file cannot be written.
        """
        check_suffix(path)
        target, rows = Path(path), self.rows()
        with replacing(target) as draft:
            match target.suffix.lower():
                case ".html":
                    draft.write_text(self.page(), encoding="utf-8")
                case ".gif":
                    figure.animate(rows, self.norm, self.title, draft)
                case ".png":
                    figure.draw_still(rows, self.norm, self.title, draft)

    def page(self) -> str:
        """The film as a web page that stands by itself.

        Raises:
            InputError: nothing was recorded.
        """
        return fill_page("film.html", film_data(self.rows(), self))

    def _repr_html_(self) -> str:
        """The film as a notebook shows it: the page that `save` writes, in a frame of its own."""
        page = escape(self.page())
        style = "width: 100%; height: 40rem; border: 1px solid #8886; border-radius: 6px"
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="{escape(self.title)}" style="{style}"></iframe>'


def check_suffix(path: str | Path) -> None:
    """Refuse a name that `Film.save` could not write to, before a long generation.

    Raises:
        InputError: the suffix is none of .html, .gif and .png, the directory does not exist, or matplotlib is missing.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"the name of a film must end in {', '.join(SUFFIXES)}, not {str(path)!r}")
    check_directory(target)
    if suffix != ".html":
        check_installed("matplotlib")


def film_data(rows: list[Row], film: Film) -> dict[str, Any]:
    """The film as JSON values; a row's token is an index into ``tokens``, and null stands for sigma inf."""
    table: dict[tuple[int, Token], int] = {}
    data = [
        {
            "given": row.given_N.tolist(),
            "nfe": row.nfe_K.tolist(),
            "token": [
                [table.setdefault(pair, len(table)) for pair in zip(ids_N.tolist(), tokens, strict=True)]
                for ids_N, tokens in zip(row.ids_KN, row.tokens, strict=True)
            ],
            "sigma": [round_values(sigma_N) for sigma_N in row.sigma_KN],
            "certainty": [round_values(certainty_N) for certainty_N in row.certainty_KN],
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


def round_values(values_N: Array) -> list[float | int | None]:
    """Three significant digits of each value, None for inf."""
    kept = [float(f"{value:.3g}") for value in values_N.tolist()]
    return [None if value == math.inf else int(value) if value.is_integer() else value for value in kept]

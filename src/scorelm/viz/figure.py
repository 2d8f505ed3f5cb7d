"""A film as a picture: a still of the noise at every position over the steps, or a gif with the text above it.

Drawn with matplotlib, the optional extra ``viz``, in the colours of the web page.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scorelm.viz.frames import Row, Token

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.patches import Rectangle

MOST_ROWS, MOST_FRAMES = 4, 100
INK, QUIET = "#1b1e24", "#666c77"
GUESS, GIVEN = "#a8461b", "#c6c8cd"
FAINTEST = 0.25
"""Opacity of a guess that the model is not certain of at all."""
SCALE = ("#f1f0ea", "#86b5bd", "#1d4268")
"""Colours of noise: no evidence, sigma = norm, finished."""
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Symbols 2")
"""Each is for the characters that the ones before it lack; the first comes with matplotlib."""
POINT = 1 / 72
"""Inches."""
FRAME_SECONDS, LAST_SECONDS = 0.125, 2.5


def draw_still(rows: Sequence[Row], norm: float, title: str, path: Path) -> None:
    """Write a png with a panel for each of the first four rows: noise by step and position, and the final tokens."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shown = rows[:MOST_ROWS]
    longest = max(len(row.given_N) for row in shown)
    across, down = 0.6 + 3.2 * len(shown), min(max(12.5 * longest * POINT, 1.6), 14.0)
    with house_style():
        figure = Figure(figsize=(across, down + 1.2), layout="constrained")
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, row in zip(axes, shown, strict=True):
            draw_noise(axis, row, norm)
            axis.set_ylim(longest - 0.5, -0.5)
            axis.xaxis.tick_top()
            axis.tick_params(length=0)
            axis.set_xlabel("step", color=QUIET)
            axis.xaxis.set_label_position("top")
            label_positions(axis, row, down / POINT / longest)
        colours = ScalarMappable(Normalize(0, 1), colormap())
        bar = figure.colorbar(
            colours, ax=list(axes), location="bottom", fraction=0.09 / down, pad=0.1 / down, aspect=40
        )
        bar.set_ticks([0, 0.5, 1], labels=["no evidence", "σ = norm", "finished"])
        first, _, last = bar.ax.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        bar.set_label("noise after every step (given tokens: grey)", color=QUIET)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        figure.suptitle(wrap_title(title, across), x=0.01, ha="left")
        figure.savefig(path, dpi=160, format="png", bbox_inches="tight", pad_inches=0.15)


def animate(rows: Sequence[Row], norm: float, title: str, path: Path) -> None:
    """Write a gif of the first four rows, text above noise; a film of more than a hundred frames is thinned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    count = len(rows[0].tokens)
    with house_style():
        stage = Stage(rows[:MOST_ROWS], norm, title)
        canvas = FigureCanvasAgg(stage.figure)
        images = []
        for k in np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int).tolist():
            stage.show(k)
            canvas.draw()  # type: ignore[no-untyped-call]
            pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
            images.append(Image.fromarray(pixels[..., :3]))
    times = [int(1000 * FRAME_SECONDS)] * (len(images) - 1) + [int(1000 * LAST_SECONDS)]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=times, loop=0)


@contextmanager
def house_style() -> Iterator[None]:
    """Fonts and lines of all figures; characters without a glyph are drawn as boxes, without a warning."""
    from matplotlib import font_manager, rc_context

    installed = set(font_manager.get_font_names())
    settings: dict[Any, Any] = {
        "font.family": [name for name in FONTS if name in installed],
        "font.size": 8,
        "figure.titlesize": 10.5,
        "figure.facecolor": "white",
        "text.color": INK,
        "text.hinting": "none",
        "text.parse_math": False,
        "text.usetex": False,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support .* natively", UserWarning)
        yield


def colormap() -> Colormap:
    """Noise as a colour: 0 is no evidence, 1 finished."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("noise", SCALE)


def draw_noise(axis: Axes, row: Row, norm: float) -> None:
    """Draw the noise of a row: steps from left to right, positions from top to bottom, given ones in grey."""
    from matplotlib.colors import to_rgba
    from matplotlib.ticker import MaxNLocator

    colours = colormap()(row.signal_KN(norm))
    colours[:, row.given_N] = to_rgba(GIVEN)
    axis.imshow(colours.swapaxes(0, 1), aspect="auto", interpolation="nearest")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.spines[:].set_visible(False)


def label_positions(axis: Axes, row: Row, pitch: float) -> None:
    """Write the final token beside each position, or beside every few if the pitch, in points, is too narrow."""
    every = max(1, int(np.ceil(6 / pitch)))
    at = range(0, len(row.given_N), every)
    labels = [textwrap.shorten(row.tokens[-1][i].text.strip(), 18, placeholder="…") for i in at]
    axis.set_yticks(list(at), labels=labels, fontsize=min(8.0, 0.75 * pitch * every))
    for i, label in zip(at, axis.get_yticklabels(), strict=True):
        label.set_color(QUIET if row.given_N[i] else INK)


def wrap_title(title: str, inches: float) -> str:
    """Break a title into at most two lines."""
    return "\n".join(textwrap.wrap(title, int(inches * 11), max_lines=2, placeholder=" …"))


class Stage:
    """The picture that an animation redraws; lengths in points, y downwards, on one pair of axes over the figure."""

    WIDE, MARGIN = 468.0, 16.0
    LINE, SIZE = 19.0, 11.5

    def __init__(self, rows: Sequence[Row], norm: float, title: str) -> None:
        from matplotlib.figure import Figure

        self.rows, self.artists = rows, list["Artist"]()
        self.limit = self.WIDE - 2 * self.MARGIN
        heading = wrap_title(title, self.limit * POINT)
        top = self.MARGIN + (8 + 13 * len(heading.splitlines()) if heading else 0)
        self.tops, strips = [], []
        for row in rows:
            lines = 1 + max(line for tokens in row.tokens for _, line in place_tokens(tokens, self.limit, self.SIZE))
            high = min(max(4.0 * len(row.given_N), 40.0), 160.0)
            self.tops.append(top)
            strips.append((top + self.LINE * lines + 4, high))
            top = sum(strips[-1]) + 18
        self.high = top + 14
        self.figure = Figure(figsize=(self.WIDE * POINT, self.high * POINT), dpi=100)
        self.cursors = [self.draw_strip(row, norm, *place) for row, place in zip(rows, strips, strict=True)]
        self.axis = self.figure.add_axes((0, 0, 1, 1), xlim=(0, self.WIDE), ylim=(self.high, 0), facecolor="none")
        self.axis.set_axis_off()
        self.axis.text(self.MARGIN, self.MARGIN, heading, fontsize=10.5, va="top")
        self.draw_legend()

    def draw_strip(self, row: Row, norm: float, top: float, high: float) -> tuple[Rectangle, Rectangle]:
        """Draw the noise of a row; returns a cursor for the step shown and a veil over the steps still to come."""
        box = (self.MARGIN / self.WIDE, 1 - (top + high) / self.high, self.limit / self.WIDE, high / self.high)
        axis = self.figure.add_axes(box)
        draw_noise(axis, row, norm)
        axis.set_xticks([])
        axis.set_yticks([])
        veil = axis.axvspan(0, len(row.tokens), facecolor="white", alpha=0.55, linewidth=0)
        cursor = axis.axvspan(-0.5, 0.5, facecolor="none", edgecolor=GUESS, linewidth=1.2)
        axis.set_xlim(-0.5, len(row.tokens) - 0.5)
        return cursor, veil

    def draw_legend(self) -> None:
        """Draw the scale of noise at the bottom right."""
        y, wide = self.high - self.MARGIN, 70.0
        right = self.WIDE - self.MARGIN
        left = right - measure("finished", 8) - 5 - wide
        box = (left / self.WIDE, (self.MARGIN - 1) / self.high, wide / self.WIDE, 7 / self.high)
        bar = self.figure.add_axes(box)
        bar.imshow(np.linspace(0, 1, 128)[None], aspect="auto", cmap=colormap())
        bar.set_axis_off()
        self.axis.text(left - 5, y, "no evidence", color=QUIET, ha="right")
        self.axis.text(right, y, "finished", color=QUIET, ha="right")

    def show(self, k: int) -> None:
        """Draw frame k."""
        for artist in self.artists:
            artist.remove()
        last = len(self.rows[0].tokens) - 1
        self.artists = [self.axis.text(self.MARGIN, self.high - self.MARGIN, f"step {k} of {last}", color=QUIET)]
        for row, top, (cursor, veil) in zip(self.rows, self.tops, self.cursors, strict=True):
            cursor.set_x(k - 0.5)
            veil.set_x(k + 0.5)
            places = place_tokens(row.tokens[k], self.limit, self.SIZE)
            for i, (token, (x, line)) in enumerate(zip(row.tokens[k], places, strict=True)):
                y = top + self.LINE * (line + 0.75)
                self.draw_token(token, self.MARGIN + x, y, bool(row.given_N[i]), row.sigma_KN[k, i] == 0)
                self.artists[-1].set_alpha(FAINTEST + (1 - FAINTEST) * float(row.certainty_KN[k, i]))

    def draw_token(self, token: Token, x: float, y: float, given: bool, finished: bool) -> None:
        """Draw one token, underlined if it was given."""
        text = token.text.lstrip()
        left = x + measure(token.text[: len(token.text) - len(text)], self.SIZE)
        if given and token.kind != "control":
            right = left + measure(text, self.SIZE)
            self.artists += self.axis.plot([left, right], [y + 3.5, y + 3.5], color=QUIET, linewidth=0.7)
        colour = QUIET if token.kind in ("control", "blank") else INK if finished else GUESS
        self.artists.append(self.axis.text(left, y, text, color=colour, fontsize=self.SIZE))


def place_tokens(tokens: Sequence[Token], limit: float, size: float) -> list[tuple[float, int]]:
    """Where each token begins, in points from the left and lines from the top; lines break before words."""
    places: list[tuple[float, int]] = []
    x, line = 0.0, 0
    for i, token in enumerate(tokens):
        text = token.text
        rest = [text]
        if begins_word(token):
            for later in tokens[i + 1 :]:
                if begins_word(later):
                    break
                rest.append(later.text)
        needed = sum(measure(part, size) for part in rest)
        if i and (x + needed > limit >= needed or x + measure(text, size) > limit):
            x, line = -measure(text[: len(text) - len(text.lstrip())], size), line + 1
        places.append((x, line))
        x += measure(text, size)
    return places


def begins_word(token: Token) -> bool:
    """Whether a line may break before a token."""
    return token.text.startswith(" ") or token.kind == "control"


@cache
def measure(text: str, size: float) -> float:
    """Width of a text in points, spaces included."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    extent = TextToPath().get_text_width_height_descent
    font = FontProperties(size=size)
    return float(extent(f"|{text}|", font, False)[0] - extent("||", font, False)[0])

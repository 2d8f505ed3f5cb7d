"""Plots of measurements, through matplotlib (the viz extra)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from scorelm.errors import InputError
from scorelm.viz.curves import LOSS, Curve, Runs, limits
from scorelm.viz.figure import INK, QUIET, house_style, wrap_title
from scorelm.viz.files import check_directory, check_installed, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from scorelm.evaluation.price import Price

SUFFIXES = (".png", ".svg", ".pdf")
WIDE = 6.4
"""Inches: with letters of 10 points, a picture of that width can be read on a telephone."""
Side = Literal["left", "center", "right"]
"""The side of a text that its point is at."""
NEAR_END = 0.95
"""The share of the horizontal axis beyond which a text below a point would run into the names beside the axis."""
LEGEND: dict[str, Any] = {"frameon": False, "handlelength": 3.5}
LEGEND_HIGH, LEGEND_WIDE, LINE_WIDE = 8, 70, 10
"""The most lines of a legend in the place of a panel; letters in a line of the page, and in the sample of a curve."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#882255", "#cc79a7", INK)
"""Those of curves: colour-blind people can tell them apart."""
MARKS = "osD^vP"
"""Of the best points."""
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (3, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (1.2, 1.2)))
"""One fewer than there are colours, so that 30 curves have styles of their own."""


class Style(NamedTuple):
    """How a curve is drawn."""

    colour: str
    dashes: Any
    """As matplotlib writes them."""
    mark: str
    """At its best point."""


def check_plot(target: Path | None) -> None:
    """Refuse, before long work, a name that no plot could be written to.

    Raises:
        InputError: the suffix is none of .png, .svg and .pdf, the directory does not exist, or matplotlib is missing.
    """
    if target is None:
        return
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"the name of a plot must end in {', '.join(SUFFIXES)}, not {str(target)!r}")
    check_directory(target)
    check_installed("matplotlib")


def plot_integrand(price: Price, norm: float, target: Path) -> None:
    """Draw at which noise levels the nats of a bound arise: the area under the curve is its diffusion term.

    Args:
        price: one with an integrand.
        norm: of an embedding; norm / sigma is the signal-to-noise ratio on the axis.
        target: a .png, .svg or .pdf file, replaced where there is one.

    Raises:
        InputError: a price without an integrand, or a name that cannot be written to.
    """
    check_plot(target)
    from matplotlib.figure import Figure

    if price.integrand is None:
        raise InputError(
            f"{price.path} has no integral to plot: a path such as uniform has one, priced without --steps"
        )
    sigma, nats = price.integrand.tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.fill_between([norm / s for s in sigma], nats, alpha=0.25)
    axis.plot([norm / s for s in sigma], nats)
    axis.set_xscale("log")
    axis.set_xticks([0.25, 0.5, 1, 2, 3, 4, 6], ["0.25", "0.5", "1", "2", "3", "4", "6"], minor=False)
    axis.minorticks_off()
    axis.set_xlim(norm / max(sigma), norm / min(sigma))
    axis.set_xlabel("norm / σ (signal-to-noise ratio of an embedding; more noise to the left)")
    axis.set_ylabel("nats per token and unit of log σ")
    axis.set_title(f"{price.path}: {price.nats_per_token:.3f} nats per token", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(target) as draft:
        figure.savefig(draft, dpi=150, format=target.suffix.lower().removeprefix("."))


def plot_runs(found: Runs, target: Path) -> None:
    """Draw what runs have measured: one run in one panel, several in a panel for each path and one for the loss.

    Args:
        found: the runs.
        target: a .png, .svg or .pdf file, replaced where there is one.

    Raises:
        InputError: a name that cannot be written to.
    """
    check_plot(target)
    from matplotlib import rc_context

    settings: dict[Any, Any] = {"font.size": 10, "axes.titlesize": 10, "axes.edgecolor": QUIET, "axes.labelcolor": INK}
    with house_style(), rc_context(settings):
        figure = draw_run(found) if len(found.curves) == 1 else draw_runs(found)
        with replacing(target) as draft:
            figure.savefig(draft, dpi=200, format=target.suffix.lower().removeprefix("."))


def draw_run(found: Runs) -> Figure:
    """One run: its prices and its training loss in one panel, each named beside its end."""
    from matplotlib.figure import Figure

    (curves,) = found.panels.values()
    styles = choose_styles(curves) | {LOSS: Style(QUIET, "-", "")}
    figure = Figure(figsize=(WIDE, 4.4), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, curves, styles, found.last)
    for name, curve in curves.items():
        if curve.priced:
            side: Side = "center" if curve.best.at < NEAR_END * found.last else "right"
            note(axis, f"{curve.best.nats:.2f}", curve.best, (0, -11), styles[name].colour, side)
    low, high = axis.get_ylim()
    ends = spread([curve.points[-1].nats for curve in curves.values()], 0.06 * (high - low))
    for name, end in zip(curves, ends, strict=True):
        note(axis, name, (found.last, end), (9, 0), styles[name].colour, "left")
    axis.set_xlabel(found.axis)
    axis.set_title(wrap_title(found.title, WIDE), loc="left", pad=10, fontsize=11)
    return figure


def draw_runs(found: Runs) -> Figure:
    """Several runs: a panel for each path and one for the training loss, with one curve a run in each."""
    from matplotlib.figure import Figure

    panels, styles = found.panels, choose_styles(found.curves)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    columns = max(1, LEGEND_WIDE // (max(map(len, styles)) + LINE_WIDE))
    beside = len(panels) < down * across and columns > 1 and len(styles) <= LEGEND_HIGH
    high = 0.8 + 2.1 * down + (0 if beside else 0.23 * -(-len(styles) // columns))
    figure = Figure(figsize=(WIDE, high), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        draw_curves(axis, curves, styles, found.last)
        axis.set_title(title, loc="left", fontweight="bold")
        name = min(curves, key=lambda name: curves[name].best.nats)
        if curves[name].priced:
            at, nats = curves[name].best
            axis.set_title(f"best {nats:.2f} at {found.place(at)}", loc="right", color=styles[name].colour)
    for axis in axes[across * (down - 1) : len(panels)]:
        axis.set_xlabel(found.unit)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(found.title.capitalize(), x=0.01, ha="left", fontsize=11)
    if beside:
        axes[-1].legend(handles=legend_lines(styles), loc="upper left", **LEGEND)
    else:
        figure.legend(handles=legend_lines(styles), loc="outside lower left", ncols=columns, **LEGEND)
    return figure


def choose_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each of the names."""
    return {name: Style(*style) for name, *style in zip(names, cycle(COLOURS), cycle(DASHES), cycle(MARKS))}


def legend_lines(styles: Mapping[str, Style]) -> list[Line2D]:
    """What a legend shows: a piece of each curve with its mark."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=style.colour, linestyle=style.dashes, marker=style.mark, label=name)
        for name, style in styles.items()
    ]


def draw_curves(axis: Axes, curves: Mapping[str, Curve], styles: Mapping[str, Style], last: float) -> None:
    """Draw curves by name, the best price of each marked, on a horizontal axis from 0 to `last`."""
    from matplotlib.ticker import MaxNLocator

    for name, curve in curves.items():
        style, alone = styles[name], "." if len(curve.points) == 1 else ""
        axis.plot(
            *zip(*curve.points, strict=True), color=style.colour, linestyle=style.dashes, linewidth=1.6, marker=alone,
            zorder=2 if curve.priced else 1,
        )  # fmt: skip
        if curve.priced:
            axis.plot(
                *curve.best, color=style.colour, marker=style.mark, markersize=7, markeredgecolor="white", zorder=3,
                clip_on=False,
            )  # fmt: skip
    axis.set_xlim(0, last)
    axis.set_ylim(*limits(curves.values()))
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e4e5e8", linewidth=0.7)
    axis.set_axisbelow(True)


def note(
    axis: Axes,
    text: str,
    point: tuple[float, float],
    away: tuple[float, float],
    colour: str,
    side: Side,
) -> None:
    """Write a text beside a point, `away` points of the page from it, with a white edge against the curves below it."""
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2.5, foreground="white")]
    axis.annotate(
        text, point, away, textcoords="offset points", color=colour, ha=side, va="center", annotation_clip=False,
        path_effects=edge,
    )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places in their order, moved apart until no two are nearer than `gap`."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for _ in range(100):
        for below, above in pairwise(order):
            short = max(0.0, gap - (moved[above] - moved[below]))
            moved[below] -= short / 2
            moved[above] += short / 2
    return moved

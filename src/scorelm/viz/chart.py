"""What runs have measured as text: charts for a terminal, through plotext (the viz extra), and a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import cycle
from string import ascii_uppercase
from typing import Any

from scorelm.errors import brief
from scorelm.viz.curves import LOSS, Curve, Runs, limits
from scorelm.viz.files import check_installed

SIGNS, LOSS_SIGN = "ox+*#%&@" + ascii_uppercase, "."
"""What curves are drawn with, since they have no colour."""
TWO_ABREAST = 72
"""The fewest columns in which two panels stand side by side."""
HIGH, LOW = 20, 13
"""Lines of a single panel, and of each of several."""
SPACE = "\N{NO-BREAK SPACE}"
"""Keeps a sign and the name of its curve together."""


def chart_runs(found: Runs, width: int) -> str:
    """Draw what runs have measured with characters, in the same panels as in the picture.

    Args:
        found: the runs.
        width: the most characters of a line.

    Raises:
        InputError: plotext or matplotlib is not installed.
    """
    check_installed("plotext")
    check_installed("matplotlib")  # for the ticks
    import plotext

    panels = found.panels
    signs = dict(zip(found.names, cycle(SIGNS), strict=False)) | ({LOSS: LOSS_SIGN} if LOSS in found.names else {})
    across = 2 if len(panels) > 1 and width >= TWO_ABREAST else 1
    down = -(-len(panels) // across)
    figure = plotext.figure  # there is only this one
    figure.clear()
    plotext.terminal.limit(False, False)
    figure.plot_size(width, down * (HIGH if len(panels) == 1 else LOW))
    places = [figure]
    if len(panels) > 1:
        figure.subplots(down, across)
        places = [figure.subplot(row + 1, column + 1) for row in range(down) for column in range(across)]
    for place in places:
        place.axes(False)
    for place, (title, curves) in zip(places, panels.items(), strict=False):
        place.title(title)
        draw_panel(place, curves, signs, found.last)
    drawn = [line.rstrip() for line in figure.build().string(colorless=True).splitlines()]
    legend = "   ".join(f"{sign}{SPACE}{name.replace(' ', SPACE)}" for name, sign in signs.items())
    head = textwrap.wrap(f"{found.title}, over {found.unit}", width) + textwrap.wrap(legend, width)
    return "\n".join([*head, "", *drawn]).replace(SPACE, " ")


def draw_panel(panel: Any, curves: Mapping[str, Curve], signs: Mapping[str, str], last: float) -> None:
    """Draw curves by name, each with its sign, on a horizontal axis from 0 to `last`."""
    from matplotlib.ticker import MaxNLocator

    for name, curve in curves.items():
        signal = panel.signal(*zip(*curve.points, strict=True), marker=signs[name])
        signal.lines()
        panel.draw(signal)
    for axis, (low, high) in {"x": (0.0, last), "y": limits(curves.values())}.items():
        panel.axes(True, axis=axis, side=0)
        ruler = panel.ruler(axis)
        ruler.lim(low, high)
        ticks = [x for x in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= x <= high]
        ruler.ticks(ticks, [f"{tick:,.10g}" for tick in ticks])


def table_prices(found: Runs) -> str:
    """The best and the last price of each run on each path, and where they were measured."""
    place = f"at {found.unit.removesuffix('s')}"
    lines = [("", "", "best", place, "last", place)]
    for path in found.paths:
        title = path
        for name, curves in found.curves.items():
            if path in curves:
                best, last = curves[path].best, curves[path].points[-1]
                figures = f"{best.nats:.3f}", found.place(best.at), f"{last.nats:.3f}", found.place(last.at)
                lines.append((title, brief(name, 28), *figures))
                title = ""
    path_wide, name_wide, *wide = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([path.ljust(path_wide), name.ljust(name_wide), *map(str.rjust, figures, wide)])
        for path, name, *figures in lines
    )

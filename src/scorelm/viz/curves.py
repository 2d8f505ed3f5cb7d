"""What runs have measured while they trained, as curves: their metrics.jsonl, read with care."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from scorelm.errors import InputError, brief, read_bounded

METRICS, LOSS = "metrics.jsonl", "training loss"
LARGEST = 1 << 30
"""Bytes of a metrics.jsonl that are read; a line has less than a thousand."""
SMOOTHED = 80
"""The most points of a training loss, each the mean over the steps around it."""
SETTLED = 1 / 3
"""The share of the way to their best points, on average, after which curves no longer fall steeply."""
STEEP = 1.7
"""Curves are shown whole where that makes the picture at most this many times as high: a straight one 1.5 times."""

Count = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class Line(BaseModel):
    """What is read of a line of metrics.jsonl."""

    step: Count
    epoch: Count | None = None
    loss: float | None = None
    heldout: dict[str, float | None] | None = None


class Point(NamedTuple):
    """A measurement."""

    at: float
    """In epochs or steps."""
    nats: float
    """Per token."""


class Curve(NamedTuple):
    """Measurements in their order, at least one."""

    points: list[Point]
    priced: bool
    """Whether they are prices of held-out text; if not, they are a training loss."""

    @property
    def best(self) -> Point:
        """The least."""
        return min(self.points, key=lambda point: point.nats)


class Runs(NamedTuple):
    """What runs have measured."""

    curves: dict[str, dict[str, Curve]]
    """By the name of the run: the prices by path, and the training loss last."""
    unit: str
    """Of the horizontal axis: epochs, or steps where a run has not noted its epochs."""

    @property
    def paths(self) -> list[str]:
        """The paths that any of the runs has prices for, in the order in which they are first met."""
        return list(dict.fromkeys(path for curves in self.curves.values() for path in curves if path != LOSS))

    @property
    def last(self) -> float:
        """Where the horizontal axis ends."""
        return max(curve.points[-1].at for curves in self.curves.values() for curve in curves.values()) or 1.0

    @property
    def title(self) -> str:
        """What is drawn, in words."""
        name = f"{next(iter(self.curves))}: " if len(self.curves) == 1 else ""
        return f"{name}{'held-out prices and ' if self.paths else ''}{LOSS}, nats per token"

    @property
    def panels(self) -> dict[str, dict[str, Curve]]:
        """The pictures to draw by their titles, each with its curves by name.

        One run makes one picture without a title. Several make one for each path and one for the training loss, each
        with a curve for each run.
        """
        if len(self.curves) == 1:
            return dict(zip([""], self.curves.values(), strict=True))
        panels = {
            title: {name: curves[title] for name, curves in self.curves.items() if title in curves}
            for title in (*self.paths, LOSS)
        }
        return {title: curves for title, curves in panels.items() if curves}

    @property
    def axis(self) -> str:
        """What the horizontal axis is, in words."""
        return "epochs (passes over the training text)" if self.unit == "epochs" else self.unit

    @property
    def names(self) -> list[str]:
        """Of the curves in the panels, as a legend lists them."""
        return list(self.curves if len(self.curves) > 1 else self.panels[""])

    def place(self, at: float) -> str:
        """A place on the horizontal axis in words: a step, or an epoch to three digits of the last."""
        digits = max(1, 2 - math.floor(math.log10(self.last))) if self.unit == "epochs" else 0
        return f"{at:,.{digits}f}"


def read_runs(places: Sequence[Path]) -> Runs:
    """Read what runs have measured.

    Args:
        places: run directories; one that is named twice counts once.

    Raises:
        InputError: no run directory, a metrics.jsonl that no run has written, or nothing measured yet.
    """
    places = [Path(place) for place in dict.fromkeys(map(os.path.abspath, places))]
    found = [read_lines(place / METRICS) for place in places]
    by_epoch = all(line.epoch is not None for lines in found for line in lines)
    runs = {name: make_curves(lines, by_epoch) for name, lines in zip(name_apart(places), found, strict=True)}
    for name, curves in runs.items():
        if not curves:
            raise InputError(f"there is nothing to draw of {name} yet: its {METRICS} has no loss and no held-out price")
    return Runs(runs, "epochs" if by_epoch else "steps")


def read_lines(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl, without a last one that is being written, or was when the run was killed.

    Raises:
        InputError: there is no such file, or no run has written it.
    """
    place, name = brief(str(path.parent)), brief(str(path))
    if not path.parent.is_dir():
        raise InputError(f"there is no directory {place}: name the directory of a run")
    try:
        *lines, _ = read_bounded(path, LARGEST).split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{place} is no run directory: it has no {METRICS}") from None
    except (OSError, InputError) as error:
        raise InputError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Line.model_validate_json(line))
        except ValidationError:
            raise InputError(f"{name} is not what a run writes: line {number} is no JSON object with a step") from None
    return found


def make_curves(lines: Sequence[Line], by_epoch: bool) -> dict[str, Curve]:
    """The prices of a run by path, each where it was measured, and its training loss."""
    steps = [0.0, *(line.step for line in lines)]
    ats = [0.0, *(line.epoch or 0.0 for line in lines)] if by_epoch else steps
    losses, prices = list[Point](), dict[str, list[Point]]()
    for line, at in zip(lines, ats[1:], strict=True):
        if line.loss is not None and math.isfinite(line.loss):
            losses.append(Point(at, line.loss))
        measured = dict(line.heldout or {})
        step = measured.pop("step", None)  # a little before that of the line
        then = at if step is None else float(np.interp(step, steps, ats))
        for path, nats in measured.items():
            if path != "stderr" and nats is not None and math.isfinite(nats):
                prices.setdefault(path, []).append(Point(then, nats))
    curves = {path: Curve(points, priced=True) for path, points in prices.items()}
    return curves | ({LOSS: Curve(smooth(losses), priced=False)} if losses else {})


def smooth(points: Sequence[Point]) -> list[Point]:
    """The means of as many neighbours as it takes for few enough points."""
    size = -(-len(points) // SMOOTHED)
    parts = [np.array(points[k : k + size]) for k in range(0, len(points), size)]
    return [Point(*part.mean(0).tolist()) for part in parts]


def name_apart(places: Sequence[Path]) -> list[str]:
    """The last part of each of several different paths, or as many of the last parts as tell all of them apart.

    A long name is cut in its middle, and has a number where that makes it the same as another.
    """
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    names = [brief("/".join(place.parts[-depth:]), 40) for place in places]
    alike = len(set(names)) < len(names)
    return [f"{number} {name}" for number, name in enumerate(names, 1)] if alike else names


def limits(curves: Collection[Curve]) -> tuple[float, float]:
    """The least and the largest value of a vertical axis; the start of curves that fall steeply is above it."""
    bests, points = [curve.best for curve in curves], [point for curve in curves for point in curve.points]
    start = SETTLED * sum(best.at for best in bests) / len(bests)
    low, top = min(best.nats for best in bests), max(point.nats for point in points)
    high = max(point.nats for point in points if point.at >= start or point in bests)
    if top - low <= STEEP * (high - low):
        high = top
    room = 0.07 * (high - low) or 0.1
    return low - room, high + room

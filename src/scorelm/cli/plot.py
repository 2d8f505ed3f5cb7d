"""``scorelm plot``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from scorelm.cli.printing import show, tell
from scorelm.cli.verb import Verb
from scorelm.errors import InputError, at_home
from scorelm.viz.curves import LOSS, read_runs

NARROWEST, WIDEST = 40, 100
"""Columns of the charts in the terminal."""


class PlotVerb(Verb):
    """Options of ``scorelm plot``.

    Prints what held-out text cost a run while it trained, in nats per token on each path, beside its training loss:
    where prices rise again while the loss goes on falling, the run has begun to learn its text by heart. Below are the
    best and the last price of each run on each path. The same is written as a picture. Needs the extra viz.
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN [RUN ...]")]
    """Run directories, whose curves are drawn together. A run that is still training can be drawn, too."""
    out: Path | None = None
    """Picture to write, a .png, .svg or .pdf file; by default prices.png in the first run directory. Replaces the
    picture that is there."""

    def run(self) -> int:
        """Print the charts and the table, and write the picture."""
        from scorelm.viz.chart import chart_runs, table_prices
        from scorelm.viz.plots import plot_runs

        if not self.runs:
            raise InputError("name a run directory, such as runs/mine")
        places = [at_home(place) for place in self.runs]
        target = places[0] / "prices.png" if self.out is None else self.out
        found = read_runs(places)
        charts = chart_runs(found, min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST))
        plot_runs(found, target)
        show(f"{charts}\n\n{table_prices(found)}" if found.paths else charts)
        for name, curves in found.curves.items():
            if list(curves) == [LOSS]:
                tell(f"{name} has no held-out price yet: only its {LOSS} is drawn")
        tell(f"picture: {target}")
        return 0

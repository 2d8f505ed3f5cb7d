"""Plots of measurements, through matplotlib (the viz extra)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scorelm.errors import InputError
from scorelm.viz.files import check_directory, check_matplotlib, replacing

if TYPE_CHECKING:
    from scorelm.evaluation.price import Price

SUFFIXES = (".png", ".svg", ".pdf")


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
    check_matplotlib()


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

"""Plots of measurements, through matplotlib (the viz extra)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scorelm.evaluation.price import Price

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(target: Path | None) -> None:
    """Refuse, before long work, a file that could not be drawn.

    Raises:
        ValueError: another suffix than .png, .svg or .pdf, no such directory, or matplotlib is missing.
    """
    if target is None:
        return
    if target.suffix not in SUFFIXES:
        raise ValueError(f"a plot is written as {', '.join(SUFFIXES)}, not {target.name!r}")
    if not target.parent.is_dir():
        raise ValueError(f"no directory {target.parent} to write the plot to")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'scorelm[viz]'") from None


def plot_integrand(price: Price, norm: float, target: Path) -> None:
    """Draw where along the noise levels the nats of a bound are: the area under the curve is its diffusion term.

    Args:
        price: one with an integrand.
        norm: sqrt(E), so that the axis is the signal-to-noise ratio of an embedding.
        target: file to write.

    Raises:
        ValueError: a price without an integrand.
    """
    from matplotlib.figure import Figure

    if price.integrand is None:
        raise ValueError(f"{price.path} has no integral to plot: use uniform, ramp or blocks without --steps")
    sigma, nats = price.integrand.tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.fill_between([norm / s for s in sigma], nats, alpha=0.25)
    axis.plot([norm / s for s in sigma], nats)
    axis.set_xscale("log")
    axis.set_xticks([0.25, 0.5, 1, 2, 3, 4, 6], ["0.25", "0.5", "1", "2", "3", "4", "6"], minor=False)
    axis.minorticks_off()
    axis.set_xlim(norm / max(sigma), norm / min(sigma))
    axis.set_xlabel("sqrt(E) / sigma: more noise to the left")
    axis.set_ylabel("nats per token and unit of log sigma")
    axis.set_title(f"{price.path}: {price.nats_per_token:.3f} nats per token", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)

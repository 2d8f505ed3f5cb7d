"""Exponential moving averages of the weights, several decays at once, through torch's `AveragedModel`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averages(model: nn.Module, decays: Iterable[float]) -> dict[str, AveragedModel]:
    """One average for each decay, by the decay's name; each starts as a copy at its first update."""
    return {
        f"{decay:g}": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
        for decay in decays
    }

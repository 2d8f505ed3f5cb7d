"""Halting: when a row has made up its mind, its open positions finish at once and it leaves the batch (DDLM).

On a path of blocks it is the block that finishes.

The criteria are those of the Democratized Diffusion Language Model (arXiv 2305.10818, section 5), for each sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scorelm.config.registry import need, read
from scorelm.errors import InputError
from scorelm.model.prediction import Prediction

Rule = Callable[[Prediction], Tensor]
"""Says which rows halt, [B] bool; called once a step, it may remember."""


@dataclass(frozen=True)
class Halting:
    """A criterion: its name with its number, and what makes a rule for one generation."""

    name: str
    start: Callable[[], Rule]


def mean_open(value_BL: Tensor, open_BL: Tensor) -> Tensor:
    """Mean over each row's open positions, [B]; 0 where there are none."""
    return torch.where(open_BL, value_BL, 0.0).sum(1) / open_BL.sum(1).clamp(min=1)


def entropy(nats: float = 0.2) -> Halting:
    """The mean entropy of the open positions is at most NATS: what halting costs, at most, for each token."""
    need("entropy", "number of nats", nats)

    def rule(seen: Prediction) -> Tensor:
        return mean_open(seen.spread(seen.entropy_N), seen.open_BL) <= nats

    return Halting(f"entropy:{nats:g}", lambda: rule)


def patience(steps: float = 5) -> Halting:
    """The likeliest tokens of a row have stayed the same for STEPS steps in a row."""
    if not (steps >= 1 and float(steps).is_integer()):
        raise InputError(f"patience needs a whole number of steps, 1 or more, got {steps:g}")

    def start() -> Rule:
        memory: dict[str, Tensor] = {}

        def rule(seen: Prediction) -> Tensor:
            open_BL, ids_BL = seen.open_BL, seen.spread(seen.ids_N)
            before_BL = memory.get("ids", torch.full_like(ids_BL, -1))
            changed_B = (open_BL & (ids_BL != before_BL)).any(1)
            count_B = memory.get("count", torch.zeros_like(changed_B, dtype=torch.long))
            memory["count"] = torch.where(changed_B, 0, count_B + open_BL.any(1).long())
            memory["ids"] = torch.where(open_BL, ids_BL, before_BL)
            return memory["count"] >= steps

        return rule

    return Halting(f"patience:{steps:g}", start)


def kl(nats: float = 1e-3) -> Halting:
    """The posterior differs from that of the step before by at most NATS (mean divergence)."""
    need("kl", "number of nats", nats)

    def start() -> Rule:
        memory: dict[str, Tensor] = {}

        def rule(seen: Prediction) -> Tensor:
            now_NV = seen.logits_NV.log_softmax(-1)
            if "log" not in memory:
                memory["log"] = now_NV.new_full((seen.open_BL.numel(), now_NV.shape[-1]), torch.nan)
            before_PV = memory["log"]
            ratio_NV = torch.where(now_NV.isfinite(), now_NV - before_PV[seen.places_N], 0.0)
            divergence_N = (now_NV.exp() * ratio_NV).sum(-1).nan_to_num(nan=torch.inf)
            before_PV[seen.places_N] = now_NV
            return mean_open(seen.spread(divergence_N), seen.open_BL) <= nats

        return rule

    return Halting(f"kl:{nats:g}", start)


CRITERIA: dict[str, Callable[..., Halting]] = {"entropy": entropy, "patience": patience, "kl": kl}
"""Every criterion by name, with the number it takes."""


def make_halting(text: str) -> Halting:
    """The criterion written as ``name`` or ``name:number``, such as ``entropy:0.05``.

    Raises:
        InputError: unknown name or bad argument.
    """
    return read(text, CRITERIA, "halting criterion")

"""Halting: when a row has made up its mind, its open positions finish at once and it leaves the batch (DDLM).

On a path of blocks it is the block that finishes.

The criteria are those of the Democratized Diffusion Language Model (arXiv 2305.10818, section 5), for each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scorelm.noise.path import parse_call


class Mind(NamedTuple):
    """What the posterior says in one step."""

    open_BL: Tensor
    """Positions that were evaluated and are not finished."""
    ids_BL: Tensor
    """The likeliest token of each."""
    entropy_BL: Tensor
    """Nats."""
    logits_NV: Tensor
    """Logits of the N open positions."""


def entropy_of(logits_NV: Tensor, probability_NV: Tensor) -> Tensor:
    """Entropy of ``softmax(logits)`` in nats, [N], which is given: the log-partition function less the mean logit."""
    log_partition_N = logits_NV.amax(-1) - probability_NV.amax(-1).log()
    mean_N: Tensor = torch.linalg.vecdot(probability_NV, logits_NV.clamp(min=-1e30))
    return (log_partition_N - mean_N).clamp(min=0)


Rule = Callable[[Mind], Tensor]
"""Says which rows halt, [B] bool; called once a step, it may remember."""


@dataclass(frozen=True)
class Halting:
    """A criterion: its name with its number, and what makes a rule for one generation."""

    name: str
    start: Callable[[], Rule]


def mean_open(value_BL: Tensor, open_BL: Tensor) -> Tensor:
    """Mean over each row's open positions, [B]; 0 where there are none."""
    return torch.where(open_BL, value_BL, 0.0).sum(1) / open_BL.sum(1).clamp(min=1)


def entropy(threshold: float = 0.2) -> Halting:
    """Mean entropy of the open positions at or below `threshold` nats: what halting costs, at most, per token."""
    need(threshold, "entropy", "nats")
    return Halting(f"entropy:{threshold:g}", lambda: lambda mind: mean_open(mind.entropy_BL, mind.open_BL) <= threshold)


def patience(steps: float = 5) -> Halting:
    """The likeliest tokens of a row have stayed the same for this many steps in a row."""
    if not (steps >= 1 and float(steps).is_integer()):
        raise ValueError(f"patience needs a whole number of steps, 1 or more, got {steps:g}")

    def start() -> Rule:
        memory: dict[str, Tensor] = {}

        def rule(mind: Mind) -> Tensor:
            before_BL = memory.get("ids", torch.full_like(mind.ids_BL, -1))
            changed_B = (mind.open_BL & (mind.ids_BL != before_BL)).any(1)
            present_B = mind.open_BL.any(1)
            count_B = memory.get("count", torch.zeros_like(changed_B, dtype=torch.long))
            memory["count"] = torch.where(changed_B, 0, count_B + present_B.long())
            memory["ids"] = torch.where(mind.open_BL, mind.ids_BL, before_BL)
            return memory["count"] >= steps

        return rule

    return Halting(f"patience:{steps:g}", start)


def kl(threshold: float = 1e-3) -> Halting:
    """Mean divergence of the posterior from that of the step before at or below `threshold` nats."""
    need(threshold, "kl", "nats")

    def start() -> Rule:
        memory: dict[str, Tensor] = {}

        def rule(mind: Mind) -> Tensor:
            now_NV = mind.logits_NV.log_softmax(-1)
            shape = (*mind.open_BL.shape, now_NV.shape[-1])
            if "log" not in memory:
                memory["log"] = torch.full(shape, torch.nan, device=now_NV.device)
            before_BLV = memory["log"]
            ratio_NV = torch.where(now_NV.isfinite(), now_NV - before_BLV[mind.open_BL], 0.0)
            divergence_BL = torch.full(mind.open_BL.shape, math.inf, device=now_NV.device)
            divergence_BL[mind.open_BL] = (now_NV.exp() * ratio_NV).sum(-1).nan_to_num(nan=math.inf)
            before_BLV[mind.open_BL] = now_NV
            return mean_open(divergence_BL, mind.open_BL) <= threshold

        return rule

    return Halting(f"kl:{threshold:g}", start)


def need(threshold: float, name: str, unit: str) -> None:
    """Refuse a threshold that is no number of 0 or more."""
    if not 0 <= threshold < math.inf:
        raise ValueError(f"{name} needs a threshold of 0 {unit} or more, got {threshold:g}")


CRITERIA: dict[str, Callable[..., Halting]] = {"entropy": entropy, "patience": patience, "kl": kl}
"""Every criterion by name, with the number it takes."""


def make_halting(text: str) -> Halting:
    """The criterion written as ``name`` or ``name:number``, such as ``entropy:0.05``.

    Raises:
        ValueError: unknown name or bad argument.
    """
    halting: Halting = parse_call(text, CRITERIA, "halting criterion")
    return halting

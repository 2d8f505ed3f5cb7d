"""Paths through noise-level space: which level every position has at every step of generation.

A path is a generator function: it yields the next sigma of all positions, step after step. Static paths are known in
advance; adaptive ones observe the posterior first. Levels only fall, from inf (no evidence) to 0 (finished).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from scorelm.noise.adaptive import (
    Share,
    ascending_rank,
    bounded_levels,
    equal_share,
    informed_levels,
    proportional_share,
    surest_levels,
)  # fmt: skip
from scorelm.noise.levels import ramp
from scorelm.noise.plan import Path, Plan, free_place


def ramp_levels(plan: Plan, slope: float) -> Iterator[Tensor]:
    """Equal steps of time along AR-Diffusion's line over the free positions."""
    place_BL = free_place(plan.free_BL)
    for k in range(plan.steps - 1, -1, -1):
        yield plan.sigma(ramp(torch.tensor(plan.start * k / plan.steps, dtype=torch.float64), place_BL, slope))


def block_levels(plan: Plan) -> Iterator[Tensor]:
    """Blocks one after the other, each on one shared level, in as many steps as asked for or as there are blocks.

    Every row goes at its own pace, over the blocks in which it has free positions: their turns share its steps out
    evenly, so that turn t takes the steps from ``floor(t S / n)`` to ``floor((t + 1) S / n)``.
    """
    free_BL, block_BL = plan.free_BL, plan.block_BL
    busy_BK = torch.zeros(free_BL.shape[0], int(block_BL.max()) + 1, device=free_BL.device)
    busy_BK = busy_BK.scatter_add(1, block_BL, free_BL.float()) > 0
    turn_BL = (busy_BK.long().cumsum(1) - 1).gather(1, block_BL)
    turns_B1 = busy_BK.sum(1, keepdim=True).clamp(min=1)
    steps_B1 = turns_B1.clamp(min=plan.steps)
    first_BL, last_BL = turn_BL * steps_B1 // turns_B1, (turn_BL + 1) * steps_B1 // turns_B1
    for k in range(1, int(steps_B1.max()) + 1):
        yield plan.sigma(((last_BL - k).double() / (last_BL - first_BL)).clamp(0, 1))


def shuffled_levels(plan: Plan) -> Iterator[Tensor]:
    """Each position goes from nothing to finished at once, in random order, equally many in every step."""
    rank_BL, count_B1 = plan.shuffle(), plan.free_BL.sum(1, keepdim=True)
    for k in range(1, plan.steps + 1):
        yield plan.sigma((rank_BL * plan.steps >= k * count_B1).double())


def remask_levels(plan: Plan, share: float) -> Iterator[Tensor]:
    """As `shuffled_levels`, but each step takes back a `share` of the finished positions and writes as many more."""
    free_BL, sigma_BL = plan.free_BL, torch.where(plan.free_BL, torch.inf, 0.0)
    count_B1 = free_BL.sum(1, keepdim=True)
    for k in range(1, plan.steps + 1):
        open_BL, order_BL = free_BL & (sigma_BL > 0), plan.shuffle()
        done_BL = free_BL & ~open_BL
        keep_B1 = count_B1 * (plan.steps - k) // plan.steps
        back_B1 = (share * done_BL.sum(1, keepdim=True)).long().minimum(keep_B1)
        write_B1 = open_BL.sum(1, keepdim=True) + back_B1 - keep_B1
        written_BL = open_BL & (ascending_rank(torch.where(open_BL, order_BL, free_BL.shape[1])) < write_B1)
        back_BL = done_BL & (ascending_rank(torch.where(done_BL, order_BL, free_BL.shape[1])) < back_B1)
        sigma_BL = torch.where(free_BL & (open_BL | back_BL) & ~written_BL, torch.inf, 0.0)
        yield sigma_BL


def uniform() -> Path:
    """All positions together."""
    return Path("uniform", lambda plan: ramp_levels(plan, 0.0), slope=0.0)


def ramp_path(slope: float = 0.25) -> Path:
    """Earlier positions first (AR-Diffusion): the first is ahead of the last by `slope` in u."""
    if not 0 <= slope < math.inf:
        raise ValueError(f"ramp needs a slope of 0 or more, got {slope:g}")
    return Path(f"ramp:{slope:g}", lambda plan: ramp_levels(plan, slope), slope=slope)


def blocks_path(size: float = 8) -> Path:
    """Semi-autoregressive: blocks of `size` positions from left to right; 1 is token by token."""
    if not (1 <= size <= MOST_POSITIONS and float(size).is_integer()):
        raise ValueError(f"blocks needs a whole number of positions, 1 or more, got {size:g}")
    return Path(f"blocks:{size:g}", block_levels, block=int(size), slope=0.0)


def shuffled() -> Path:
    """In random order, each position at once: the order of masked diffusion."""
    return Path("shuffled", shuffled_levels, jumps=True)


def confidence(threshold: float = 0.1) -> Path:
    """An equal budget of nats for every open position: the surer it is, the faster it goes."""
    return informed("confidence", threshold, equal_share)


def entropy(threshold: float = 0.0) -> Path:
    """Progress in proportion to information: each step removes the same share of every position's entropy."""
    return informed("entropy", threshold, proportional_share)


def informed(name: str, threshold: float, share: Share) -> Path:
    """A path on information that finishes positions within `threshold` nats."""
    need(name, threshold, "nats")
    text = f"{name}:{threshold:g}"
    return Path(text, lambda plan: informed_levels(plan, threshold, share), adaptive=True, budgeted=True)


def surest() -> Path:
    """The surest positions first, each at once and equally many in every step: MaskGIT's order (arXiv 2202.04200)."""
    return Path("surest", surest_levels, adaptive=True, jumps=True)


def bounded(gamma: float | None = None) -> Path:
    """Entropy-bounded unmasking (arXiv 2505.24857): as many of the surest at once as their entropies allow."""
    if gamma is not None:
        need("bounded", gamma, "nats")
    name = "bounded" if gamma is None else f"bounded:{gamma:g}"
    return Path(name, lambda plan: bounded_levels(plan, gamma), adaptive=True, jumps=True)


def remask(share: float = 0.05) -> Path:
    """Random order, but a share of what is written is taken back in every step (ReMDM, arXiv 2503.00307)."""
    if not 0 <= share < 1:
        raise ValueError(f"remask needs a share from 0 to below 1, got {share:g}")
    return Path(f"remask:{share:g}", lambda plan: remask_levels(plan, share), jumps=True, forgets=True)


def need(name: str, value: float, unit: str) -> None:
    """Refuse a number that is not of 0 or more."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} needs a threshold of 0 {unit} or more, got {value:g}")


MOST_POSITIONS = 2**31
"""Longest block that can be asked for; longer than any row."""

PATHS: dict[str, Callable[..., Path]] = {
    "uniform": uniform, "ramp": ramp_path, "blocks": blocks_path,
    "shuffled": shuffled, "confidence": confidence, "entropy": entropy,
    "surest": surest, "bounded": bounded, "remask": remask,
}  # fmt: skip
"""Every path by name, with the number it takes."""


def make_path(text: str) -> Path:
    """The path written as ``name`` or ``name:number``, such as ``ramp:0.25``.

    Raises:
        ValueError: unknown name or bad argument.
    """
    path: Path = parse_call(text, PATHS, "path")
    return path


def parse_call(text: str, registry: dict[str, Callable[..., Any]], what: str) -> Any:
    """Call the entry of `registry` that `text` names, with the numbers that it has after a colon."""
    name, _, arguments = text.partition(":")
    if name not in registry:
        raise ValueError(f"no {what} {name!r}: choose {', '.join(registry)}")
    numbers = []
    for argument in arguments.split(",") if arguments else []:
        try:
            numbers.append(float(argument))
        except ValueError:
            raise ValueError(f"{what} {text!r}: {argument!r} is not a number") from None
    try:
        inspect.signature(registry[name]).bind(*numbers)
    except TypeError:
        raise ValueError(f"{what} {name!r} takes fewer numbers than {arguments!r}") from None
    return registry[name](*numbers)

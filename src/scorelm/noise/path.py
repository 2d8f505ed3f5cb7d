"""Paths through noise-level space: which level every position has at every step of generation.

A path is a generator function: it yields the next sigma of all positions, step after step. Static paths are known in
advance; adaptive ones observe the posterior first. Levels only fall, from inf (no evidence) to 0 (finished).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorelm.noise.levels import ramp
from scorelm.noise.schedule import Schedule


class Observation(NamedTuple):
    """What the posterior says of every position now, [B, L]; at positions that are not open it means nothing."""

    sigma_BL: Tensor
    entropy_BL: Tensor
    """Nats that are still to be decided."""
    rate_BL: Tensor
    """Nats per unit of tau = sigma^-2 that evidence brings: ``(E - |x0|^2) / 2`` (I-MMSE)."""


@dataclass(frozen=True)
class Plan:
    """What a path is told.

    Attributes:
        free_BL: positions to be written; it shrinks while a path runs, when an open row ends.
        block_BL: block of each position.
        steps: steps to make.
        schedule: maps u in [0, 1] to sigma.
        observe: evaluates the model at the present state, at most once a step.
        shuffle: gives every position a random place among its row's, [B, L] from 0.
    """

    free_BL: Tensor
    block_BL: Tensor
    steps: int
    schedule: Schedule
    observe: Callable[[], Observation]
    shuffle: Callable[[], Tensor]

    def sigma(self, u_BL: Tensor) -> Tensor:
        """Sigma at the levels u where a position is free, 0 elsewhere: inf at u = 1, 0 at u = 0, float32."""
        return torch.where(self.free_BL, to_sigma(u_BL, self.schedule), 0.0)


def to_sigma(u: Tensor, schedule: Schedule) -> Tensor:
    """Generation's levels: sigma(u) between, inf at u = 1 (no evidence) and 0 at u = 0 (finished), float32."""
    sigma = schedule.sigma(u.clamp(0, 1))
    return torch.where(u >= 1, torch.inf, torch.where(u <= 0, 0.0, sigma)).float()


@dataclass(frozen=True)
class Path:
    """A way through noise-level space.

    Attributes:
        name: how it is written, with its argument.
        levels: yields sigma_BL until every free position is at 0.
        block: positions in a block; later blocks are not visible to earlier ones. 0: the row is one block.
        slope: of the line that the positions of a block follow in the limit of small steps; None where there is none.
        adaptive: whether it looks at the state; of the solvers only `ancestral` and `posterior` keep the law on it.
    """

    name: str
    levels: Callable[[Plan], Iterator[Tensor]]
    block: int = 0
    slope: float | None = None
    adaptive: bool = False


def free_place(free_BL: Tensor) -> Tensor:
    """Place of each free position among its row's free positions, from 0 (first) to 1 (last), float64."""
    rank_BL = free_BL.long().cumsum(1) - 1
    last_B1 = (free_BL.long().sum(1, keepdim=True) - 1).clamp(min=1)
    return (rank_BL / last_B1).clamp(0, 1).double()


def ramp_levels(plan: Plan, slope: float) -> Iterator[Tensor]:
    """Equal steps of time along AR-Diffusion's line over the free positions."""
    place_BL = free_place(plan.free_BL)
    for k in range(plan.steps - 1, -1, -1):
        yield plan.sigma(ramp(torch.tensor(k / plan.steps, dtype=torch.float64), place_BL, slope))


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


def informed_levels(plan: Plan, threshold: float, share: Callable[[Tensor, Tensor, int], Tensor]) -> Iterator[Tensor]:
    """Steps that remove equal amounts of information, as far as the posterior can tell.

    With `left` steps to go, a row's budget is its remaining entropy over `left`. Evidence removes entropy at a known
    rate, ``dH_i / dtau_i = -(E - |x0_i|^2) / 2``, so a position's share of the budget says how far its tau moves. A
    position whose entropy is within `threshold`, or within its share, finishes at once: that costs its entropy at
    most (docs/theory.md).

    Args:
        plan: where and in how many steps.
        threshold: nats.
        share: ``share(entropy_BL, open_BL, left)``: nats that each position may spend in a step.
    """
    for left in range(plan.steps, 0, -1):
        seen = plan.observe()
        open_BL = plan.free_BL & (seen.sigma_BL > 0)
        if not open_BL.any():
            return
        entropy_BL = torch.where(open_BL, seen.entropy_BL.double(), 0.0)
        share_BL = share(entropy_BL, open_BL, left)
        tau_BL = seen.sigma_BL.double().pow(-2) + share_BL / seen.rate_BL.double().clamp(min=1e-9)
        sigma_BL = tau_BL.rsqrt()
        finished_BL = (entropy_BL <= share_BL.clamp(min=threshold)) | (sigma_BL < plan.schedule.sigma_min)
        yield torch.where(open_BL & ~finished_BL & (left > 1), sigma_BL.float(), 0.0)


def equal_share(entropy_BL: Tensor, open_BL: Tensor, left: int) -> Tensor:
    """The row's budget in equal parts: a sure position has little to remove, so it goes fast and finishes early."""
    count_B1 = open_BL.sum(1, keepdim=True).clamp(min=1)
    return (entropy_BL.sum(1, keepdim=True) / (left * count_B1)).expand_as(entropy_BL)


def proportional_share(entropy_BL: Tensor, open_BL: Tensor, left: int) -> Tensor:
    """Parts in proportion to what each position has still to decide, so that all are finished at the same time."""
    return entropy_BL / left


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
    return Path("shuffled", shuffled_levels)


def confidence(threshold: float = 0.1) -> Path:
    """An equal budget of nats for every open position: the surer it is, the faster it goes."""
    check_threshold("confidence", threshold)
    return Path(f"confidence:{threshold:g}", lambda plan: informed_levels(plan, threshold, equal_share), adaptive=True)


def entropy(threshold: float = 0.0) -> Path:
    """Progress in proportion to information: each step removes the same share of every position's entropy."""
    check_threshold("entropy", threshold)
    return Path(
        f"entropy:{threshold:g}", lambda plan: informed_levels(plan, threshold, proportional_share), adaptive=True
    )


def check_threshold(name: str, threshold: float) -> None:
    """Refuse a threshold that is no number of nats."""
    if not 0 <= threshold < math.inf:
        raise ValueError(f"{name} needs a threshold of 0 nats or more, got {threshold:g}")


MOST_POSITIONS = 2**31
"""Longest block that can be asked for; longer than any row."""

PATHS: dict[str, Callable[..., Path]] = {
    "uniform": uniform, "ramp": ramp_path, "blocks": blocks_path,
    "shuffled": shuffled, "confidence": confidence, "entropy": entropy,
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

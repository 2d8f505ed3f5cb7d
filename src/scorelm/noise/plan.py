"""What a path through noise-level space is, what it is told, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scorelm.noise.schedule import Schedule


class Observation(NamedTuple):
    """What the posterior says of every position now, [B, L]; at positions that are not open it means nothing."""

    sigma_BL: Tensor
    entropy_BL: Tensor
    """Nats that are still to be decided."""
    rate_BL: Tensor
    """Nats per unit of tau = sigma^-2 that evidence brings: ``(E - |x0|^2) / 2`` (I-MMSE)."""
    confidence_BL: Tensor
    """Probability of the likeliest token."""


@dataclass(frozen=True)
class Plan:
    """What a path is told.

    Attributes:
        free_BL: positions to be written; it shrinks while a path runs, when an open row ends.
        block_BL: block of each position.
        steps: steps to make.
        schedule: maps u in [0, 1] to sigma.
        observe: evaluates the model at the present state, at most once a step.
        nats: a step's budget in each row, for paths on information; None to spend the steps evenly.
        start: level u that the free positions begin at, at most.
        shuffle: gives every position a random place among its row's, [B, L] from 0.
    """

    free_BL: Tensor
    block_BL: Tensor
    steps: int
    schedule: Schedule
    observe: Callable[[], Observation]
    shuffle: Callable[[], Tensor]
    nats: float | None = None
    start: float = 1.0

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
        budgeted: whether its steps may be a number of nats each.
        jumps: whether every position goes from no evidence to finished at once, as in masked diffusion.
        forgets: whether levels may rise again; such a path has no bound, since evidence is thrown away.
    """

    name: str
    levels: Callable[[Plan], Iterator[Tensor]]
    block: int = 0
    slope: float | None = None
    adaptive: bool = False
    budgeted: bool = False
    jumps: bool = False
    forgets: bool = False


def free_place(free_BL: Tensor) -> Tensor:
    """Place of each free position among its row's free positions, from 0 (first) to 1 (last), float64."""
    rank_BL = free_BL.long().cumsum(1) - 1
    last_B1 = (free_BL.long().sum(1, keepdim=True) - 1).clamp(min=1)
    return (rank_BL / last_B1).clamp(0, 1).double()

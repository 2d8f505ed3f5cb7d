"""Paths through noise-level space: which level every position has after the next step of generation.

A path looks at the state, an adaptive one at what the model predicts as well, and says the next sigma of all
positions. They fall from inf (no evidence) to 0 (finished). `PATHS` is the registry that ``--path`` and its help are
read from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scorelm.config.registry import need, read
from scorelm.errors import InputError
from scorelm.model.prediction import Prediction
from scorelm.noise.levels import free_place, ramp
from scorelm.sampling.state import State

MOST_POSITIONS = 2**31
"""Longest block that can be asked for; longer than any row."""


class Path(ABC):
    """A way through noise-level space; `str(path)` is how it is written, with its numbers."""

    block: int = 0
    """Positions in a block; later blocks are not visible to earlier ones. 0: the row is one block."""
    slope: float | None = None
    """Of the line from left to right (`scorelm.noise.levels.ramp`) that the positions of a block follow in the limit of
    small steps, and are priced on; None for a path without such a limit."""
    adaptive: ClassVar[bool] = False
    """Whether it looks at the prediction; of the solvers only `ancestral` and `posterior` keep the law on it."""
    budgeted: ClassVar[bool] = False
    """Whether its steps may be a number of nats each."""
    jumps: ClassVar[bool] = False
    """Whether every position goes from no evidence to finished at once, as in masked diffusion."""
    exact: ClassVar[bool] = False
    """Whether it jumps, and the order of writing follows from what is written: then a text comes about in one way only,
    and what it costs is the NLL itself rather than a bound on it."""
    forgets: ClassVar[bool] = False
    """Whether levels may rise again; such a path has no bound, since evidence is thrown away."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        """Sigma of every position after step `state.step` (from 1) of `state.budget.steps`, float32 [B, L].

        Args:
            prediction: what the model says of the open positions; None on a path that is not adaptive.
            state: where every position is now.
        """


@dataclass(frozen=True)
class Ramp(Path):
    """Equal steps of time along AR-Diffusion's line over the free positions (arXiv 2305.09515)."""

    slope: float

    def __str__(self) -> str:
        return f"ramp:{self.slope:g}" if self.slope else "uniform"

    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        budget = state.budget
        time = torch.tensor(budget.start * (budget.steps - state.step) / budget.steps, dtype=torch.float64)
        return state.sigma_at(ramp(time, free_place(state.rows.wanted_BL), self.slope))


@dataclass(frozen=True)
class Blocks(Path):
    """Blocks one after the other, each on one shared level, in as many steps as asked for or as there are blocks.

    Every row goes at its own pace, over the blocks in which it has free positions: their turns share its steps out
    evenly, so that turn t takes the steps from ``floor(t S / n)`` to ``floor((t + 1) S / n)``.
    """

    block: int
    slope: float = 0.0

    def __str__(self) -> str:
        return f"blocks:{self.block}"

    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        wanted_BL, block_BL = state.rows.wanted_BL, state.rows.layout.block_BL
        busy_BK = torch.zeros(wanted_BL.shape[0], int(block_BL.max()) + 1, device=wanted_BL.device)
        busy_BK = busy_BK.scatter_add(1, block_BL, wanted_BL.float()) > 0
        turn_BL = (busy_BK.long().cumsum(1) - 1).gather(1, block_BL)
        turns_B1 = busy_BK.sum(1, keepdim=True).clamp(min=1)
        steps_B1 = turns_B1.clamp(min=state.budget.steps)
        first_BL, last_BL = turn_BL * steps_B1 // turns_B1, (turn_BL + 1) * steps_B1 // turns_B1
        return state.sigma_at(((last_BL - state.step).double() / (last_BL - first_BL)).clamp(0, 1))


@dataclass(frozen=True)
class Shuffled(Path):
    """Each position goes from nothing to finished at once, in random order, equally many in every step."""

    jumps: ClassVar[bool] = True

    def __str__(self) -> str:
        return "shuffled"

    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        count_B1 = state.rows.wanted_BL.sum(1, keepdim=True)
        return state.sigma_at((state.order_BL * state.budget.steps >= state.step * count_B1).double())


@dataclass(frozen=True)
class Remask(Path):
    """As `Shuffled`, but each step takes back a `share` of the finished positions and writes as many more."""

    share: float
    jumps: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"remask:{self.share:g}"

    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        free_BL, open_BL, order_BL = state.free_BL, state.open_BL, state.shuffle()
        count_B1, done_BL = free_BL.sum(1, keepdim=True), free_BL & ~open_BL
        keep_B1 = count_B1 * (state.budget.steps - state.step) // state.budget.steps
        back_B1 = (self.share * done_BL.sum(1, keepdim=True)).long().minimum(keep_B1)
        write_B1 = open_BL.sum(1, keepdim=True) + back_B1 - keep_B1
        written_BL = first_of(open_BL, order_BL, write_B1)
        back_BL = first_of(done_BL, order_BL, back_B1)
        return torch.where(free_BL & (open_BL | back_BL) & ~written_BL, torch.inf, 0.0)


@dataclass(frozen=True)
class Informed(Path):
    """Steps that remove equal amounts of information, as far as the posterior can tell (docs/theory.md).

    A row may spend `state.budget.nats` in a step, or its remaining entropy over the steps left; `proportional` or equal
    parts of that go to its open positions. Evidence removes entropy at a known rate, ``dH_i / dtau_i = -(E -
    |x0_i|^2) / 2``, so a position's part says how far its tau moves. A position whose entropy is within `threshold`
    nats, or within its part, finishes at once: that costs its entropy at most.
    """

    threshold: float
    proportional: bool
    adaptive: ClassVar[bool] = True
    budgeted: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{'entropy' if self.proportional else 'confidence'}:{self.threshold:g}"

    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        assert prediction is not None
        open_BL, left = state.open_BL, state.budget.steps - state.step + 1
        entropy_BL = torch.where(open_BL, prediction.spread(prediction.entropy_N).double(), 0.0)
        total_B1 = entropy_BL.sum(1, keepdim=True)
        budget_B1 = total_B1 / left if state.budget.nats is None else torch.full_like(total_B1, state.budget.nats)
        if self.proportional:
            part_BL = budget_B1 * entropy_BL / total_B1.clamp(min=1e-30)
        else:
            part_BL = (budget_B1 / open_BL.sum(1, keepdim=True).clamp(min=1)).expand_as(entropy_BL)
        rate_N = (prediction.table_VE.shape[1] - prediction.x0_NE.square().sum(-1)) / 2
        rate_BL = prediction.spread(rate_N).double().clamp(min=1e-9)
        sigma_BL = (state.sigma_BL.double().pow(-2) + part_BL / rate_BL).rsqrt()
        finished_BL = (entropy_BL <= part_BL.clamp(min=self.threshold)) | (sigma_BL < state.budget.schedule.sigma_min)
        return torch.where(open_BL & ~finished_BL & (left > 1), sigma_BL.float(), 0.0)


@dataclass(frozen=True)
class Surest(Path):
    """Equally many positions finish in every step, those first whose likeliest token is likeliest (MaskGIT's order).

    A row with fewer positions than steps takes a step for each.
    """

    adaptive: ClassVar[bool] = True
    jumps: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __str__(self) -> str:
        return "surest"

    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        assert prediction is not None
        count_B1 = state.rows.wanted_BL.sum(1, keepdim=True)
        steps_B1, open_BL = count_B1.clamp(1, state.budget.steps), state.open_BL
        doubt_BL = torch.where(open_BL, 1 - prediction.spread(prediction.top_probability_N), torch.inf)
        keep_B1 = count_B1 * (steps_B1 - state.step).clamp(min=0) // steps_B1
        finished_BL = ascending_rank(doubt_BL) < open_BL.sum(1, keepdim=True) - keep_B1
        return torch.where(open_BL & ~finished_BL, state.sigma_BL, 0.0)


@dataclass(frozen=True)
class Bounded(Path):
    """As many of the surest positions finish in a step as keep ``sum H_i - max H_i`` within `gamma` nats, one at least.

    That difference bounds what the step loses by drawing its tokens independently (arXiv 2505.24857, eq. 7). The
    number of steps is an outcome, and the last one finishes whatever is left; with `gamma` None it is the steps that
    are given, and a step's bound is the row's remaining entropy over the steps left.
    """

    gamma: float | None
    adaptive: ClassVar[bool] = True
    jumps: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __str__(self) -> str:
        return "bounded" if self.gamma is None else f"bounded:{self.gamma:g}"

    def next_levels(self, prediction: Prediction | None, state: State) -> Tensor:
        assert prediction is not None
        open_BL, left = state.open_BL, state.budget.steps - state.step + 1
        entropy_BL = torch.where(open_BL, prediction.spread(prediction.entropy_N).double(), torch.inf)
        sorted_BL = entropy_BL.sort(1).values.nan_to_num(posinf=0.0)
        before_BL = sorted_BL.cumsum(1) - sorted_BL
        bound = sorted_BL.sum(1, keepdim=True) / left if self.gamma is None else self.gamma
        within_BL = (before_BL <= bound).gather(1, ascending_rank(entropy_BL))
        return torch.where(open_BL & ~within_BL & (left > 1), state.sigma_BL, 0.0)


def ascending_rank(value_BL: Tensor) -> Tensor:
    """Place of each value in its row, from 0 for the smallest."""
    return value_BL.argsort(dim=1, stable=True).argsort(1)


def first_of(mask_BL: Tensor, order_BL: Tensor, count_B1: Tensor) -> Tensor:
    """The first `count` positions of a mask in an order, [B, L] bool."""
    return mask_BL & (ascending_rank(torch.where(mask_BL, order_BL, mask_BL.shape[1])) < count_B1)


def uniform() -> Path:
    """All positions together, on one level."""
    return Ramp(0.0)


def ramp_path(slope: float = 0.25) -> Path:
    """Earlier positions first: the first is ahead of the last by SLOPE (AR-Diffusion)."""
    return Ramp(need("ramp", "slope", slope))


def blocks(size: float = 8) -> Path:
    """Blocks of SIZE positions from left to right; blocks:1 is token by token."""
    if not (1 <= size <= MOST_POSITIONS and float(size).is_integer()):
        raise InputError(f"blocks needs a whole number of positions, 1 or more, got {size:g}")
    return Blocks(int(size))


def shuffled() -> Path:
    """Each position at once, in random order: the order of masked diffusion."""
    return Shuffled()


def confidence(nats: float = 0.1) -> Path:
    """Each step removes the same uncertainty from every open position: the surer it is, the sooner it is done."""
    return Informed(need("confidence", "number of nats", nats), proportional=False)


def entropy(nats: float = 0.0) -> Path:
    """Each step removes the same share of every position's uncertainty."""
    return Informed(need("entropy", "number of nats", nats), proportional=True)


def surest() -> Path:
    """The surest positions first, equally many in every step (MaskGIT)."""
    return Surest()


def bounded(nats: float | None = None) -> Path:
    """The surest positions first, as many at once as their uncertainty allows: a bound of NATS on each step's loss."""
    return Bounded(None if nats is None else need("bounded", "number of nats", nats))


def remask(share: float = 0.05) -> Path:
    """Random order, but each step takes back a SHARE of what is written (ReMDM)."""
    if not 0 <= share < 1:
        raise InputError(f"remask needs a share from 0 to below 1, got {share:g}")
    return Remask(share)


PATHS: dict[str, Callable[..., Path]] = {
    "bounded": bounded, "surest": surest, "shuffled": shuffled, "remask": remask, "uniform": uniform,
    "ramp": ramp_path, "blocks": blocks, "confidence": confidence, "entropy": entropy,
}  # fmt: skip
"""Every path by name, with the numbers it takes."""


def make_path(text: str) -> Path:
    """The path written as ``name`` or ``name:number``, such as ``ramp:0.25``.

    Raises:
        InputError: unknown name or bad argument.
    """
    return read(text, PATHS, "path")

"""Paths through noise-level space: which level every position has at every step of generation.

A path is a generator function: it yields the next levels u in [0, 1] of all positions and is sent the record of the
step that was made, so that static paths ignore what comes back and adaptive ones use it. Levels only fall; u = 1 is
no evidence (sigma inf), u = 0 is finished (sigma 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorelm.noise.levels import ramp

Levels = Generator[Tensor, Any, None]
"""Yields u_BL, is sent the step's record."""


@dataclass(frozen=True)
class Path:
    """A way through noise-level space.

    Attributes:
        name: how it is written, with its argument.
        levels: ``levels(free_BL, block_BL, steps)`` yields u_BL until every free position is at 0.
        block: positions in a block; later blocks are not visible to earlier ones. 0: the row is one block.
    """

    name: str
    levels: Callable[[Tensor, Tensor, int], Levels]
    block: int = 0


def free_place(free_BL: Tensor) -> Tensor:
    """Place of each free position among its row's free positions, from 0 (first) to 1 (last), float64."""
    rank_BL = free_BL.long().cumsum(1) - 1
    last_B1 = (free_BL.long().sum(1, keepdim=True) - 1).clamp(min=1)
    return (rank_BL / last_B1).clamp(0, 1).double()


def ramp_levels(free_BL: Tensor, steps: int, slope: float) -> Levels:
    """`steps` equal steps of time along AR-Diffusion's line over the free positions."""
    place_BL = free_place(free_BL)
    for k in range(steps - 1, -1, -1):
        s = torch.tensor(k / steps, dtype=torch.float64)
        yield torch.where(free_BL, ramp(s, place_BL, slope), 0.0)


def block_levels(free_BL: Tensor, block_BL: Tensor, steps: int) -> Levels:
    """Blocks one after the other, each on one shared level, in `steps` or as many as there are blocks.

    Every row goes at its own pace, over the blocks in which it has free positions: their turns share its steps out
    evenly, so that turn t takes the steps from ``floor(t S / n)`` to ``floor((t + 1) S / n)``.
    """
    blocks = int(block_BL.max()) + 1
    busy_BK = torch.zeros(free_BL.shape[0], blocks).scatter_add(1, block_BL, free_BL.float()) > 0
    turn_BL = (busy_BK.long().cumsum(1) - 1).gather(1, block_BL)
    turns_B1 = busy_BK.sum(1, keepdim=True).clamp(min=1)
    steps_B1 = turns_B1.clamp(min=steps)
    first_BL, last_BL = turn_BL * steps_B1 // turns_B1, (turn_BL + 1) * steps_B1 // turns_B1
    for k in range(1, int(steps_B1.max()) + 1):
        u_BL = ((last_BL - k).double() / (last_BL - first_BL)).clamp(0, 1)
        yield torch.where(free_BL, u_BL, 0.0)


def uniform() -> Path:
    """All positions together."""
    return Path("uniform", lambda free_BL, block_BL, steps: ramp_levels(free_BL, steps, 0.0))


def ramp_path(slope: float = 0.25) -> Path:
    """Earlier positions first (AR-Diffusion): the first is ahead of the last by `slope` in u."""
    if not 0 <= slope < math.inf:
        raise ValueError(f"ramp needs a slope of 0 or more, got {slope:g}")
    return Path(f"ramp:{slope:g}", lambda free_BL, block_BL, steps: ramp_levels(free_BL, steps, slope))


def blocks_path(size: float = 8) -> Path:
    """Semi-autoregressive: blocks of `size` positions from left to right; 1 is token by token."""
    if not (1 <= size <= MOST_POSITIONS and float(size).is_integer()):
        raise ValueError(f"blocks needs a whole number of positions, 1 or more, got {size:g}")
    return Path(f"blocks:{size:g}", block_levels, block=int(size))


MOST_POSITIONS = 2**31
"""Longest block that can be asked for; longer than any row."""

PATHS: dict[str, Callable[..., Path]] = {"uniform": uniform, "ramp": ramp_path, "blocks": blocks_path}
"""Every path by name; each takes at most one number."""


def make_path(text: str) -> Path:
    """The path written as ``name`` or ``name:number``, such as ``ramp:0.25``.

    Raises:
        ValueError: unknown name or bad argument.
    """
    path: Path = parse_call(text, PATHS, "path")
    return path


def parse_call(text: str, registry: dict[str, Callable[..., Any]], what: str) -> Any:
    """Call the entry of `registry` that `text` names, with its number if it has one."""
    name, _, argument = text.partition(":")
    if name not in registry:
        raise ValueError(f"no {what} {name!r}: choose {', '.join(registry)}")
    if not argument:
        return registry[name]()
    try:
        number = float(argument)
    except ValueError:
        raise ValueError(f"{what} {text!r}: {argument!r} is not a number") from None
    try:
        return registry[name](number)
    except TypeError:
        raise ValueError(f"{what} {name!r} takes no argument, got {argument!r}") from None

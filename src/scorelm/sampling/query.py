"""What is asked of the network: positions of a request's rows, and where they stand in rows of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.device import send
from scorelm.model.layout import Layout, Past
from scorelm.sampling.cache import finished_blocks
from scorelm.sampling.state import State


@dataclass(eq=False)
class Query:
    """Positions of the rows of a request whose tokens are to be predicted; tensors [B, L, ...].

    Embeddings and `ids_BL` are on the network's device, the others on the host.
    """

    x_BLE: Tensor
    sigma_BL: Tensor
    x0_BLE: Tensor
    """The estimate that is fed back."""
    reach_BL: Tensor
    """Positions that the network may read; what is open among them is asked about."""
    ids_BL: Tensor
    """Tokens of the positions at sigma 0."""
    closed_BL: Tensor
    """Positions of rows whose ``</s>`` is given."""
    hole_BL: Tensor
    """The condition on what is written there: the value of a `Hole`, 0 for none."""
    position_BL: Tensor
    block_BL: Tensor
    finished_BL: Tensor
    """On a path of blocks, those without noise in the state, which later blocks may read."""
    alone_BL: Tensor
    """Positions without evidence that are a block of their own, behind another."""
    in_blocks: bool

    @classmethod
    def of(cls, state: State, x_BLE: Tensor, sigma_BL: Tensor, x0_BLE: Tensor, reach_BL: Tensor, block: int) -> Self:
        """What to ask of a state's rows on a path of such blocks, were its positions at `x_BLE` and `sigma_BL`."""
        layout, nowhere_BL = state.rows.layout, torch.zeros_like(reach_BL)
        return cls(
            x_BLE, sigma_BL, x0_BLE, reach_BL, state.ids_BL, state.rows.closed_B[:, None].expand_as(reach_BL),
            state.rows.hole_BL, layout.position_BL, layout.block_BL,
            finished_blocks(layout.block_BL, state.sigma_BL) if block else nowhere_BL,
            (sigma_BL == torch.inf) & (layout.position_BL > 0) if block == 1 else nowhere_BL, block > 0,
        )  # fmt: skip

    @property
    def open_BL(self) -> Tensor:
        """Positions to be predicted."""
        return self.reach_BL & (self.sigma_BL > 0)


class Placed(NamedTuple):
    """Positions of a query in rows of the network, on the host and there."""

    at_RW: Tensor
    """Where each is taken from: places in [B, L], counted row after row."""
    layout: Layout
    at_there_RW: Tensor
    layout_there: Layout
    fixed: bool = False
    """Whether their shape is one of a few, so that all positions are computed in a `Pass`."""
    asks_RW: Tensor | None = None
    """Finished positions, on the host, that are asked for the next token."""

    @classmethod
    def of(cls, at_RW: Tensor, layout: Layout, device: torch.device, past: Past | None = None, **how: Any) -> Self:
        """Sent to a device, behind what is computed already."""
        there = layout.to(device)
        there = there if past is None else replace(there, past=past)
        return cls(at_RW, layout, send(at_RW, device), there, **how)

    def take(self, t_BL: Tensor) -> Tensor:
        """The values of the positions, of a tensor that is there."""
        return t_BL.flatten(0, 1)[self.at_there_RW]


def joined(queries: Sequence[Query]) -> Query:
    """All queries in one, as long as the longest."""
    if len(queries) == 1:
        return queries[0]
    longest = max(q.sigma_BL.shape[1] for q in queries)

    def join(name: str) -> Tensor:
        parts = [getattr(q, name) for q in queries]
        padding = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
        return torch.cat([F.pad(part, pad) for part, pad in zip(parts, padding, strict=True)])

    tensors = {f.name: join(f.name) for f in fields(Query) if f.name != "in_blocks"}
    return Query(**tensors, in_blocks=any(q.in_blocks for q in queries))

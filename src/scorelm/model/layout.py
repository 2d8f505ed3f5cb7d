"""Where every position of a batch stands, and the one rule of who sees whom.

The rule covers packed documents, plain bidirectional diffusion (one block), autoregressive training (blocks of one
token) and everything between (block diffusion, BD3-LM, arXiv 2503.09573, with a clean and a noisy stream).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scorelm.device import send

CLEAN, NOISY = 0, 1
WHOLE = 2**31 - 1
"""Size of a block that no document outgrows."""


@dataclass
class Past:
    """Keys and values of C positions that are computed already and stand before the layout's own.

    A forward pass reads `keys` and `values`, and puts those of the layout's own positions in `new`.
    """

    layout: Layout
    """Of the C positions; segment 0 where there is nothing."""
    keys: list[Tensor]
    """[B, C, H, K], one for each layer."""
    values: list[Tensor]
    new: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(keys, values) [B, L, H, K] of each layer."""

    def before(self, k_BLHK: Tensor, v_BLHK: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer's keys and values with those of the past before them, [B, C + L, H, K]."""
        layer = len(self.new)
        self.new.append((k_BLHK, v_BLHK))
        return torch.cat([self.keys[layer], k_BLHK], 1), torch.cat([self.values[layer], v_BLHK], 1)


@dataclass(frozen=True)
class Layout:
    """Where every position of a batch stands; all that attention needs to know. Four integer tensors [B, L]."""

    segment_BL: Tensor
    """Number of the document in its row, from 1; 0 is padding."""
    position_BL: Tensor
    """Position inside the document, from 0."""
    block_BL: Tensor
    """Number of the block inside the document: one more than the position of its first token, 0 for ``<s>``."""
    stream_BL: Tensor
    """CLEAN (0) or NOISY (1)."""
    past: Past | None = None
    """What is computed already; queries see it by the same rule."""
    computed: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What layers share because it depends on the layout only, computed once."""

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Segment, position, block and stream: all but the past."""
        return self.segment_BL, self.position_BL, self.block_BL, self.stream_BL

    @property
    def marks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Segment, block and stream: what visibility is a rule about."""
        return self.segment_BL, self.block_BL, self.stream_BL

    @classmethod
    def one_stream(cls, segment_BL: Tensor, position_BL: Tensor, block_BL: Tensor) -> Layout:
        """Every row once, block 0 (``<s>``) clean and the rest noisy."""
        return cls(segment_BL, position_BL, block_BL, torch.where(block_BL == 0, CLEAN, NOISY))

    @classmethod
    def two_streams(cls, segment_BL: Tensor, position_BL: Tensor, block_BL: Tensor) -> Layout:
        """Every row twice, a clean copy and then a noisy one in these blocks, [B, 2 L]: block diffusion."""
        block = torch.cat([token_by_token(position_BL, block_BL), block_BL], 1)
        stream = torch.cat([torch.full_like(block_BL, CLEAN), torch.full_like(block_BL, NOISY)], 1)
        return cls(twice(segment_BL), twice(position_BL), block, stream)

    @classmethod
    def causal(cls, segment_BL: Tensor, position_BL: Tensor) -> Layout:
        """Every position sees those before it and itself: an autoregressive model's rows."""
        return cls(segment_BL, position_BL, position_BL + 1, torch.full_like(position_BL, CLEAN))

    def to(self, device: torch.device) -> Layout:
        """The same layout of the host on a device, which nobody waits for; it has no past."""
        if device == self.segment_BL.device:
            return self
        segment_BL, position_BL, block_BL, stream_BL = send(torch.stack(self.fields), device).unbind()
        return Layout(segment_BL, position_BL, block_BL, stream_BL)

    def map(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The layout with each of its tensors changed; it has no past."""
        return Layout(change(self.segment_BL), change(self.position_BL), change(self.block_BL), change(self.stream_BL))

    @classmethod
    def merge(cls, layouts: Sequence[Layout], join: Callable[[list[Tensor]], Tensor]) -> Layout:
        """One layout of several without a past: each tensor joined from theirs."""
        segment_BL, position_BL, block_BL, stream_BL = (
            join([*parts]) for parts in zip(*(layout.fields for layout in layouts), strict=True)
        )
        return cls(segment_BL, position_BL, block_BL, stream_BL)


def twice(t_BL: Tensor) -> Tensor:
    """The row, then the row again."""
    return torch.cat([t_BL, t_BL], 1)


def number_blocks(position_BL: Tensor, start_BL: Tensor, size: Tensor | int) -> Tensor:
    """Number of the block that each position is in: one more than the position of its first token, 0 for ``<s>``.

    Args:
        position_BL: position inside the document, from 0.
        start_BL: 1 where the position's document begins with ``<s>``, else 0; broadcasts.
        size: positions in a block; 0 is the whole document; broadcasts.
    """
    whole = torch.where(size == 0, WHOLE, size) if isinstance(size, Tensor) else size or WHOLE
    number_BL = 1 + start_BL + (position_BL - start_BL) // whole * whole
    return torch.where(position_BL < start_BL, 0, number_BL)


def token_by_token(position_BL: Tensor, block_BL: Tensor) -> Tensor:
    """The same positions in blocks of one token, as clean copies are: each sees itself and those before it."""
    return torch.where(block_BL == 0, 0, position_BL + 1)


def visibility(layout: Layout, reach: int | None = None) -> Tensor:
    """Which key positions (last axis) a query position sees: bool [B, L, L], or [B, L, C + L] with a past.

    A query sees a key iff they share the segment and either share stream and block, or the key is clean and in an
    earlier block. Padding sees padding only. With a `reach`, a query sees no position farther away than that.
    """
    own = marks_within(layout, reach)
    past = tuple(t[:, :0] for t in own) if layout.past is None else marks_within(layout.past.layout, reach)
    key = [torch.cat(pair, 1)[:, None, :] for pair in zip(past, own, strict=True)]
    return sees([t[:, :, None] for t in own], key, reach)


def marks_within(layout: Layout, reach: int | None) -> tuple[Tensor, ...]:
    """What `sees` is a rule about: the layout's marks, and positions where there is a reach."""
    return layout.marks if reach is None else (*layout.marks, layout.position_BL)


def sees(query: Sequence[Tensor], key: Sequence[Tensor], reach: int | None = None) -> Tensor:
    """The rule of `visibility` for segment, block and stream, and position with a reach, that broadcast together."""
    (segment, block, stream), (key_segment, key_block, key_stream) = query[:3], key[:3]
    same_block = (block == key_block) & (stream == key_stream)
    clean_before = (key_stream == CLEAN) & (key_block < block)
    seen = (segment == key_segment) & (same_block | clean_before)
    return seen if reach is None else seen & ((query[3] - key[3]).abs() <= reach)

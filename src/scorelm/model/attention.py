"""Self-attention under one visibility rule over segments, blocks and streams.

The rule covers packed documents, plain bidirectional diffusion (one block), autoregressive training (blocks of one
token) and everything between (block diffusion, BD3-LM, arXiv 2503.09573, with a clean and a noisy stream).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.model.norm import product_dtype
from scorelm.model.rope import rotation, unit_rms_rotated

CLEAN, NOISY = 0, 1
SHORT = 1024
"""Longest row, in positions, whose attention is computed by batched products on a CPU."""
FLEX = ("cuda",)
"""Kinds of device on which training skips blocks of positions that do not see each other."""


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
    """Number of the block inside the document."""
    stream_BL: Tensor
    """CLEAN (0) or NOISY (1)."""
    past: Past | None = None
    """What is computed already; queries see it by the same rule."""
    _inputs: dict[tuple[int, bool, bool], AttentionInputs] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def inputs(self, head_dim: int, training: bool) -> AttentionInputs:
        """What all layers of all passes over this layout share, computed once."""
        key = head_dim, training, torch.is_inference_mode_enabled()
        if key not in self._inputs:
            self._inputs[key] = AttentionInputs(self, head_dim, training)
        return self._inputs[key]

    @property
    def marks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Segment, block and stream: what visibility is a rule about."""
        return self.segment_BL, self.block_BL, self.stream_BL

    @classmethod
    def two_streams(cls, segment_BL: Tensor, position_BL: Tensor, block_BL: Tensor) -> Layout:
        """Every row twice, a clean copy and then a noisy one, [B, 2 L]: what block diffusion trains on."""
        segment, position, block = (twice(t_BL) for t_BL in (segment_BL, position_BL, block_BL))
        stream = torch.cat([torch.full_like(block_BL, CLEAN), torch.full_like(block_BL, NOISY)], 1)
        return cls(segment, position, block, stream)

    @classmethod
    def causal(cls, segment_BL: Tensor, position_BL: Tensor) -> Layout:
        """Every position sees those before it and itself: an autoregressive model's rows."""
        return cls(segment_BL, position_BL, position_BL, torch.full_like(position_BL, CLEAN))

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        return self.map(lambda t_BL: t_BL.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The layout with each of its tensors changed; it has no past."""
        return Layout(change(self.segment_BL), change(self.position_BL), change(self.block_BL), change(self.stream_BL))


def twice(t_BL: Tensor) -> Tensor:
    """The row, then the row again."""
    return torch.cat([t_BL, t_BL], 1)


def visibility(layout: Layout) -> Tensor:
    """Which key positions (last axis) a query position sees: bool [B, L, L], or [B, L, C + L] with a past.

    A query sees a key iff they share the segment and either share stream and block, or the key is clean and in an
    earlier block. Padding sees padding only.
    """
    own = layout.marks
    past = layout.past.layout.marks if layout.past is not None else tuple(t[:, :0] for t in own)
    key = [torch.cat(pair, 1)[:, None, :] for pair in zip(past, own, strict=True)]
    return sees([t[:, :, None] for t in own], key)


def sees(query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """The rule of `visibility` for marks (segment, block, stream) that broadcast against each other."""
    (segment, block, stream), (key_segment, key_block, key_stream) = query, key
    same_block = (block == key_block) & (stream == key_stream)
    clean_before = (key_stream == CLEAN) & (key_block < block)
    return (segment == key_segment) & (same_block | clean_before)


def block_mask(layout: Layout) -> Any:
    """`visibility` as FlexAttention takes it: the rule, and which blocks of 128 x 128 positions have pairs that see."""
    from torch.nn.attention.flex_attention import create_block_mask

    marks, (rows, length) = layout.marks, layout.segment_BL.shape

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees([t[b, q] for t in marks], [t[b, k] for t in marks])

    return create_block_mask(rule, rows, None, length, length, device=str(layout.segment_BL.device))


def flex() -> Any:
    """FlexAttention, compiled: without that it is slower than what it replaces."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled version of a function for the whole process."""
    found: Callable[..., Any] = torch.compile(function)
    return found


class AttentionInputs:
    """What all layers share for one layout: who sees whom and the rotation angles.

    Who sees whom is a mask of FlexAttention, one of the fused attention, or a bias for batched products.
    """

    def __init__(self, layout: Layout, head_dim: int, training: bool = False) -> None:
        self.rotation_BLK2 = rotation(layout.position_BL, head_dim)
        self.past, device = layout.past, layout.position_BL.device.type
        self.blocks, self.mask_B1LL, self.bias_B1LL = None, None, None
        if training and self.past is None and device in FLEX and head_dim >= 16:  # its kernels take no smaller heads
            self.blocks = block_mask(layout)
            return
        mask_B1LL = visibility(layout)[:, None]
        if device == "cpu" and mask_B1LL.shape[-1] <= SHORT:
            bias_B1LL = torch.zeros(mask_B1LL.shape).masked_fill_(~mask_B1LL, -torch.inf)
            self.bias_B1LL = bias_B1LL.to(product_dtype(bias_B1LL))
        else:
            self.mask_B1LL = mask_B1LL

    def attend(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor) -> Tensor:
        """``softmax(q k / sqrt(K)) v`` over what is visible, [B, L, H, K]."""
        if self.past is not None:
            k_BLHK, v_BLHK = self.past.before(k_BLHK, v_BLHK)
        q, k, v = (t.transpose(1, 2) for t in (q_BLHK, k_BLHK, v_BLHK))
        if self.blocks is not None:
            seen: Tensor = flex()(q, k, v, block_mask=self.blocks)
            return seen.transpose(1, 2)
        if self.bias_B1LL is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_B1LL).transpose(1, 2)
        weight_BHLL: Tensor = (q * q.shape[-1] ** -0.5 @ k.mT).add_(self.bias_B1LL).softmax(-1)
        return (weight_BHLL @ v).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and normalised queries and keys (arXiv 2010.04245)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, h_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        qk, v = self.qkv(h_BLD).unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=2)
        q, k = unit_rms_rotated(qk, inputs.rotation_BLK2).unbind(2)
        result: Tensor = self.out(inputs.attend(q, k, v.squeeze(2)).flatten(2))
        return result

"""Self-attention under the visibility rule of a layout: batched products, fused attention, or FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.model.kernels import Dropout, product_dtype, rotation, unit_rms_rotated
from scorelm.model.layout import Layout, marks_within, sees, visibility

SHORT = 1024
"""Longest row, in positions, whose attention is computed by batched products on a CPU."""
FLEX = ("cuda",)
"""Kinds of device on which training skips blocks of positions that do not see each other, in rows longer than `DENSE`.

Only training does: compiled without gradients (PyTorch 2.11), FlexAttention reads beyond the end of a mask that is
built in the same graph, because it takes the stride of the mask's single head for that of its rows.
"""
DENSE = 512
"""Longest row, in positions, whose attention is faster under a mask of all pairs there."""


def block_mask(layout: Layout, reach: int | None = None) -> Any:
    """`visibility` as FlexAttention takes it: the rule, and which blocks of 128 x 128 positions have pairs that see."""
    from torch.nn.attention.flex_attention import create_block_mask

    marks, (rows, length) = marks_within(layout, reach), layout.segment_BL.shape

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees([t[b, q] for t in marks], [t[b, k] for t in marks], reach)

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


def attention_inputs(
    layout: Layout, head_dim: int, training: bool, base: float = 10_000.0, reach: int | None = None
) -> AttentionInputs:
    """What all layers of one kind share in all passes over a layout, computed once."""
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()  # which can't be traced
    key = inference, head_dim, training, base, reach
    if key not in layout.computed:
        layout.computed[key] = AttentionInputs(layout, *key[1:])
    found: AttentionInputs = layout.computed[key]
    return found


class AttentionInputs:
    """What layers share for one layout: who sees whom, up to a `reach`, and the rotation angles.

    Who sees whom is a mask of FlexAttention, one of the fused attention, or a bias for batched products.
    """

    def __init__(
        self, layout: Layout, head_dim: int, training: bool, base: float = 10_000.0, reach: int | None = None
    ) -> None:
        self.rotation_BLK2 = rotation(layout.position_BL, head_dim, base)
        self.past, device = layout.past, layout.position_BL.device.type
        self.blocks, self.mask_B1LL, self.bias_B1LL = None, None, None
        sparse = device in FLEX and head_dim >= 16 and layout.segment_BL.shape[1] > DENSE
        if sparse and training and self.past is None:
            self.blocks = block_mask(layout, reach)
            return
        mask_B1LL = visibility(layout, reach)[:, None]
        if device == "cpu" and mask_B1LL.shape[-1] <= SHORT:
            bias_B1LL = torch.zeros(mask_B1LL.shape).masked_fill_(~mask_B1LL, -torch.inf)
            self.bias_B1LL = bias_B1LL.to(product_dtype(bias_B1LL))
        else:
            self.mask_B1LL = mask_B1LL

    def attend(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor) -> Tensor:
        """``softmax(q k / sqrt(K)) v`` over what is visible, [B, L, H, K]; a key may serve several queries' heads."""
        if self.past is not None:
            k_BLHK, v_BLHK = self.past.before(k_BLHK, v_BLHK)
        if (shared := q_BLHK.shape[2] // k_BLHK.shape[2]) > 1:
            k_BLHK, v_BLHK = (t.repeat_interleave(shared, dim=2) for t in (k_BLHK, v_BLHK))
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
        self.dropout = Dropout()
        nn.init.zeros_(self.out.weight)

    def forward(self, h_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        qk, v = self.qkv(h_BLD).unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=2)
        q, k = unit_rms_rotated(qk, inputs.rotation_BLK2).unbind(2)
        result: Tensor = self.dropout(self.out(inputs.attend(q, k, v.squeeze(2)).flatten(2)))
        return result

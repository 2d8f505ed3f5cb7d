"""Self-attention under one visibility rule over segments, blocks and streams.

The rule covers packed documents, plain bidirectional diffusion (one block), autoregressive training (blocks of one
token) and everything between (block diffusion, BD3-LM, arXiv 2503.09573, with a clean and a noisy stream).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.model.rope import rotate, rotation

CLEAN, NOISY = 0, 1


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

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        return Layout(*(t.to(device) for t in (self.segment_BL, self.position_BL, self.block_BL, self.stream_BL)))

    def part(self, length: int) -> Layout:
        """The first `length` columns."""
        return Layout(*(t[:, :length] for t in (self.segment_BL, self.position_BL, self.block_BL, self.stream_BL)))


def visibility(layout: Layout) -> Tensor:
    """Which key positions (last axis) a query position sees: bool [B, L, L].

    A query sees a key iff they share the segment and either share stream and block, or the key is clean and in an
    earlier block. Padding sees padding only.
    """
    query = [t[:, :, None] for t in (layout.segment_BL, layout.block_BL, layout.stream_BL)]
    key = [t[:, None, :] for t in (layout.segment_BL, layout.block_BL, layout.stream_BL)]
    same_block = (query[1] == key[1]) & (query[2] == key[2])
    clean_before = (key[2] == CLEAN) & (key[1] < query[1])
    return (query[0] == key[0]) & (same_block | clean_before)


class AttentionInputs:
    """What all layers share for one layout: the mask and the rotation angles, computed once a forward pass."""

    def __init__(self, layout: Layout, head_dim: int) -> None:
        self.mask_B1LL = visibility(layout)[:, None]
        self.rotation = rotation(layout.position_BL, head_dim)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and normalised queries and keys (arXiv 2010.04245)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gain = nn.Parameter(torch.ones(heads, 1))
        nn.init.zeros_(self.out.weight)

    def forward(self, h_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        qkv = self.qkv(h_BLD).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(F.rms_norm(qkv[:, :, :2], qkv.shape[-1:]), inputs.rotation).unbind(2)
        q, k, v = ((q * self.gain).to(k.dtype).transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask_B1LL)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result

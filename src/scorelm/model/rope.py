"""Rotary position embedding (RoFormer, arXiv 2104.09864), at positions that restart in every packed document."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(position_BL: Tensor, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles: two tensors [B, L, 1, head_dim / 2] in fp32."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BL.device, dtype=torch.float32) / head_dim)
    angle = position_BL[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) of every head by the angles of its position."""
    a, b = x_BLHK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BLHK.dtype)

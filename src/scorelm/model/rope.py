"""Rotary position embedding (RoFormer, arXiv 2104.09864), at positions that restart in every packed document."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(position_BL: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Unit complex numbers ``exp(i position base^(-2k / K))``: [B, L, K / 2], complex64."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BL.device, dtype=torch.float32) / head_dim)
    angle = position_BL[..., None].float() * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_BLHK: Tensor, rotation_BLK: Tensor) -> Tensor:
    """Rotate every pair (x_2k, x_2k+1) of every head by the angle of its position; any number of axes for heads."""
    pairs = torch.view_as_complex(x_BLHK.float().reshape(*x_BLHK.shape[:-1], -1, 2))
    heads = pairs.ndim - rotation_BLK.ndim
    turned = pairs * rotation_BLK[(slice(None), slice(None), *[None] * heads)]
    return torch.view_as_real(turned).flatten(-2).to(x_BLHK.dtype)

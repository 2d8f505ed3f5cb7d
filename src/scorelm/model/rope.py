"""Rotary position embedding (RoFormer, arXiv 2104.09864), at positions that restart in every packed document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scorelm.model.norm import inverse_rms, tangent


def rotation(position_BL: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Unit complex numbers ``exp(i position base^(-2k / K))``: [B, L, K / 2], complex64."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BL.device, dtype=torch.float32) / head_dim)
    angle = position_BL[..., None].float() * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_BLHK: Tensor, rotation_BLK: Tensor) -> Tensor:
    """Rotate every pair (x_2k, x_2k+1) of every head by the angle of its position; any number of axes for heads."""
    pairs = torch.view_as_complex(x_BLHK.view(*x_BLHK.shape[:-1], -1, 2))
    heads = pairs.ndim - rotation_BLK.ndim
    return torch.view_as_real(pairs * rotation_BLK[(slice(None), slice(None), *[None] * heads)]).flatten(-2)


class UnitRMSRotated(torch.autograd.Function):
    """Rotate, then normalise (`scorelm.model.norm.UnitRMS`), which is the same in either order; and the gradient."""

    @staticmethod
    def forward(ctx: Any, x_BLHK: Tensor, rotation_BLK: Tensor) -> Tensor:
        """Compute in fp32 or better, answer in the precision of `x_BLHK`."""
        wide = torch.promote_types(x_BLHK.dtype, torch.float32)
        turned = rotate(x_BLHK.to(wide, memory_format=torch.contiguous_format), rotation_BLK)
        scale = inverse_rms(turned)
        y = turned.mul_(scale).to(x_BLHK.dtype)
        ctx.save_for_backward(y, scale, rotation_BLK)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of `forward`."""
        y, scale, rotation_BLK = ctx.saved_tensors
        inward = tangent(grads[0], y).to(scale.dtype, memory_format=torch.contiguous_format).mul_(scale)
        return rotate(inward, rotation_BLK.conj()).to(y.dtype), None


def unit_rms_rotated(x_BLHK: Tensor, rotation_BLK: Tensor) -> Tensor:
    """Heads of unit root mean square, rotated by their positions: what queries and keys are (QK-norm and RoPE)."""
    y: Tensor = UnitRMSRotated.apply(x_BLHK, rotation_BLK)  # type: ignore[no-untyped-call]
    return y

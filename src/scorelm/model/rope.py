"""Rotary position embedding (RoFormer, arXiv 2104.09864), at positions that restart in every packed document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scorelm.model.norm import inverse_rms, tangent


def rotation(position_BL: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosine and sine of the angles ``position base^(-2k / K)``: [B, L, K / 2, 2]."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BL.device, dtype=torch.float32) / head_dim)
    angle = position_BL[..., None].float() * frequency
    return torch.stack([angle.cos(), angle.sin()], -1)


def rotate(x_BLHK: Tensor, rotation_BLK2: Tensor, back: bool = False) -> Tensor:
    """Rotate every pair (x_2k, x_2k+1) of every head by the angle of its position, or back; any number of head axes."""
    pairs = x_BLHK.view(*x_BLHK.shape[:-1], -1, 2)
    heads = pairs.ndim - rotation_BLK2.ndim
    turn = rotation_BLK2[(slice(None), slice(None), *[None] * heads)]
    if torch.compiler.is_compiling():  # which has no complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        sin = -sin if back else sin
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    unit = torch.view_as_complex(turn)
    return torch.view_as_real(torch.view_as_complex(pairs) * (unit.conj() if back else unit)).flatten(-2)


class UnitRMSRotated(torch.autograd.Function):
    """Rotate, then normalise (`scorelm.model.norm.UnitRMS`), which is the same in either order; and the gradient."""

    @staticmethod
    def forward(ctx: Any, x_BLHK: Tensor, rotation_BLK2: Tensor) -> Tensor:
        """Compute in fp32 or better, answer in the precision of `x_BLHK`."""
        wide = torch.promote_types(x_BLHK.dtype, torch.float32)
        turned = rotate(x_BLHK.to(wide, memory_format=torch.contiguous_format), rotation_BLK2)
        scale = inverse_rms(turned)
        y = turned.mul_(scale).to(x_BLHK.dtype)
        ctx.save_for_backward(y, scale, rotation_BLK2)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of `forward`."""
        y, scale, rotation_BLK2 = ctx.saved_tensors
        inward = tangent(grads[0], y).to(scale.dtype, memory_format=torch.contiguous_format).mul_(scale)
        return rotate(inward, rotation_BLK2, back=True).to(y.dtype), None


def unit_rms_rotated(x_BLHK: Tensor, rotation_BLK2: Tensor) -> Tensor:
    """Heads of unit root mean square, rotated by their positions: what queries and keys are (QK-norm and RoPE)."""
    y: Tensor = UnitRMSRotated.apply(x_BLHK, rotation_BLK2)  # type: ignore[no-untyped-call]
    return y

"""RMS norm without a gain (arXiv 1910.07467) and rotary positions (arXiv 2104.09864), with gradients in closed form.

PyTorch's CPU build composes a norm of many elementwise steps, in both directions; written out, it takes fewer. There is
no gain: what follows is a linear layer or FiLM, which has one, or attention, whose logits stay bounded. Also here: rows
of a matrix by their places, with gradients that are copied and never summed in an order that threads decide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6
"""Least root mean square that is divided by."""


def inverse_rms(x: Tensor) -> Tensor:
    """``1 / sqrt(mean(x^2))`` over the last axis, which is kept."""
    rms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return rms.clamp(min=EPS).reciprocal()


def tangent(dy: Tensor, y: Tensor) -> Tensor:
    """The part of a gradient `dy` at a normalised `y` that a norm lets through: ``dy - y mean(dy y)``."""
    return torch.addcmul(dy, y, torch.linalg.vecdot(dy, y)[..., None] / y.shape[-1], value=-1)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, but nothing at all where it is of that type already.

    PyTorch 2.11 compiles a gradient of 0 for a function whose result is such a `to`, or was computed in place.
    """
    return x if x.dtype == dtype else x.to(dtype)


class UnitRMS(torch.autograd.Function):
    """``y = x / rms(x)``, and ``dx = (dy - y mean(dy y)) / rms(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise in the precision of `x`, answer in `dtype`."""
        scale = inverse_rms(x)
        y = cast(x * scale, dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of `forward`, in the precision of its input."""
        y, scale = ctx.saved_tensors
        return tangent(grads[0], y) * scale, None


def unit_rms(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; under autocast, answer in its precision."""
    y: Tensor = UnitRMS.apply(x, product_dtype(x))  # type: ignore[no-untyped-call]
    return y


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` is computed in: autocast's precision, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


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
    """Rotate, then normalise (`UnitRMS`), which is the same in either order; and the gradient."""

    @staticmethod
    def forward(ctx: Any, x_BLHK: Tensor, rotation_BLK2: Tensor) -> Tensor:
        """Compute in fp32 or better, answer in the precision of `x_BLHK`."""
        wide = torch.promote_types(x_BLHK.dtype, torch.float32)
        turned = rotate(x_BLHK.to(wide, memory_format=torch.contiguous_format), rotation_BLK2)
        scale = inverse_rms(turned)
        y = cast(turned * scale if torch.compiler.is_compiling() else turned.mul_(scale), x_BLHK.dtype)
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


class DifferentRows(torch.autograd.Function):
    """``x[place]`` where every place is another: the gradient is copied back, not summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        """Rows of a matrix."""
        ctx.save_for_backward(place)
        ctx.rows = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """To the places that they came from."""
        (place,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).index_copy_(0, place, grads[0]), None


def different_rows(x: Tensor, place: Tensor) -> Tensor:
    """Rows `place` of a matrix, all different."""
    chosen: Tensor = DifferentRows.apply(x, place)  # type: ignore[no-untyped-call]
    return chosen


class Dropout(nn.Module):
    """`torch.nn.Dropout`, which on a CPU takes four decisions from one random number of 64 bits.

    PyTorch draws a number for each value there, which takes longer than the matrix product before it.
    """

    VALUES = 2**16

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        left_out = min(round(self.p * self.VALUES), self.VALUES - 1)
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.int16)[: x.numel()].view(x.shape).ge_(left_out - self.VALUES // 2)
        return x * kept.to(x.dtype).mul_(self.VALUES / (self.VALUES - left_out))

"""RMS normalisation without a gain (arXiv 1910.07467), with its gradient in closed form.

PyTorch's CPU build composes the norm of many elementwise steps, in both directions; written out, it takes fewer.
There is no gain: what follows is a linear layer or FiLM, which has one, or attention, whose logits stay bounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
"""Least root mean square that is divided by."""


def inverse_rms(x: Tensor) -> Tensor:
    """``1 / sqrt(mean(x^2))`` over the last axis, which is kept."""
    rms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return rms.clamp(min=EPS).reciprocal()


def tangent(dy: Tensor, y: Tensor) -> Tensor:
    """The part of a gradient `dy` at a normalised `y` that a norm lets through: ``dy - y mean(dy y)``."""
    return torch.addcmul(dy, y, torch.linalg.vecdot(dy, y)[..., None] / y.shape[-1], value=-1)


class UnitRMS(torch.autograd.Function):
    """``y = x / rms(x)``, and ``dx = (dy - y mean(dy y)) / rms(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise in the precision of `x`, answer in `dtype`."""
        scale = inverse_rms(x)
        y = (x * scale).to(dtype)
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

"""The forward process: noise on embeddings, a level for every position."""

from __future__ import annotations

import torch
from torch import Tensor

from scorelm.noise.schedule import Schedule


def add_noise(e: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """``x = e + sigma eps``, [..., E]; 0 where sigma is inf, where x says nothing.

    Args:
        e: embeddings, [..., E].
        sigma: levels in [0, inf], [...].
        eps: standard normal, [..., E].
    """
    finite = torch.isfinite(sigma)[..., None]
    return torch.where(finite, e + torch.where(finite, sigma[..., None], 0.0) * eps, 0.0)


def to_sigma(u: Tensor, schedule: Schedule) -> Tensor:
    """Levels of generation: sigma(u) between, inf at u = 1 (no evidence) and 0 at u = 0 (finished), float32."""
    sigma = schedule.sigma(u.clamp(0, 1))
    return torch.where(u >= 1, torch.inf, torch.where(u <= 0, 0.0, sigma)).float()

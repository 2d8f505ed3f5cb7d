"""The optimiser of a run: fused AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from typing import Any

import torch

from scorelm.config import TrainingConfig
from scorelm.model.denoiser import Denoiser


def make_optimizer(denoiser: Denoiser, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with decay on the trunk's matrices only."""
    decayed = {id(p) for p in denoiser.trunk.parameters() if p.ndim == 2}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in denoiser.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in denoiser.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
    for p in denoiser.parameters():  # moments for every parameter from the start, so that every checkpoint has them
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer

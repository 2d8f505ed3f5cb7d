"""The optimisers of a run: fused AdamW (arXiv 1711.05101), and as an option Muon for the trunk's matrices."""

from __future__ import annotations

from typing import Any

import torch

from scorelm.config import TrainingConfig
from scorelm.model.denoiser import Denoiser

MUON_LR = 3.0
"""Learning rate of Muon in units of AdamW's, its updates being as large as AdamW's at the same rate."""


def make_optimizers(denoiser: Denoiser, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """What steps together, with decay on the trunk's matrices only.

    ``adamw``: one for all weights. ``muon``: the layers' matrices by orthogonalised momentum (Muon, with the scale of
    arXiv 2502.16982), the rest by AdamW, which comes first.
    """
    layers = [p for p in denoiser.trunk.blocks.parameters() if config.optimizer == "muon"]
    done = {id(p) for p in layers}
    matrices = [p for p in denoiser.trunk.parameters() if p.ndim == 2 and id(p) not in done]
    done |= {id(p) for p in matrices}
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in denoiser.parameters() if id(p) not in done], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if layers:
        muon = torch.optim.Muon(layers, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        for p in layers:  # state for every parameter from the start, so that every checkpoint has it
            muon.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        optimizers.append(muon)
    full = [group for group in groups if group["params"]]  # checkpoints of two optimisers take no empty ones
    adamw = torch.optim.AdamW(full, lr=config.lr, betas=(0.9, 0.98), fused=True)
    for group in adamw.param_groups:
        for p in group["params"]:
            adamw.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return [adamw, *optimizers]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give each its rate, by AdamW's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * (MUON_LR if isinstance(optimizer, torch.optim.Muon) else 1.0)

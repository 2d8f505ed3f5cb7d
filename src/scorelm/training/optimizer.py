"""What steps the weights: fused AdamW (arXiv 1711.05101), as an option Muon for the layers, and averages of weights."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from scorelm.config.recipe import TrainingConfig
from scorelm.model.denoiser import Denoiser

MUON_LR = 3.0
"""Learning rate of Muon in units of AdamW's, its updates being as large as AdamW's at the same rate."""


def make_optimizers(denoiser: Denoiser, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """What steps the weights that are trained, with decay on the backbone's matrices only.

    ``adamw``: one for all weights. ``muon``: the layers' matrices by orthogonalised momentum (Muon, with the scale of
    arXiv 2502.16982), the rest by AdamW, which comes first. All state is there from the start, so that every
    checkpoint has it.
    """
    done = {id(p) for p in denoiser.parameters() if not p.requires_grad}
    layers = [p for p in denoiser.backbone.layers.parameters() if config.optimizer == "muon" and p.ndim == 2]
    layers = [p for p in layers if id(p) not in done]
    done |= {id(p) for p in layers}
    matrices = [p for p in denoiser.backbone.parameters() if p.ndim == 2 and id(p) not in done]
    done |= {id(p) for p in matrices}
    rest = [p for p in denoiser.parameters() if id(p) not in done]
    optimizers = [make_adamw([(matrices, config.weight_decay), (rest, 0.0)], config.lr)]
    if layers:
        muon = torch.optim.Muon(layers, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        for p in layers:
            muon.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        optimizers.append(muon)
    return optimizers


def make_adamw(groups: Iterable[tuple[list[nn.Parameter], float]], lr: float) -> torch.optim.Optimizer:
    """AdamW for groups of (weights, their decay), with its state."""
    full = [
        {"params": weights, "weight_decay": decay} for weights, decay in groups if weights
    ]  # DCP takes no empty ones
    adamw = torch.optim.AdamW(full, lr=lr, betas=(0.9, 0.98), fused=True)
    for group in adamw.param_groups:
        for p in group["params"]:
            adamw.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return adamw


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Set each optimiser's rate from AdamW's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * (MUON_LR if isinstance(optimizer, torch.optim.Muon) else 1.0)


def learning_rate(config: TrainingConfig, step: int, share: float, cooled: float = 0.0) -> float:
    """AdamW's rate: linear warm-up, constant, then linear decay to 0 over the last `decay` of the run.

    Where a run is cooled instead, it falls linearly to 0 from what it was at that share of the run.

    Args:
        config: peak rate, warm-up and decay.
        step: optimiser steps made.
        share: how much of the run is done, from 0 to 1.
        cooled: how much of the cooling is done, from 0 to 1.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cool = min(1.0, (1 - share) / config.decay) if config.decay else 1.0
    return config.lr * warm * cool * (1 - cooled)


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step where `finite` holds, and change nothing elsewhere; nobody waits for the device to know.

    AdamW has this for scaled gradients. Muon makes a step of finite numbers in any case, which is then undone.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
        optimizer.step()
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    for p in weights:  # a gradient equal to the momentum leaves it as it is
        p.grad = torch.where(finite, p.grad, optimizer.state[p]["momentum_buffer"])
    optimizer.step()
    with torch.no_grad():
        for p, old in zip(weights, before, strict=True):
            p.copy_(torch.where(finite, p, old))


def make_averages(model: Denoiser, decays: Iterable[float], share: bool = True) -> dict[str, Denoiser]:
    """An exponential moving average of the weights for each decay, by its name; they `share` what is not trained."""
    kept = {id(p): p for p in model.parameters() if share and not p.requires_grad}
    return {f"{decay:g}": deepcopy(model, dict(kept)).eval().requires_grad_(False) for decay in decays}


@torch.no_grad()
def move_averages(averages: dict[str, Denoiser], model: Denoiser) -> None:
    """Take every average one step towards the weights."""
    for decay, average in averages.items():
        pairs = zip(average.parameters(), model.parameters(), strict=True)
        own, towards = zip(*((own, p) for own, p in pairs if p.requires_grad), strict=True)
        torch._foreach_lerp_(own, towards, 1 - float(decay))

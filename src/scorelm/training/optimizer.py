"""What steps the weights: fused AdamW (arXiv 1711.05101), as an option Muon for the layers, and averages of weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from scorelm.config.recipe import TrainingConfig
from scorelm.model.backbone import matrices_of
from scorelm.model.denoiser import Denoiser
from scorelm.parallel import place_like

MUON_LR = 3.0
"""Learning rate of Muon in units of AdamW's, its updates being as large as AdamW's at the same rate."""
WARMING = 0.1
"""Most of a run that its learning rate rises in."""
TOGETHER = 2**24
"""Most weights that Muon steps together: it takes several times their memory."""


def make_optimizers(denoiser: Denoiser, config: TrainingConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """What steps the weights that are trained, with decay on the backbone's matrices only.

    ``adamw``: one for all weights. ``muon``: the layers' matrices by orthogonalised momentum (Muon, with the scale of
    arXiv 2502.16982), which multiplies in `dtype`, the rest by AdamW, which comes first. All state is there from the
    start, so that every checkpoint has it.
    """
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    matrices = {id(p) for p in matrices_of(denoiser.backbone)}
    by_muon = {id(p) for p in matrices_of(denoiser.backbone.layers)} if config.optimizer == "muon" else set[int]()
    decaying = [p for p in trained if id(p) in matrices - by_muon]
    others = [p for p in trained if id(p) not in matrices]
    optimizers = [make_adamw([(decaying, config.weight_decay), (others, 0.0)], config.lr)]
    if layers := [p for p in trained if id(p) in by_muon]:
        optimizers.append(Muon(layers, config.lr, config.weight_decay, dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum 0.95 and the scale of arXiv 2502.16982, as `torch.optim.Muon` has it.

    That one takes its matrices one by one, which is 600 launches for 24 of them: on a GPU as long as a small step. It
    multiplies in bfloat16, which on a processor that has none takes as long as all the rest of a step. Here those of
    one shape are taken together, in the precision of the run. Where `found_inf`, as AdamW has it, is 1, nothing
    changes.

    Args:
        matrices: what is stepped.
        lr: learning rate.
        weight_decay: share of the rate that is taken off the weights.
        dtype: of the products.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        self.dtype = dtype
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        weights = [p for group in self.param_groups for p in group["params"]]
        self.found_inf = torch.zeros((), device=weights[0].device)
        for p in weights:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            alike = defaultdict[torch.Size, list[Tensor]](list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, matrices in alike.items():
                many = max(1, TOGETHER // shape.numel())
                for k in range(0, len(matrices), many):
                    self._step(matrices[k : k + many], group, 0.2 * math.sqrt(max(shape)))

    def _step(self, matrices: list[Tensor], group: dict[str, Any], scale: float) -> None:
        """One step of N matrices of one shape."""
        momenta, decay = [self.state[p]["momentum_buffer"] for p in matrices], 1 - group["momentum"]
        grad_NKL, kept = torch.stack([p.grad for p in matrices]), 1.0 - self.found_inf  # type: ignore[misc]
        grad_NKL = torch.where(kept > 0, grad_NKL, torch.stack(momenta))  # which leaves the momenta as they are
        torch._foreach_lerp_(momenta, grad_NKL.unbind(), decay)
        update_NKL = orthogonalized(torch.stack(momenta).lerp(grad_NKL, decay), self.dtype)
        torch._foreach_mul_(matrices, 1.0 - kept * (group["lr"] * group["weight_decay"]))
        updates = (update_NKL * (kept * (-group["lr"] * scale))).unbind()
        torch._foreach_add_(matrices, [place_like(update, p) for update, p in zip(updates, matrices, strict=True)])


def orthogonalized(matrix_NKL: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices with the same singular vectors whose singular values are all near 1, with products in `dtype`.

    Five steps of a Newton-Schulz iteration, with the coefficients of https://kellerjordan.github.io/posts/muon/.
    """
    tall = matrix_NKL.shape[1] > matrix_NKL.shape[2]
    x = (matrix_NKL.mT if tall else matrix_NKL).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrix_NKL.dtype)


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
            group["lr"] = lr * (MUON_LR if isinstance(optimizer, Muon) else 1.0)


def learning_rate(config: TrainingConfig, step: int, share: float, cooled: float = 0.0) -> float:
    """AdamW's rate: linear warm-up, constant, then linear decay to 0 over the last `decay` of the run.

    It rises for a tenth of the run at most. Where a run is cooled instead, it falls linearly to 0 from what it was at
    that share of the run.

    Args:
        config: peak rate, warm-up and decay.
        step: optimiser steps made.
        share: how much of the run is done, from 0 to 1.
        cooled: how much of the cooling is done, from 0 to 1.
    """
    warm = min(1.0, max((step + 1) / max(1, config.warmup), share / WARMING))
    cool = min(1.0, (1 - share) / config.decay) if config.decay else 1.0
    return config.lr * warm * cool * (1 - cooled)


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step where `finite` holds, and change nothing elsewhere; nobody waits for the device to know."""
    optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
    optimizer.step()


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

"""The price of a path in a finite number of steps: the sampler itself walks it, with true tokens for the drawn ones.

Works for every path, adaptive ones included, since what is priced is exactly what generation does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scorelm.evaluation.likelihood import Priced
from scorelm.evaluation.rows import Batch
from scorelm.model.denoiser import Denoiser
from scorelm.noise.schedule import Schedule
from scorelm.sampling.generate import Sampler
from scorelm.sampling.halting import Mind
from scorelm.sampling.options import Options
from scorelm.sampling.solver import Step, towards
from scorelm.text.conditioning import Template
from scorelm.text.tokenizer import BOS, EOS, PAD


def walk(denoiser: Denoiser, schedule: Schedule, batch: Batch, options: Options, seed: int) -> Priced:
    """Bound on each row's NLL under the sampler that `options` describe, with the solver `posterior`.

    A step from evidence y to y' has the density ``sum_w p(w | y) q(y' | y, w)`` in the sampler and ``q(y' | y, e)``
    in the forward process of the true token e, ``y' - y ~ N(dtau e, dtau I)``; with embeddings of one norm their log
    ratio is ``<y' - y, e> - log sum_w p(w | y) exp <y' - y, e_w>``. Its sum over steps and positions, and
    ``-log p(e | y)`` where a position finishes, are the evidence lower bound with the trajectory as the latent
    variable (docs/theory.md). In the limit of small steps it is the integral of `scorelm.evaluation.likelihood.bound`.
    """
    closed = options.path.block != 1
    free_BL = batch.free(closed)
    templates: list[Template] = []
    for row, length in enumerate(batch.real_BL.sum(1).tolist()):
        pairs = zip(batch.ids_BL[row, :length].tolist(), free_BL[row, :length].tolist(), strict=True)
        templates.append([None if free else token for token, free in pairs])
    seeds = [int(g.initial_seed()) for g in batch.generators(seed, 0)]
    walker = Walker(denoiser, schedule, templates, seeds, options, batch.ids_BL)
    with torch.inference_mode():
        for _ in walker.records():
            pass
    terms = {"reconstruction": walker.finished_B, "diffusion": walker.moved_B}
    return Priced({name: value.clone() for name, value in terms.items()}, walker.state.nfe_B.clone().float().cpu())


class Walker(Sampler):
    """A sampler that is told the true tokens, and adds up what it would have cost to draw them."""

    never = (BOS, PAD)

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        templates: Sequence[Template],
        seeds: Sequence[int],
        options: Options,
        ids_BL: Tensor,
    ) -> None:
        super().__init__(denoiser, schedule, templates, seeds, options)
        self.true_BL = ids_BL
        self.closed_B = torch.tensor([EOS in template for template in templates], device=ids_BL.device)
        self.moved_B = torch.zeros(len(templates), dtype=torch.float64, device=ids_BL.device)
        self.finished_B = torch.zeros_like(self.moved_B)

    def move(self, target_BL: Tensor, moving_BL: Tensor, mind: Mind) -> None:
        """Take positions to a level above 0 by the evidence that their true tokens give."""
        state = self.state
        if not moving_BL.any():
            return
        logits_NV = mind.logits_NV[moving_BL[mind.open_BL]]
        step = Step(
            state.x_BLE[moving_BL], state.sigma_BL[moving_BL], target_BL[moving_BL], logits_NV, self.table_VE,
            self.draws(moving_BL),
        )  # fmt: skip
        true_NE = self.table_VE[self.true_BL[moving_BL]]
        moved_NE = towards(step, true_NE, 1.0)
        before_NE = torch.where(step.sigma_N.isinf()[:, None], 0.0, step.x_NE / step.sigma_N[:, None] ** 2)
        gained_NE = (moved_NE / step.target_N[:, None] ** 2 - before_NE).double()
        ratio_NV = logits_NV.double().log_softmax(-1) + gained_NE @ self.table_VE.double().T
        cost_N = (gained_NE * true_NE).sum(-1) - ratio_NV.logsumexp(-1)
        self.moved_B.index_add_(0, moving_BL.nonzero()[:, 0], cost_N)
        state.x_BLE[moving_BL], state.sigma_BL[moving_BL] = moved_NE, step.target_N

    def finish(self, finishing_BL: Tensor, mind: Mind) -> None:
        """Write the true tokens, at the price of their cross-entropy."""
        state, true_N = self.state, self.true_BL[finishing_BL]
        if not finishing_BL.any():
            return
        log_NV = mind.logits_NV[finishing_BL[mind.open_BL]].double().log_softmax(-1)
        cost_N = -log_NV.gather(1, true_N[:, None]).squeeze(1)
        self.finished_B.index_add_(0, finishing_BL.nonzero()[:, 0], cost_N)
        state.ids_BL[finishing_BL], state.x_BLE[finishing_BL] = true_N, self.table_VE[true_N]
        state.sigma_BL[finishing_BL] = 0

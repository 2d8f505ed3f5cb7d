"""The price of a path in a finite number of steps: generation itself walks it, and is told the true tokens.

Works for every path, adaptive ones included, since what is priced is exactly what generation does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scorelm.device import send
from scorelm.evaluation.likelihood import Priced
from scorelm.evaluation.rows import RowBatch
from scorelm.model.prediction import places_of
from scorelm.sampling.loop import Loop
from scorelm.sampling.request import Settings
from scorelm.sampling.solvers import Step, towards
from scorelm.sampling.state import State


@torch.inference_mode()
def walk(loop: Loop, batch: RowBatch, settings: Settings, seed: int) -> Priced:
    """Bound on each row's NLL under the sampler that `settings` describe, with the solver `posterior`.

    A step from evidence y to y' has the density ``sum_w p(w | y) q(y' | y, w)`` in the sampler and ``q(y' | y, e)``
    in the forward process of the true token e, ``y' - y ~ N(dtau e, dtau I)``; with embeddings of one norm their log
    ratio is ``<y' - y, e> - log sum_w p(w | y) exp <y' - y, e_w>``. Its sum over steps and positions, and
    ``-log p(e | y)`` where a position finishes, are the evidence lower bound with the trajectory as the latent
    variable (docs/theory.md). In the limit of small steps it is the integral of `scorelm.evaluation.likelihood.bound`.

    Except on blocks of one position it is known how long rows are and whether they end, so that no ``</s>`` is written,
    not even in a row that goes on.
    """
    closed = settings.path.block != 1
    told = Told(batch.ids_BL)
    job = loop.join(batch.templates(closed), batch.seeds(seed, 0), settings, told)
    job.state.rows.closed_B.fill_(closed)
    while not job.finished:
        loop.step()
    terms = {"reconstruction": told.finished_B, "diffusion": told.moved_B}
    return Priced(terms, job.state.nfe_B.float())


class Told:
    """The transition of a price: true tokens stand for the drawn ones, at what it would have cost to draw them."""

    def __init__(self, ids_BL: Tensor) -> None:
        self.ids_BL = ids_BL
        self.moved_B = torch.zeros(len(ids_BL), dtype=torch.float64, device=ids_BL.device)
        self.finished_B = torch.zeros_like(self.moved_B)

    def move(self, step: Step, moving_BL: Tensor) -> Tensor:
        """Take positions to a level above 0 by the evidence that their true tokens give."""
        true_NE = step.table_VE[self.ids_BL.flatten()[places_of(moving_BL, self.ids_BL.device)]]
        moved_NE = towards(step, true_NE, 1.0)
        before_NE = torch.where(step.sigma_N.isinf()[:, None], 0.0, step.x_NE / step.sigma_N[:, None] ** 2)
        gained_NE = (moved_NE / step.target_N[:, None] ** 2 - before_NE).double()
        ratio_NV = step.logits_NV.double().log_softmax(-1) + gained_NE @ step.table_VE.double().T
        cost_N = (gained_NE * true_NE).sum(-1) - ratio_NV.logsumexp(-1)
        self.moved_B.index_add_(0, send(moving_BL.nonzero()[:, 0], cost_N.device), cost_N)
        return moved_NE

    def write(self, logits_NV: Tensor, finishing_BL: Tensor, state: State) -> Tensor:
        """The true tokens, at the price of their cross-entropy."""
        true_N = self.ids_BL.flatten()[places_of(finishing_BL, self.ids_BL.device)]
        cost_N = -logits_NV.double().log_softmax(-1).gather(1, true_N[:, None]).squeeze(1)
        self.finished_B.index_add_(0, send(finishing_BL.nonzero()[:, 0], cost_N.device), cost_N)
        return true_N

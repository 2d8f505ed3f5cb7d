"""Small things that tests of generation share: records of a request, a whole step of a solver, a model read by hand."""

import math
from contextlib import contextmanager

import torch

from scorelm.config.generation import Infilling
from scorelm.model.layout import CLEAN, NOISY, Layout
from scorelm.sampling.loop import generate
from scorelm.sampling.request import Settings
from scorelm.sampling.solvers import far_end

from ..conftest import SPECIAL

INF = math.inf
BOS, EOS, PAD, UNK = SPECIAL
NEVER = torch.tensor(SPECIAL)
"""What no position of a closed row may write."""
PATHS = [
    "uniform", "ramp:0.5", "ramp:1e6", "blocks:1", "blocks:3", "blocks:100", "shuffled", "confidence", "entropy",
    "surest", "bounded",
]  # fmt: skip


def records(lm, templates, seeds=None, window=0, **options):
    """Records of every step of a request; seeds count from 0 unless they are given."""
    seeds = range(len(templates)) if seeds is None else seeds
    settings = Settings.of(Infilling.of(**({"path": "uniform", "temperature": 1, "top_p": 1} | options)), window=window)
    return list(generate(lm.loop(), templates, seeds, settings))


def whole_step(solver, step, posterior):
    """The new x of a step, with its look at the far end; ``posterior(x_NE, sigma_N)`` are logits there."""
    moved_NE = solver.move(step)
    if solver.correct is None:
        return moved_NE
    inner_N, x_NE, sigma_N = far_end(step, moved_NE)
    return solver.correct(step, moved_NE, posterior(x_NE, sigma_N)) if inner_N.any() else moved_NE


def judged(lm, ids, sigma, cond=None, block=None, finished=()):
    """Logits [L, V] of one row by the denoiser itself, in float64, without tokens that are never written.

    Args:
        lm: a score model.
        ids: of the row.
        sigma: a level for each position; there are logits where it is above 0.
        cond: the estimate that is fed back, [1, L, E].
        block: of each position, by the number of its first one; all in one block after ``<s>`` unless given.
        finished: blocks that later ones see.
    """
    place = torch.arange(len(ids))[None]
    block = (place > 0).long() if block is None else torch.tensor([block])
    clean = torch.isin(block, torch.tensor([0, *finished]))
    block = torch.where(clean & (block > 0), place + 1, block)
    layout = Layout(place * 0 + 1, place, block, torch.where(clean, CLEAN, NOISY))
    with torch.no_grad():
        found = lm.denoiser.predict(lm.denoiser.embedding(torch.tensor([ids])), torch.tensor([sigma]), layout, cond)
        logits = found.spread(found.logits_NV, -INF)[0].double()
    logits[:, NEVER] = -INF
    return logits


def entropy(logits_NV):
    """Nats of the distributions that logits stand for."""
    return torch.special.entr(logits_NV.softmax(-1)).sum(-1)


def free(template):
    """Columns of a template that are to be written."""
    return [column for column, token in enumerate(template) if token is None]


@contextmanager
def raised_prior(lm, token, by):
    """A model to which a token is likelier, or with a negative number less likely."""
    prior = lm.denoiser.prior.detach().clone()
    with torch.no_grad():
        lm.denoiser.prior[token] += by
    try:
        yield lm
    finally:
        with torch.no_grad():
            lm.denoiser.prior.copy_(prior)

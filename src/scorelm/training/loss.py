"""The training objective: cross-entropy of the posterior over tokens at per-position noise levels.

Cross-entropy trains score interpolation (CDCD, arXiv 2211.15089, section 3.2); two optional terms are functions of
their own. Everything random comes from one generator per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.config import NoiseConfig, TrainingConfig
from scorelm.model.attention import CLEAN, NOISY, Layout, twice
from scorelm.model.denoiser import Denoiser, Places, in_chunks, rows
from scorelm.noise.levels import document_blocks, draw_levels, given_spans, runs
from scorelm.noise.schedule import Schedule
from scorelm.text.tokenizer import BOS, EOS


class Batch(NamedTuple):
    """Packed rows: three integer tensors [B, L] on the CPU."""

    ids: Tensor
    segment: Tensor
    position: Tensor


class Draw(NamedTuple):
    """A batch with its noise levels drawn: tensors [B, S], S = L with one stream and 2 L with two."""

    ids_BS: Tensor
    sigma_BS: Tensor
    shared_BS: Tensor
    layout: Layout
    weight_BS: Tensor | None = None
    """Weights of the cross-entropies, where they differ."""
    eps_BSE: Tensor | None = None
    """Standard normal noise for the forward process."""
    places: Places | None = None
    """Where positions of each kind are, once the draw is where it is computed."""

    def with_noise(self, size: int, rng: torch.Generator) -> Draw:
        """The draw with its noise, for embeddings of that size."""
        return self._replace(eps_BSE=torch.randn(*self.sigma_BS.shape, size, generator=rng))

    def map(self, change: Callable[[Tensor], Tensor]) -> Draw:
        """The draw with each of its tensors changed."""
        weight, eps = (None if t is None else change(t) for t in (self.weight_BS, self.eps_BSE))
        layout = self.layout.map(change)
        return Draw(change(self.ids_BS), change(self.sigma_BS), change(self.shared_BS), layout, weight, eps)

    @property
    def live(self) -> int:
        """Positions that the loss is computed at."""
        return int(((self.sigma_BS > 0) & (self.layout.segment_BL > 0)).sum())

    @property
    def noisy(self) -> int:
        """Those of them that have some evidence."""
        return int(((self.sigma_BS > 0) & (self.sigma_BS < torch.inf) & (self.layout.segment_BL > 0)).sum())


class Outcome(NamedTuple):
    """What a batch gave: the loss to differentiate, and what is logged of its N live positions."""

    loss: Tensor
    cross_entropy_N: Tensor
    sigma_N: Tensor
    shared_N: Tensor
    correct_N: Tensor

    def on_host(self) -> Outcome:
        """Without gradients, on the CPU, which waits for the device."""
        return Outcome(*(t.detach().cpu() for t in self))


def draw_noise(batch: Batch, config: NoiseConfig, schedule: Schedule, rng: torch.Generator) -> Draw:
    """Draw blocks, given tokens and noise levels for a batch; ``<s>`` is always given.

    With two streams every row stands twice, clean and noisy, so that a noisy block sees the clean blocks before it
    (block diffusion, arXiv 2503.09573). Where the whole document is one block, ``</s>`` is given half of the time,
    as it is in generation, where the length is known.
    """
    starts_BL = (batch.ids == BOS) & (batch.segment > 0)
    document = runs(batch.segment)
    sizes = torch.tensor(config.block_sizes if config.streams == 2 else (0,))
    size_N = sizes[torch.randint(len(sizes), (document.number,), generator=rng)]
    block_BL = document_blocks(batch.position, starts_BL, document, size_N)
    drawn = draw_levels(document, runs(batch.segment, block_BL), schedule, config.mixture, rng)
    closed_N = (size_N == 0) & (torch.rand(document.number, generator=rng) < 0.5)
    given_BL = given_spans(document, config.given, rng) & (size_N == 0)[document.index_BL]
    given_BL |= starts_BL | (closed_N[document.index_BL] & (batch.ids == EOS))
    sigma_BL = torch.where(given_BL, 0.0, drawn.sigma_BL)
    stream_BL = torch.where(starts_BL, CLEAN, NOISY)
    if config.streams == 1:
        layout = Layout(batch.segment, batch.position, block_BL, stream_BL)
        return Draw(batch.ids, sigma_BL, drawn.shared_BL, layout)
    layout = Layout.two_streams(batch.segment, batch.position, block_BL)
    clean_BL = torch.zeros_like(sigma_BL)
    return Draw(twice(batch.ids), torch.cat([clean_BL, sigma_BL], 1), twice(drawn.shared_BL), layout)


def add_noise(e_BSE: Tensor, sigma_BS: Tensor, eps_BSE: Tensor) -> Tensor:
    """The forward process ``x = e + sigma eps``; 0 where sigma is inf, where x says nothing."""
    finite_BS1 = torch.isfinite(sigma_BS)[..., None]
    scale_BS1 = torch.where(finite_BS1, sigma_BS[..., None], 0.0)
    return torch.where(finite_BS1, e_BSE + scale_BS1 * eps_BSE, 0.0)


def score_loss(
    denoiser: Denoiser,
    draw: Draw,
    schedule: Schedule,
    config: TrainingConfig,
    *,
    live: int,
    self_conditioned: bool = False,
) -> Outcome:
    """Loss of a drawn batch, summed over its live positions and divided by `live`.

    Args:
        denoiser: the model.
        draw: tokens, noise levels, noise and layout, on the model's device.
        schedule: that the levels were drawn through.
        config: weights of the optional terms.
        live: the number to divide by: live positions of all batches of the step.
        self_conditioned: take a first pass without gradient and feed its estimate back (arXiv 2208.04202).
    """
    places = draw.places or Places.of(draw.sigma_BS, draw.layout)
    table_VE, e_BSE = denoiser.embedding.table(), denoiser.embedding(draw.ids_BS)
    assert draw.eps_BSE is not None
    x_BSE = add_noise(e_BSE, draw.sigma_BS, draw.eps_BSE)
    e_NE, x_NE = (rows(t_BSE.flatten(0, 1), places.live_N) for t_BSE in (e_BSE, x_BSE))
    ids_N, sigma_N, shared_N = (t.flatten()[places.live_N] for t in (draw.ids_BS, draw.sigma_BS, draw.shared_BS))
    weight_N = torch.ones_like(sigma_N) if draw.weight_BS is None else draw.weight_BS.flatten()[places.live_N]
    vocabulary = len(denoiser.prior)
    self_cond_BSE = torch.zeros_like(x_BSE)  # without a first pass too, so that every weight is part of every step
    if self_conditioned:
        with torch.no_grad():
            h_ND = denoiser.hidden(x_BSE, draw.sigma_BS, draw.layout, places, table_VE, None, draw.ids_BS)
            x0_NE = in_chunks(
                lambda h_ND, x_NE, sigma_N: denoiser.estimate(denoiser.read_out(h_ND, x_NE, sigma_N, table_VE)[0]),
                vocabulary, h_ND, x_NE, sigma_N,
            )  # fmt: skip
            self_cond_BSE.flatten(0, 1).index_copy_(0, places.live_N, x0_NE)
    h_ND = denoiser.hidden(x_BSE, draw.sigma_BS, draw.layout, places, table_VE, self_cond_BSE, draw.ids_BS)
    terms = loss_terms(denoiser, table_VE, schedule, config)
    terms_N3 = in_chunks(terms, vocabulary, h_ND, x_NE, sigma_N, e_NE, ids_N, weight_N)
    loss_N, cross_entropy_N, correct_N = terms_N3.unbind(1)
    return Outcome(loss_N.sum() / max(live, 1), cross_entropy_N.detach(), sigma_N, shared_N, correct_N.detach() > 0)


def loss_terms(
    denoiser: Denoiser, table_VE: Tensor, schedule: Schedule, config: TrainingConfig
) -> Callable[..., Tensor]:
    """What the loss asks of N live positions: loss, cross-entropy, and 1 where the likeliest token is right, [N, 3]."""

    def terms(h_ND: Tensor, x_NE: Tensor, sigma_N: Tensor, e_NE: Tensor, ids_N: Tensor, weight_N: Tensor) -> Tensor:
        logits_NV, context_free_NV = denoiser.read_out(h_ND, x_NE, sigma_N, table_VE)
        cross_entropy_N = F.cross_entropy(logits_NV, ids_N, reduction="none") * weight_N
        loss_N = cross_entropy_N
        if config.likelihood_weight:
            x0_NE = denoiser.estimate(logits_NV)
            loss_N = loss_N + config.likelihood_weight * likelihood_term(e_NE, x0_NE, sigma_N, schedule)
        if config.z_loss:
            loss_N = loss_N + config.z_loss * z_term(logits_NV, context_free_NV)
        return torch.stack([loss_N, cross_entropy_N, (logits_NV.argmax(-1) == ids_N).float()], 1)

    return terms


def likelihood_term(e_NE: Tensor, x0_NE: Tensor, sigma_N: Tensor, schedule: Schedule) -> Tensor:
    """Integrand of the variational bound at a level drawn through the schedule, nats per position [N].

    ``sigma^-3 |e - x0|^2 dsigma/du`` (VDM, arXiv 2107.00630, eq. 15, in variance-exploding form; RePlaid,
    arXiv 2605.18530): its mean over u in [0, 1] is the diffusion term of the bound. 0 where sigma is inf, and at the
    ends of the schedule, which are levels that a ramp or a spread was clipped to.
    """
    inside_N = (sigma_N > schedule.sigma_min) & (sigma_N < schedule.sigma_max)
    level_N = torch.where(inside_N, sigma_N, schedule.sigma_max)
    weight_N = level_N**-3 * schedule.derivative(schedule.u(level_N))
    return torch.where(inside_N, weight_N * (e_NE - x0_NE).pow(2).sum(-1), 0.0)


def z_term(logits_NV: Tensor, context_free_NV: Tensor) -> Tensor:
    """Squared log-partition function of the Bayesian update, [N]: z-loss (PaLM, arXiv 2204.02311, section 5).

    The evidence has a large partition function by right, so the drift that is held back is the context's alone.
    """
    return (logits_NV.logsumexp(-1) - context_free_NV.logsumexp(-1)) ** 2

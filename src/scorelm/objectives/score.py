"""Score diffusion: cross-entropy of the posterior over tokens at per-position noise levels.

Cross-entropy trains score interpolation (CDCD, arXiv 2211.15089, section 3.2); two optional terms are functions of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.config.recipe import NoiseConfig, ObjectiveName, TrainingConfig
from scorelm.device import constant
from scorelm.model.denoiser import Denoiser, Places
from scorelm.model.kernels import different_rows
from scorelm.model.layout import CLEAN, NOISY, Layout, number_blocks, token_by_token, twice
from scorelm.model.prediction import Prediction
from scorelm.noise.forward import add_noise
from scorelm.noise.levels import Uniform, draw_levels, given_spans, runs
from scorelm.noise.schedule import Schedule
from scorelm.objectives.objective import Batch, Draw, Objective, Outcome
from scorelm.sampling.evaluator import Cached, Dense, Evaluator, Network
from scorelm.sampling.paths import Path
from scorelm.sampling.request import Settings
from scorelm.text.tokenizer import Special


class Score(Objective):
    """The score of noisy embeddings, at every combination of levels."""

    name: ClassVar[ObjectiveName] = "score"
    title: ClassVar[str] = "A score-based diffusion"
    priced_path: ClassVar[str] = "uniform"
    tables: ClassVar[int] = 15
    self_conditions: ClassVar[bool] = True
    watched: ClassVar[tuple[str, ...]] = ("ordered", "random", "uniform", "bounded")
    shown_prices: ClassVar[tuple[tuple[str, int | None], ...]] = (
        ("uniform", None), ("ramp:1", None), ("blocks:4", None), ("ordered", None), ("random", None),
        ("uniform", 64), ("confidence", 64), ("bounded", 64),
    )  # fmt: skip
    shown_paths: ClassVar[tuple[str, ...]] = ("uniform", "ramp:1", "blocks:4", "shuffled", "confidence", "bounded")
    sampled_paths: ClassVar[tuple[str, ...]] = ("blocks:1", *shown_paths)

    def asks_next(self, config: NoiseConfig) -> bool:
        """Those of clean copies are."""
        return config.streams == 2 and any(config.block_sizes)

    def copies(self, config: NoiseConfig) -> int:
        """One in each stream."""
        return config.streams

    def draw(self, batch: Batch, config: NoiseConfig, schedule: Schedule, special: Special, random_TBS: Tensor) -> Draw:
        """Draw blocks, given tokens and noise levels for a batch; ``<s>`` is always given.

        With two streams every row stands twice, clean and noisy, so that a noisy block sees the clean tokens before it
        (block diffusion, arXiv 2503.09573). A clean token sees itself and those before it, so it is asked for the next
        one; hidden ones are asked for themselves.
        A document that is drawn whole (block size 0) has no use for a clean copy: both copies are noisy, each at levels
        of its own. There ``</s>`` is given half of the time, as it is in generation, where the length is known.
        """
        length, streams = batch.ids.shape[1], config.streams
        ids_BS, segment_BS, position_BS = (t_BL.repeat(1, streams) for t_BL in batch)
        copy_BS = (torch.arange(streams * length, device=ids_BS.device) // length).expand_as(ids_BS)
        document, uniform = runs(segment_BS, copy_BS), Uniform(random_TBS, streams)
        starts_BS = (ids_BS == special.bos) & (segment_BS > 0)
        sizes = constant(config.block_sizes if streams == 2 else (0,), ids_BS)
        of_copies_BS = uniform.table()[:, :length].repeat(1, streams)  # which are cut into the same blocks
        size_BS = sizes[(document.take(of_copies_BS) * len(sizes)).long()]
        block_BS = number_blocks(position_BS, document.having(starts_BS).long(), size_BS)
        stream_BS = copy_BS if streams == 2 else torch.where(block_BS == 0, CLEAN, NOISY)
        clean_BS = (stream_BS == CLEAN) & (size_BS > 0)
        block_BS = torch.where(clean_BS, token_by_token(position_BS, block_BS), block_BS)
        layout = Layout(segment_BS, position_BS, block_BS, stream_BS)
        block = runs(*layout.marks)
        used_BS = (segment_BS > 0) & ~starts_BS & ~clean_BS
        drawn = draw_levels(document, block, schedule, config.mixture, uniform, used_BS)
        closed_BS = (uniform.each(document) < 0.5) & (ids_BS == special.eos)
        given_BS = (given_spans(document, config.given, uniform) | closed_BS) & (size_BS == 0)
        sigma_BS = torch.where(given_BS | starts_BS | clean_BS, 0.0, drawn.sigma_BL)
        end_BS = document.offset_BL == document.length_BL - 1
        asks_next_BS = clean_BS & ~end_BS & (segment_BS > 0)
        if config.hidden:
            hidden_BS = clean_BS & ~starts_BS & (uniform.table() < config.hidden * uniform.each(document))
            sigma_BS, asks_next_BS = torch.where(hidden_BS, torch.inf, sigma_BS), asks_next_BS & ~hidden_BS
        return Draw(ids_BS, sigma_BS, drawn.shared_BL & ~clean_BS, layout, asks_next_BS=asks_next_BS)

    def loss(
        self,
        denoiser: Denoiser,
        draw: Draw,
        schedule: Schedule,
        config: TrainingConfig,
        *,
        live: Tensor,
        special: Special,
        self_conditioned: bool = False,
    ) -> Outcome:
        """Cross-entropy at every open position, and the optional terms."""
        places = draw.places or Places.of(draw.sigma_BS, draw.layout, draw.asks_next_BS)
        table_VE, e_BSE = denoiser.embedding.table(), denoiser.embedding(draw.ids_BS)
        assert draw.eps_BSE is not None
        x_BSE = add_noise(e_BSE, draw.sigma_BS, draw.eps_BSE)
        open_N, own_N = (t.flatten()[places.open_N] for t in (draw.open_BS, draw.sigma_BS > 0))

        def predict(self_cond_BSE: Tensor | None) -> Prediction:
            return denoiser.predict(
                x_BSE, draw.sigma_BS, draw.layout, self_cond_BSE, draw.ids_BS, table_VE, places, draw.asks_next_BS
            )  # fmt: skip

        self_cond_BSE = torch.zeros_like(x_BSE)  # without a first pass too, so that every weight is part of every step
        if self_conditioned:
            with torch.no_grad():
                x0_NE = predict(None).in_chunks(lambda seen: seen.x0_NE) * (open_N & own_N)[:, None]
                self_cond_BSE.flatten(0, 1).index_copy_(0, places.open_N, x0_NE)
        e_NE = different_rows(e_BSE.flatten(0, 1), places.open_N)
        ids_N, sigma_N, shared_N = (t.flatten()[places.open_N] for t in (draw.target_BS, draw.level_BS, draw.shared_BS))
        weight_N = open_N.float() if draw.weight_BS is None else draw.weight_BS.flatten()[places.open_N]
        terms = loss_terms(schedule, config)
        terms_N3 = predict(self_cond_BSE).in_chunks(terms, sigma_N, e_NE, ids_N, weight_N)
        loss_N, cross_entropy_N, correct_N = terms_N3.unbind(1)
        loss = (loss_N * open_N).sum() / live.clamp(min=1)
        return Outcome(loss, open_N, cross_entropy_N.detach(), sigma_N, shared_N, correct_N.detach() > 0)

    def evaluator(self, network: Network, window: int | None) -> Evaluator:
        """Whole rows, or on blocks what is new behind the keys and values of what is finished."""
        return Dense(network) if window is None else Cached(network, window, network.noisy)

    def next_tokens(
        self,
        denoiser: Denoiser,
        ids_BL: Tensor,
        real_BL: Tensor,
        position_BL: Tensor,
        open_BL: Tensor,
        special: Special,
    ) -> Prediction:
        """Told by the token before, or of a model that has not learned that, in two streams in blocks of one token."""
        block_BL = number_blocks(position_BL, (ids_BL[:, :1] == special.bos).long(), 1)
        if denoiser.tells_next_token:
            return told(denoiser, ids_BL, real_BL, position_BL, block_BL, open_BL)
        layout = Layout.two_streams(real_BL, position_BL, block_BL)
        e_BLE = denoiser.embedding(ids_BL)
        x_BSE = torch.cat([e_BLE, torch.where(open_BL[..., None], 0.0, e_BLE)], 1)
        sigma_BL = torch.where(open_BL, torch.inf, 0.0)
        return denoiser.predict(
            x_BSE, torch.cat([torch.zeros_like(sigma_BL), sigma_BL], 1), layout, ids_BL=twice(ids_BL)
        )

    def allows(self, settings: Settings) -> Settings:
        """Everything."""
        return settings

    def allows_infilling(self, settings: Settings) -> None:
        """Everything."""

    def allows_price(self, name: str, path: Path | None) -> None:
        """Every path and order."""


def told(
    denoiser: Denoiser, ids_BL: Tensor, real_BL: Tensor, position_BL: Tensor, block_BL: Tensor, open_BL: Tensor
) -> Prediction:
    """The posterior over open tokens as those before them tell it, in one clean copy.

    A row's first token has none before it: what is said of it is what is said of a position that sees nothing, which is
    put in front of the row.
    """

    def put(t_BL: Tensor, value: float = 0) -> Tensor:
        return F.pad(t_BL, (1, 0), value=value)

    segment_BS = torch.cat([open_BL[:, :1].long(), real_BL], 1)
    layout = Layout(segment_BS, put(position_BL), put(block_BL, 1), put(torch.full_like(ids_BL, CLEAN), NOISY))
    ids_BS, sigma_BS = put(ids_BL), put(torch.zeros(ids_BL.shape, device=ids_BL.device), torch.inf)
    asks_next_BS = F.pad(open_BL[:, 1:], (1, 1))
    seen = denoiser.predict(denoiser.embedding(ids_BS), sigma_BS, layout, None, ids_BS, asks_next_BL=asks_next_BS)
    return replace(seen, open_BL=open_BL)


def loss_terms(schedule: Schedule, config: TrainingConfig) -> Callable[..., Tensor]:
    """What the loss asks of N open positions: loss, cross-entropy, and 1 where the likeliest token is right, [N, 3]."""

    def terms(seen: Prediction, sigma_N: Tensor, e_NE: Tensor, ids_N: Tensor, weight_N: Tensor) -> Tensor:
        cross_entropy_N = F.cross_entropy(seen.logits_NV, ids_N, reduction="none") * weight_N
        loss_N = cross_entropy_N
        if config.likelihood_weight:
            loss_N = loss_N + config.likelihood_weight * likelihood_term(e_NE, seen.x0_NE, sigma_N, schedule)
        if config.z_loss:
            loss_N = loss_N + config.z_loss * z_term(seen.logits_NV, seen.context_free_NV)
        return torch.stack([loss_N, cross_entropy_N, (seen.ids_N == ids_N).float()], 1)

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

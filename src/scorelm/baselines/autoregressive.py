"""An autoregressive model in the denoiser's own trunk: next-token cross-entropy under a causal mask.

Position i reads the token before it and gives the posterior over its own, so logits stand where the denoiser's do.
Generation is the path of one-token blocks with every key and value computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.config import NoiseConfig, TrainingConfig
from scorelm.model.attention import Layout
from scorelm.model.denoiser import Denoiser, Places, in_chunks, rows
from scorelm.noise.schedule import Schedule
from scorelm.sampling.generate import Sampler
from scorelm.sampling.options import Options
from scorelm.text.conditioning import Template
from scorelm.text.tokenizer import BOS
from scorelm.training.loss import Batch, Draw, Outcome


def draw_targets(batch: Batch, config: NoiseConfig, schedule: Schedule, rng: torch.Generator) -> Draw:
    """Every real token but ``<s>`` is a target (sigma inf); the noise options mean nothing here."""
    target_BL = (batch.segment > 0) & (batch.ids != BOS)
    sigma_BL = torch.where(target_BL, torch.inf, 0.0)
    return Draw(batch.ids, sigma_BL, torch.zeros_like(target_BL), Layout.causal(batch.segment, batch.position))


def previous(ids_BL: Tensor, position_BL: Tensor) -> Tensor:
    """The token before each position of its document; ``<s>`` stands before the first."""
    return torch.where(position_BL == 0, BOS, ids_BL.roll(1, dims=1))


def hidden(denoiser: Denoiser, previous_BL: Tensor, layout: Layout) -> Tensor:
    """The trunk's output for the tokens before every position, [B, L, D]."""
    h_BLD = denoiser.token_in[previous_BL].float()
    result_BLD: Tensor = denoiser.trunk(h_BLD, torch.zeros(previous_BL.shape, device=h_BLD.device), layout)
    return result_BLD


def next_token(denoiser: Denoiser, h_ND: Tensor) -> Tensor:
    """Logits over the token at each position from the trunk's output there, [N, V] in fp32."""
    logits_NV: Tensor = denoiser.context(h_ND).float() + denoiser.prior
    return logits_NV


def next_token_loss(
    denoiser: Denoiser,
    draw: Draw,
    schedule: Schedule,
    config: TrainingConfig,
    *,
    live: int,
    self_conditioned: bool = False,
) -> Outcome:
    """Cross-entropy of every target given the tokens before it, summed and divided by `live`."""
    places = draw.places or Places.of(draw.sigma_BS, draw.layout)
    h_BLD = hidden(denoiser, previous(draw.ids_BS, draw.layout.position_BL), draw.layout)
    ids_N, sigma_N, shared_N = (t.flatten()[places.live_N] for t in (draw.ids_BS, draw.sigma_BS, draw.shared_BS))

    def terms(h_ND: Tensor, ids_N: Tensor) -> Tensor:
        logits_NV = next_token(denoiser, h_ND)
        cross_entropy_N = F.cross_entropy(logits_NV, ids_N, reduction="none")
        return torch.stack([cross_entropy_N, (logits_NV.argmax(-1) == ids_N).float()], 1)

    h_ND = rows(h_BLD.flatten(0, 1), places.live_N)
    cross_entropy_N, correct_N = in_chunks(terms, len(denoiser.prior), h_ND, ids_N).unbind(1)
    loss = cross_entropy_N.sum() / max(live, 1)
    return Outcome(loss, cross_entropy_N.detach(), sigma_N, shared_N, correct_N.detach() > 0)


class AutoregressiveSampler(Sampler):
    """`Sampler` on the path ``blocks:1`` for a model of this kind: only the evaluation differs, one for each token."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        templates: Sequence[Template],
        seeds: Sequence[int],
        options: Options,
    ) -> None:
        super().__init__(denoiser, schedule, templates, seeds, replace(options, steps=1))

    def once_cached(self, x_BLE: Tensor, sigma_BL: Tensor, reach_BL: Tensor, x0_BLE: Tensor) -> Tensor:
        """Logits of the next position of each row, from the positions whose keys and values are not held yet."""
        assert self.cache is not None
        row_R, column_RW = self.cache.place(reach_BL)
        real_RW, row_RW, at_RW = column_RW >= 0, row_R[:, None], column_RW.clamp(min=0)
        past = self.cache.past(row_R, self.layout, column_RW.amax(1))
        layout = replace(Layout.causal(real_RW.long(), self.layout.position_BL[row_RW, at_RW]), past=past)
        ids_RW = previous(self.state.ids_BL, self.layout.position_BL)[row_RW, at_RW]
        live_RW, closed_RW = real_RW & (sigma_BL[row_RW, at_RW] > 0), self.closed_B[row_RW].expand_as(at_RW)
        with self.autocast:
            logits_NV = next_token(self.denoiser, hidden(self.denoiser, ids_RW, layout)[live_RW])
        self.cache.keep(past, row_R, column_RW, real_RW)
        return self.ruled_out(logits_NV, closed_RW[live_RW])

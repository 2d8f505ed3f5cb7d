"""Masked (absorbing-state) diffusion: the objective of MDLM (arXiv 2406.07524) for the same denoiser.

A masked token is a position without evidence (sigma inf), so the denoiser reads a mask as the prior's soft token, and
the sampler is the path `shuffled` with the solver `posterior`: tokens are drawn in random order.
"""

from __future__ import annotations

import torch

from scorelm.config import NoiseConfig
from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.noise.levels import GOLDEN, runs
from scorelm.noise.schedule import Schedule
from scorelm.text.tokenizer import BOS, EOS
from scorelm.training.loss import Batch, Draw

LEAST = 1e-3
"""Smallest share of a document that is masked on average; it bounds the weights."""


def draw_masks(batch: Batch, config: NoiseConfig, schedule: Schedule, rng: torch.Generator) -> Draw:
    """Mask every position of a document with probability t, t uniform and low-discrepancy over documents.

    The weights 1 / t make the mean of the weighted cross-entropies the bound of MDLM (eq. 10, with a linear
    schedule) in nats per token that is not given. ``<s>`` is always given, and ``</s>`` half of the time, as it is in
    generation; noise options other than the seed mean nothing here.
    """
    starts_BL = (batch.ids == BOS) & (batch.segment > 0)
    document = runs(batch.segment)
    offset = torch.rand((), dtype=torch.float64, generator=rng)
    t_N = LEAST + (1 - LEAST) * ((offset + GOLDEN * torch.arange(document.number)) % 1)
    t_BL = t_N[document.index_BL]
    closed_BL = (torch.rand(document.number, generator=rng) < 0.5)[document.index_BL]
    free_BL = (batch.segment > 0) & ~starts_BL & ~(closed_BL & (batch.ids == EOS))
    masked_BL = free_BL & (torch.rand(t_BL.shape, dtype=torch.float64, generator=rng) < t_BL)
    layout = Layout(
        batch.segment, batch.position, (~starts_BL).long(), torch.where(starts_BL, CLEAN, NOISY)
    )  # fmt: skip
    weight_BL = torch.where(masked_BL, masked_BL.sum() / (t_BL * free_BL.sum()), 0.0)
    sigma_BL = torch.where(masked_BL, torch.inf, 0.0)
    return Draw(batch.ids, sigma_BL, torch.zeros_like(masked_BL), layout, weight_BL.float())

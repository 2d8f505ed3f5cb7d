"""Likelihoods in nats: the variational bound along a path that is fixed in advance, and exact ordered NLL.

The bound is that of VDM (arXiv 2107.00630) and Plaid (arXiv 2305.18619) in variance-exploding form, generalised from
one shared level to a level for every position (docs/theory.md). Cross-entropy at random noise is not a likelihood.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.baselines.autoregressive import hidden, next_token, previous
from scorelm.evaluation.rows import Batch
from scorelm.model.attention import CLEAN, NOISY, Layout, twice
from scorelm.model.denoiser import Denoiser, Posterior
from scorelm.noise.levels import ramp
from scorelm.noise.plan import Path, free_place
from scorelm.noise.schedule import Schedule
from scorelm.text.tokenizer import BOS, EOS, PAD

PLASTIC = 0.7548776662466927
"""Inverse of the plastic number: with the golden ratio's it spreads pairs evenly (rows and blocks here)."""


class Priced(NamedTuple):
    """What the rows of a batch cost, by term, and what was integrated."""

    terms: dict[str, Tensor]
    """Nats of each row, [B] float64."""
    evaluations: Tensor
    """Of the model that each row took part in, [B]."""
    integrand: Tensor | None = None
    """[2, N] float64: u of the draws, and the integrand over u in nats."""


def posterior(denoiser: Denoiser, x_BSE: Tensor, sigma_BS: Tensor, layout: Layout, passes: int) -> Posterior:
    """The posterior at live positions; every pass after the first is fed the estimate of the one before."""
    result = denoiser.live(x_BSE, sigma_BS, layout)
    for _ in range(passes - 1):
        self_cond_BSE = torch.zeros_like(x_BSE)
        self_cond_BSE[result.live_BL] = denoiser.estimate(result.logits_NV)
        result = denoiser.live(x_BSE, sigma_BS, layout, self_cond_BSE)
    return result


def whole(batch: Batch) -> Layout:
    """Rows of one block; ``<s>`` is a clean block of its own."""
    starts_BL = batch.starts_BL
    return Layout(batch.real_BL, batch.position_BL, (~starts_BL).long(), torch.where(starts_BL, CLEAN, NOISY))


def in_blocks(batch: Batch, size: int) -> Layout:
    """Rows as two streams, in blocks of `size` positions after ``<s>``."""
    first_B1 = batch.starts_BL.any(1, keepdim=True).long()
    block_BL = torch.where(batch.starts_BL, 0, 1 + (batch.position_BL - first_B1) // size)
    return Layout.two_streams(batch.real_BL, batch.position_BL, block_BL)


class Noisy:
    """A batch that can be evaluated at any noise levels of its positions, alone or behind a clean copy.

    As in generation, ``<s>`` and ``<pad>`` are never written, nor a second ``</s>`` in a `closed` row.
    """

    def __init__(self, denoiser: Denoiser, batch: Batch, layout: Layout, passes: int, closed: bool) -> None:
        self.denoiser, self.layout, self.passes = denoiser, layout, passes
        self.closed_B = (batch.ids_BL == EOS).any(1) & closed
        self.two = layout.segment_BL.shape[1] == 2 * batch.ids_BL.shape[1]
        self.ids_BL, self.e_BLE = batch.ids_BL, denoiser.embedding(batch.ids_BL)

    def at(self, sigma_BL: Tensor, eps_BLE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and true ids [N] of the positions with sigma above 0, for noise `eps_BLE`."""
        x_BLE, finite_BL1 = self.e_BLE, sigma_BL.isfinite()[..., None]
        if eps_BLE is not None:
            x_BLE = x_BLE + torch.where(finite_BL1, sigma_BL[..., None], 0.0) * eps_BLE
        x_BSE, sigma_BS, ids_BS = torch.where(finite_BL1, x_BLE, 0.0), sigma_BL, self.ids_BL
        if self.two:
            x_BSE, ids_BS = torch.cat([self.e_BLE, x_BSE], 1), twice(ids_BS)
            sigma_BS = torch.cat([torch.zeros_like(sigma_BL), sigma_BL], 1)
        logits_NV, _, live_BS = posterior(self.denoiser, x_BSE, sigma_BS, self.layout, self.passes)
        logits_NV[:, [BOS, PAD]] = -torch.inf
        logits_NV[self.closed_B[live_BS.nonzero()[:, 0]], EOS] = -torch.inf
        return logits_NV, ids_BS[live_BS]

    def nats(self, sigma_BL: Tensor, eps_BLE: Tensor | None = None) -> Tensor:
        """Cross-entropies at the positions with sigma above 0, [N]."""
        return F.cross_entropy(*self.at(sigma_BL, eps_BLE), reduction="none")


def every(batch: Batch, evaluations: int) -> Tensor:
    """The same number of evaluations for each row."""
    return torch.full((len(batch.index),), float(evaluations))


def bound(
    denoiser: Denoiser, schedule: Schedule, batch: Batch, path: Path, draws: int, seed: int, passes: int
) -> Priced:
    """Variational bound on each row's NLL along `path` in the limit of small steps.

    ``CE(sigma_min) + Int sum_i sigma_i^-3 |e_i - x0_i|^2 dsigma_i + (E / 2) ln(1 + sigma_max^-2)`` for every priced
    position; the integral is taken over the path's time s with `draws` stratified points a row (or block). But on
    blocks of one position the row's length is known, so that ``</s>`` is given.

    Args:
        denoiser: the model.
        schedule: maps u to sigma.
        batch: rows.
        path: one with a `slope`.
        draws: points of the integral.
        seed: of the noise.
        passes: evaluations in one point, each fed the estimate of the one before.
    """
    assert path.slope is not None
    free_BL = batch.free(path.block != 1)
    layout = in_blocks(batch, path.block) if path.block else whole(batch)
    noisy, device = Noisy(denoiser, batch, layout, passes, path.block != 1), free_BL.device
    block_BL = layout.block_BL[:, -free_BL.shape[1] :].cpu()
    offset_BL = (batch.low_discrepancy(seed)[:, None] + PLASTIC * block_BL) % 1
    place_BL, size = free_place(free_BL.cpu()), noisy.e_BLE.shape[-1]
    diffusion_B, seen = torch.zeros(len(batch.index), dtype=torch.float64, device=device), []
    for draw in range(draws):
        u_BL = ramp((draw + offset_BL) / draws, place_BL, path.slope).to(device)
        sigma_BL = torch.where(u_BL >= 1, torch.inf, schedule.sigma(u_BL)).float()
        logits_NV, _ = noisy.at(torch.where(free_BL, sigma_BL, 0.0), batch.noise(size, seed, draw))
        error_N = (noisy.e_BLE[free_BL] - denoiser.estimate(logits_NV)).double().square().sum(-1)
        open_BL = free_BL & (u_BL > 0) & (u_BL < 1)
        u_N = u_BL[open_BL]
        value_N = schedule.sigma(u_N).pow(-3) * schedule.derivative(u_N) * error_N[open_BL[free_BL]]
        diffusion_B += batch.totals(value_N, open_BL) * (1 + path.slope) / draws
        seen.append(torch.stack([u_N, value_N]).cpu())
    last_N = noisy.nats(torch.where(free_BL, schedule.sigma_min, 0.0), batch.noise(size, seed, draws))
    prior_B = free_BL.sum(1).double() * size / 2 * math.log1p(schedule.sigma_max**-2)
    terms = {"reconstruction": batch.totals(last_N, free_BL), "diffusion": diffusion_B, "prior": prior_B}
    return Priced(terms, every(batch, passes * (draws + 1)), torch.cat(seen, 1))


def left_to_right(denoiser: Denoiser, batch: Batch) -> Priced:
    """Exact NLL of every token given those before it, in one two-stream evaluation; ``</s>`` ends the text."""
    free_BL = batch.free(closed=False)
    nats_N = Noisy(denoiser, batch, in_blocks(batch, 1), 1, False).nats(torch.where(free_BL, torch.inf, 0.0))
    return Priced({"reconstruction": batch.totals(nats_N, free_BL)}, every(batch, 1))


def autoregressive(denoiser: Denoiser, batch: Batch) -> Priced:
    """Exact NLL of an autoregressive model, in one evaluation."""
    free_BL = batch.free(closed=False)
    layout = Layout.causal(batch.real_BL, batch.position_BL)
    h_BLD = hidden(denoiser, previous(batch.ids_BL, batch.position_BL), layout)
    nats_N = F.cross_entropy(next_token(denoiser, h_BLD[free_BL]), batch.ids_BL[free_BL], reduction="none")
    return Priced({"reconstruction": batch.totals(nats_N, free_BL)}, every(batch, 1))


def right_to_left(denoiser: Denoiser, batch: Batch, passes: int) -> Priced:
    """Exact NLL of every token given those after it and the row's length, in an evaluation for each place."""
    free_BL = batch.free(closed=True)
    noisy, count_B1 = Noisy(denoiser, batch, whole(batch), passes, True), free_BL.sum(1, keepdim=True)
    rank_BL = count_B1 - free_BL.long().cumsum(1)
    total_B = torch.zeros(len(batch.index), dtype=torch.float64, device=free_BL.device)
    for place in range(int(count_B1.max())):
        open_BL = free_BL & (rank_BL >= place)
        now_BL = open_BL & (rank_BL == place)
        nats_N = noisy.nats(torch.where(open_BL, torch.inf, 0.0))
        total_B += batch.totals(nats_N[now_BL[open_BL]], now_BL)
    return Priced({"reconstruction": total_B}, passes * count_B1.squeeze(1).float().cpu())


def random_order(denoiser: Denoiser, batch: Batch, draws: int, seed: int, passes: int) -> Priced:
    """NLL averaged over all orders of a row's tokens, given its length: the bound of masked diffusion.

    With t of n tokens given at random, each of the others is as likely to be the next, so ``n`` times their mean
    cross-entropy estimates the sum over an order, without bias (arXiv 2110.02037, section 3); t is stratified.
    """
    free_BL = batch.free(closed=True)
    noisy = Noisy(denoiser, batch, whole(batch), passes, True)
    offset_B, count_B = batch.low_discrepancy(seed).to(free_BL.device), free_BL.sum(1)
    total_B = torch.zeros(len(batch.index), dtype=torch.float64, device=free_BL.device)
    for draw in range(draws):
        given_B = ((draw + offset_B) / draws * count_B).long()
        open_BL = free_BL & (batch.shuffled(free_BL, seed, draw) >= given_B[:, None])
        nats_N = noisy.nats(torch.where(open_BL, torch.inf, 0.0))
        total_B += batch.totals(nats_N, open_BL) * count_B / (count_B - given_B).clamp(min=1) / draws
    return Priced({"reconstruction": total_B}, every(batch, passes * draws))

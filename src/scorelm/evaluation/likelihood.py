"""Likelihoods in nats: the variational bound along a path that is fixed in advance, and NLL in an order.

The bound is that of VDM (arXiv 2107.00630) and Plaid (arXiv 2305.18619) in variance-exploding form, generalised from
one shared level to a level for every position (docs/theory.md). Cross-entropy at random noise is not a likelihood.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.device import send
from scorelm.evaluation.rows import RowBatch
from scorelm.model.denoiser import Places
from scorelm.model.layout import WHOLE, Layout, number_blocks, twice
from scorelm.model.prediction import Prediction, places_of
from scorelm.noise.forward import add_noise
from scorelm.noise.levels import free_place, ramp
from scorelm.noise.schedule import Schedule
from scorelm.objectives.objective import Objective
from scorelm.sampling.evaluator import Network, rule_out
from scorelm.sampling.paths import Path

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


class Noisy:
    """Rows that can be evaluated at any noise levels of their positions, alone or behind a clean copy.

    What is never written in generation has no probability here either: see `rule_out`.

    Args:
        network: that is asked.
        batch: the rows.
        block: positions in a block, each block behind a clean copy of those before it; 0 for rows of one block.
        passes: evaluations each time, each fed the estimate of the one before.
        closed: whether it is known how long rows are and whether they end, so that no ``</s>`` is to be predicted.
    """

    def __init__(self, network: Network, batch: RowBatch, block: int, passes: int, closed: bool) -> None:
        self.network, self.batch = network, batch
        self.passes, self.closed = passes, closed
        self.two = block > 0
        self.e_BLE = network.table_VE[batch.ids_BL]
        self.block_BL = number_blocks(batch.position_BL, batch.begins_B1, block)
        streams = Layout.two_streams if self.two else Layout.one_stream
        self.layout = streams(batch.real_BL, batch.position_BL, self.block_BL)
        self.layout_here = self.layout.map(lambda t_BL: t_BL.cpu())

    def at(self, sigma_BL: Tensor, eps_BLE: Tensor | None = None) -> Prediction:
        """The posterior at the positions with sigma above 0, for noise `eps_BLE` where it is finite.

        Levels are on the host, and so is the mask of the posterior.
        """
        device, open_BL, places = self.network.device, sigma_BL > 0, self._places(sigma_BL)
        sigma_BL = send(sigma_BL, device)
        x_BSE = add_noise(self.e_BLE, sigma_BL, torch.zeros_like(self.e_BLE) if eps_BLE is None else eps_BLE)
        sigma_BS, ids_BS = sigma_BL, self.batch.ids_BL
        if self.two:
            x_BSE, ids_BS = torch.cat([self.e_BLE, x_BSE], 1), twice(ids_BS)
            sigma_BS = torch.cat([torch.zeros_like(sigma_BL), sigma_BL], 1)
        table_VE, self_cond_BSE = self.network.table_VE, None
        with self.network.autocast:
            for left in range(self.passes, 0, -1):
                seen = self.network.denoiser.predict(
                    x_BSE, sigma_BS, self.layout, self_cond_BSE, ids_BS, table_VE, places
                )
                if left > 1:
                    nothing_PE = torch.zeros_like(x_BSE, dtype=seen.x0_NE.dtype).flatten(0, 1)
                    self_cond_BSE = nothing_PE.index_copy(0, places.open_N, seen.x0_NE).view_as(x_BSE)
            logits_NV = seen.logits_NV
        return Prediction.of(rule_out(logits_NV, self.closed, self.batch.special), open_BL, table_VE)

    def _places(self, sigma_BL: Tensor) -> Places:
        """Where positions of each kind are; the clean copies of two streams are given."""
        sigma_BS = torch.cat([torch.zeros_like(sigma_BL), sigma_BL], 1) if self.two else sigma_BL
        return Places.of(sigma_BS, self.layout_here).to(self.network.device)

    def nats(self, sigma_BL: Tensor, eps_BLE: Tensor | None = None) -> Tensor:
        """Cross-entropies at the positions with sigma above 0, [N]."""
        seen = self.at(sigma_BL, eps_BLE)
        return F.cross_entropy(seen.logits_NV, self.batch.ids_BL.flatten()[seen.places_N], reduction="none")


def every(batch: RowBatch, evaluations: int) -> Tensor:
    """The same number of evaluations for each row."""
    return torch.full((len(batch.index),), float(evaluations))


def bound(
    network: Network, schedule: Schedule, batch: RowBatch, path: Path, draws: int, seed: int, passes: int
) -> Priced:
    """Variational bound on each row's NLL along `path` in the limit of small steps.

    ``CE(sigma_min) + Int sum_i sigma_i^-3 |e_i - x0_i|^2 dsigma_i + (E / 2) ln(1 + sigma_max^-2)`` for every priced
    position; the integral is taken over the path's time s with `draws` stratified points a row (or block). Except on
    blocks of one position the row's length is known, so that ``</s>`` is given.

    Args:
        network: of a score model.
        schedule: maps u to sigma.
        batch: rows.
        path: one with a `slope`.
        draws: points of the integral.
        seed: of the noise.
        passes: evaluations in one point, each fed the estimate of the one before.
    """
    assert path.slope is not None
    closed = path.block != 1
    free_BL, noisy = batch.free(closed).cpu(), Noisy(network, batch, path.block, passes, closed)
    turn_BL = 1 + (noisy.block_BL - 1 - batch.begins_B1).cpu() // (path.block or WHOLE)
    offset_BL = (batch.low_discrepancy(seed)[:, None] + PLASTIC * turn_BL) % 1
    place_BL, size, device = free_place(free_BL), noisy.e_BLE.shape[-1], network.device
    diffusion_B, seen = torch.zeros(len(batch.index), dtype=torch.float64, device=device), []
    for draw in range(draws):
        u_BL = ramp((draw + offset_BL) / draws, place_BL, path.slope)
        sigma_BL = torch.where(u_BL >= 1, torch.inf, schedule.sigma(u_BL)).float()
        found = noisy.at(torch.where(free_BL, sigma_BL, 0.0), batch.noise(size, seed, draw))
        error_N = (noisy.e_BLE.flatten(0, 1)[found.places_N] - found.x0_NE).double().square().sum(-1)
        open_BL = free_BL & (u_BL > 0) & (u_BL < 1)
        u_N = u_BL[open_BL]
        weight_N = send(schedule.sigma(u_N).pow(-3) * schedule.derivative(u_N), device)
        value_N = weight_N * error_N[places_of(open_BL[free_BL], device)]
        diffusion_B += batch.totals(value_N, open_BL) * (1 + path.slope) / draws
        seen.append(torch.stack([send(u_N, device), value_N]))
    last_N = noisy.nats(torch.where(free_BL, schedule.sigma_min, 0.0), batch.noise(size, seed, draws))
    prior_B = free_BL.sum(1).double() * size / 2 * math.log1p(schedule.sigma_max**-2)
    terms = {"reconstruction": batch.totals(last_N, free_BL), "diffusion": diffusion_B, "prior": prior_B}
    return Priced(terms, every(batch, passes * (draws + 1)), torch.cat(seen, 1).cpu())


def left_to_right(objective: Objective, network: Network, batch: RowBatch) -> Priced:
    """Exact NLL of every token given those before it, in one evaluation; ``</s>`` ends the text."""
    free_BL = batch.free(closed=False)
    nats_N = F.cross_entropy(next_logits(objective, network, batch), batch.ids_BL[free_BL], reduction="none")
    return Priced({"reconstruction": batch.totals(nats_N, free_BL)}, every(batch, 1))


def are_likeliest(objective: Objective, network: Network, batch: RowBatch) -> Tensor:
    """Whether every token of a row is the likeliest one after those before it, in one evaluation: [B] bool."""
    free_BL = batch.free(closed=False)
    other_N = next_logits(objective, network, batch).argmax(-1) != batch.ids_BL[free_BL]
    return batch.totals(other_N, free_BL) == 0


def next_logits(objective: Objective, network: Network, batch: RowBatch) -> Tensor:
    """Logits of every token that is priced given those before it, [N, V]."""
    free_BL = batch.free(closed=False)
    with network.autocast:
        seen = objective.next_tokens(
            network.denoiser, batch.ids_BL, batch.real_BL, batch.position_BL, free_BL, batch.special
        )
        logits_NV = seen.logits_NV
    return rule_out(logits_NV, False, batch.special)


def right_to_left(network: Network, batch: RowBatch, passes: int) -> Priced:
    """Exact NLL of every token given those after it and the row's length, in an evaluation for each place."""
    free_BL = batch.free(closed=True).cpu()
    noisy, count_B1 = Noisy(network, batch, 0, passes, True), free_BL.sum(1, keepdim=True)
    rank_BL = count_B1 - free_BL.long().cumsum(1)
    total_B = torch.zeros(len(batch.index), dtype=torch.float64, device=network.device)
    for place in range(int(count_B1.max())):
        open_BL = free_BL & (rank_BL >= place)
        now_BL = open_BL & (rank_BL == place)
        nats_N = noisy.nats(torch.where(open_BL, torch.inf, 0.0))
        total_B += batch.totals(nats_N[places_of(now_BL[open_BL], network.device)], now_BL)
    return Priced({"reconstruction": total_B}, passes * count_B1.squeeze(1).float())


def random_order(network: Network, batch: RowBatch, draws: int, seed: int, passes: int) -> Priced:
    """NLL averaged over all orders of a row's tokens, given its length: the bound of masked diffusion.

    With t of n tokens given at random, each of the others is as likely to be the next, so ``n`` times their mean
    cross-entropy estimates the sum over an order, without bias (arXiv 2110.02037, section 3); t is stratified.
    """
    free_BL = batch.free(closed=True).cpu()
    noisy = Noisy(network, batch, 0, passes, True)
    offset_B, count_B = batch.low_discrepancy(seed), free_BL.sum(1)
    total_B = torch.zeros(len(batch.index), dtype=torch.float64, device=network.device)
    for draw in range(draws):
        given_B = ((draw + offset_B) / draws * count_B).long()
        open_BL = free_BL & (batch.shuffled(free_BL, seed, draw) >= given_B[:, None])
        nats_N = noisy.nats(torch.where(open_BL, torch.inf, 0.0))
        share_B = count_B.double() / (count_B - given_B).clamp(min=1) / draws
        total_B += batch.totals(nats_N, open_BL) * send(share_B, network.device)
    return Priced({"reconstruction": total_B}, every(batch, passes * draws))

"""Training noise levels: one sigma for every position, drawn from a mixture of patterns per document and block.

Independent levels by themselves never show a network an all-noisy or an all-clean sequence; the mixture covers every
path that generation may take. sigma 0 is a given token, sigma inf is no evidence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scorelm.config.recipe import Mixture
from scorelm.noise.schedule import Schedule

GOLDEN = 0.6180339887498949
"""Fractional part of the golden ratio: its multiples mod 1 are a low-discrepancy sequence."""


class Runs(NamedTuple):
    """Maximal stretches of equal keys inside rows, numbered over the whole batch in reading order."""

    index_BL: Tensor
    offset_BL: Tensor
    length_BL: Tensor
    number: int

    def having(self, mask_BL: Tensor) -> Tensor:
        """Positions of the runs that the mask holds somewhere, [B, L] bool."""
        found_N = torch.zeros(self.number, dtype=torch.bool)
        found_N[self.index_BL[mask_BL]] = True
        return found_N[self.index_BL]


def runs(*keys_BL: Tensor) -> Runs:
    """Find the runs in which every key is constant.

    Returns:
        index_BL: number of the run a position belongs to, from 0; offset_BL: the position's place in its run;
        length_BL: the length of its run; number: how many runs there are.
    """
    start_BL = torch.ones_like(keys_BL[0], dtype=torch.bool)
    start_BL[:, 1:] = False
    for key_BL in keys_BL:
        start_BL[:, 1:] |= key_BL[:, 1:] != key_BL[:, :-1]
    index_BL = start_BL.flatten().cumsum(0).view_as(start_BL) - 1
    first_N = start_BL.flatten().nonzero().squeeze(1)
    length_N = torch.bincount(index_BL.flatten())
    place_BL = torch.arange(start_BL.numel(), device=start_BL.device).view_as(start_BL)
    return Runs(index_BL, place_BL - first_N[index_BL], length_N[index_BL], len(first_N))


def random_rank(run: Runs, rng: torch.Generator) -> Tensor:
    """A random order of the positions inside each run: [B, L] ranks from 0."""
    key = run.index_BL.double() + torch.rand(run.index_BL.shape, dtype=torch.float64, generator=rng)
    rank = torch.empty(key.numel(), dtype=torch.long)
    rank[key.flatten().argsort()] = torch.arange(key.numel())
    start_BL = torch.arange(key.numel()).view_as(key).long() - run.offset_BL
    return rank.view_as(start_BL) - start_BL


def given_spans(run: Runs, share: float, rng: torch.Generator) -> Tensor:
    """Conditioning masks: [B, L] bool, true where a token is given.

    A `share` of the runs (documents) get one span of random length, at a random place or, for half of them,
    shuffled over the document's positions.
    """
    count = run.number
    chosen, shuffled = torch.rand(count, generator=rng) < share, torch.rand(count, generator=rng) < 0.5
    length_BL = (torch.rand(count, generator=rng)[run.index_BL] * (run.length_BL + 1)).long()
    start_BL = (torch.rand(count, generator=rng)[run.index_BL] * (run.length_BL - length_BL + 1)).long()
    rank_BL = torch.where(shuffled[run.index_BL], random_rank(run, rng), run.offset_BL)
    return chosen[run.index_BL] & (rank_BL >= start_BL) & (rank_BL < start_BL + length_BL)


class Levels(NamedTuple):
    """Drawn noise levels."""

    sigma_BL: Tensor
    """float32 in [0, inf]."""
    shared_BL: Tensor
    """True where the whole block has one finite level: what the adaptive schedule is fitted to."""


def draw_levels(document: Runs, block: Runs, schedule: Schedule, mixture: Mixture, rng: torch.Generator) -> Levels:
    """Draw a kind for every document and levels for every block of it; low-discrepancy over the batch.

    Args:
        document: documents as runs over [B, L].
        block: blocks as runs over [B, L], each inside one document.
        schedule: maps u in [0, 1] to sigma.
        mixture: weights of the kinds.
        rng: CPU generator.
    """
    names = list(type(mixture).model_fields)
    weights = torch.tensor([getattr(mixture, name) for name in names], dtype=torch.float64)
    kind_BL = torch.multinomial(weights, document.number, replacement=True, generator=rng)[document.index_BL]
    is_kind = {name: kind_BL == k for k, name in enumerate(names)}

    offset = torch.rand((), dtype=torch.float64, generator=rng)
    centre_BL = ((offset + GOLDEN * torch.arange(block.number, dtype=torch.float64)) % 1)[block.index_BL]
    own_BL = torch.rand(centre_BL.shape, dtype=torch.float64, generator=rng)
    width_BL = torch.rand(block.number, dtype=torch.float64, generator=rng)[block.index_BL]
    pick_BL = torch.rand(block.number, dtype=torch.float64, generator=rng)[block.index_BL]

    last_BL = (block.length_BL - 1).clamp(min=1)
    u_BL = centre_BL.clone()
    u_BL = torch.where(is_kind["independent"], own_BL, u_BL)
    u_BL = torch.where(is_kind["spread"], (centre_BL + width_BL * (own_BL - 0.5)).clamp(0, 1), u_BL)
    lead_BL = torch.where(block.length_BL > 1, RAMP_SLOPES[(width_BL * len(RAMP_SLOPES)).long()], 0.0)
    u_BL = torch.where(is_kind["ramp"], ramp(centre_BL, block.offset_BL / last_BL, lead_BL), u_BL)

    # Kept clean: `clean_BL` positions of the block, at least one short of all, so that something is left to learn.
    clean_BL = (pick_BL * block.length_BL).long()
    rank_BL = torch.where(is_kind["absorbing"], random_rank(block, rng), block.offset_BL)
    given_BL = (is_kind["absorbing"] | is_kind["prefix"] | is_kind["ordered"]) & (rank_BL < clean_BL)
    sigma_BL = schedule.sigma(u_BL)
    sigma_BL = torch.where(is_kind["absorbing"] | is_kind["ordered"], torch.inf, sigma_BL)
    return Levels(torch.where(given_BL, 0.0, sigma_BL).float(), is_kind["shared"])


RAMP_SLOPES = torch.tensor([0.1, 0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
"""Slopes of the `ramp` kind, drawn with equal probability."""


def ramp(s: Tensor, place: Tensor, slope: Tensor | float) -> Tensor:
    """Levels u on AR-Diffusion's line over positions (arXiv 2305.09515): earlier positions are ahead by `slope`.

    ``u = clip(s (1 + slope) - slope (1 - place), 0, 1)``: all 1 at s = 1 and all 0 at s = 0; slope 0 is uniform, and
    as slope grows it becomes token by token. `place` is the position's place in the sequence, from 0 to 1.
    """
    return (s * (1 + slope) - slope * (1 - place)).clamp(0, 1)


def free_place(free_BL: Tensor) -> Tensor:
    """Place of each free position among its row's free positions, from 0 (first) to 1 (last), float64."""
    rank_BL = free_BL.long().cumsum(1) - 1
    last_B1 = (free_BL.long().sum(1, keepdim=True) - 1).clamp(min=1)
    return (rank_BL / last_B1).clamp(0, 1).double()

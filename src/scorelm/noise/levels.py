"""Training noise levels: one sigma for every position, drawn from a mixture of patterns per document and block.

Independent levels by themselves never show a network an all-noisy or an all-clean sequence; the mixture covers every
path that generation may take. sigma 0 is a given token, sigma inf is no evidence.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from scorelm.config.recipe import Mixture
from scorelm.device import constant
from scorelm.noise.schedule import Schedule

GOLDEN, ROOT = 0.6180339887498949, 0.41421356237309515
"""Fractional parts of the golden ratio and of the root of 2: their multiples mod 1 are low-discrepancy sequences, and
together one of pairs (Kronecker's)."""
KINDS = tuple(Mixture.model_fields)
"""Of patterns."""


class Runs(NamedTuple):
    """Maximal stretches of equal keys inside rows: tensors [B, L], so that no shape depends on how many there are."""

    first_BL: Tensor
    """Where in its row the run of a position begins."""
    offset_BL: Tensor
    length_BL: Tensor

    def take(self, value_BL: Tensor) -> Tensor:
        """For every position the value at the first position of its run."""
        return value_BL.gather(1, self.first_BL)

    def having(self, mask_BL: Tensor) -> Tensor:
        """Positions of the runs that the mask holds somewhere, [B, L] bool."""
        count_BL = mask_BL.long().cumsum(1)
        last_BL = count_BL.gather(1, self.first_BL + self.length_BL - 1)
        return last_BL > self.take(count_BL) - self.take(mask_BL.long())


def runs(*keys_BL: Tensor) -> Runs:
    """Find the runs in which every key is constant."""
    start_BL = torch.ones_like(keys_BL[0], dtype=torch.bool)
    start_BL[:, 1:] = torch.stack([key_BL[:, 1:] != key_BL[:, :-1] for key_BL in keys_BL]).any(0)
    place_BL = torch.arange(start_BL.shape[1], device=start_BL.device).expand_as(start_BL)
    first_BL = torch.where(start_BL, place_BL, 0).cummax(1).values
    last_BL = torch.where(start_BL.roll(-1, 1), place_BL, start_BL.shape[1]).flip(1).cummin(1).values.flip(1)
    return Runs(first_BL, place_BL - first_BL, last_BL - first_BL + 1)


class Uniform:
    """Uniform random numbers in [0, 1) for a batch, handed out a table [B, L] at a time.

    Args:
        random_TBL: T tables of them, float64.
        copies: how many copies of the batch stand side by side in its rows, 1 or 2.
    """

    def __init__(self, random_TBL: Tensor, copies: int = 1) -> None:
        self.tables, self.copies = iter(random_TBL.unbind()), copies

    def table(self) -> Tensor:
        """A number for every position."""
        table_BL = next(self.tables, None)
        if table_BL is None:
            raise RuntimeError("a draw takes more random numbers than its objective's `tables` says")
        return table_BL

    def each(self, run: Runs) -> Tensor:
        """A number for every run, at each of its positions."""
        return run.take(self.table())

    def spread(self, run: Runs, used_BL: Tensor | None = None) -> Tensor:
        """The same, but spread evenly over the runs of each copy of the batch, and over pairs of runs of both copies.

        These are multiples of `GOLDEN` in one copy and of `ROOT` in the other, from a random start; a run that is not
        used does not take any.
        """
        first_BL = run.offset_BL == 0 if used_BL is None else (run.offset_BL == 0) & used_BL
        (rows, length), copies, start = first_BL.shape, self.copies, self.table()[0, 0]
        of_copy_BCL = first_BL.view(rows, copies, length // copies)
        number_CP = of_copy_BCL.transpose(0, 1).flatten(1).cumsum(1) - 1
        step_C1 = constant((GOLDEN, ROOT)[:copies], first_BL, torch.float64)[:, None]
        spread_CBL = ((start + step_C1 * number_CP) % 1).view(copies, rows, length // copies)
        return spread_CBL.transpose(0, 1).flatten(1)


def random_rank(run: Runs, uniform: Uniform) -> Tensor:
    """A random order of the positions inside each run: [B, L] ranks from 0."""
    return (run.first_BL + uniform.table()).argsort(1).argsort(1) - run.first_BL


def given_spans(run: Runs, share: float, uniform: Uniform) -> Tensor:
    """Conditioning masks: [B, L] bool, true where a token is given.

    A `share` of the runs (documents) get one span of random length, at a random place or, for half of them,
    shuffled over the document's positions.
    """
    chosen_BL, shuffled_BL = uniform.each(run) < share, uniform.each(run) < 0.5
    length_BL = (uniform.each(run) * (run.length_BL + 1)).long()
    start_BL = (uniform.each(run) * (run.length_BL - length_BL + 1)).long()
    rank_BL = torch.where(shuffled_BL, random_rank(run, uniform), run.offset_BL)
    return chosen_BL & (rank_BL >= start_BL) & (rank_BL < start_BL + length_BL)


class Levels(NamedTuple):
    """Drawn noise levels."""

    sigma_BL: Tensor
    """float32 in [0, inf]."""
    shared_BL: Tensor
    """True where the whole block has one finite level: what the adaptive schedule is fitted to."""


def draw_levels(
    document: Runs,
    block: Runs,
    schedule: Schedule,
    mixture: Mixture,
    uniform: Uniform,
    used_BL: Tensor | None = None,
) -> Levels:
    """Draw a kind for every document and levels for every block of it; low-discrepancy over the batch.

    Args:
        document: documents as runs over [B, L].
        block: blocks as runs over [B, L], each inside one document.
        schedule: maps u in [0, 1] to sigma.
        mixture: weights of the kinds.
        uniform: random numbers.
        used_BL: blocks whose levels are used, where others stand in the batch too.
    """
    weights = {kind: getattr(mixture, kind) for kind in KINDS}
    edges = constant([*accumulate(weights.values())], block.first_BL, torch.float64)
    kind_BL = torch.bucketize(uniform.each(document) * edges[-1], edges, right=True)
    is_kind = {name: kind_BL == k for k, name in enumerate(weights)}

    centre_BL, own_BL = uniform.spread(block, used_BL), uniform.table()
    width_BL, pick_BL = uniform.each(block), uniform.each(block)
    last_BL = (block.length_BL - 1).clamp(min=1)
    u_BL = centre_BL
    u_BL = torch.where(is_kind["independent"], own_BL, u_BL)
    u_BL = torch.where(is_kind["spread"], (centre_BL + width_BL * (own_BL - 0.5)).clamp(0, 1), u_BL)
    slopes = constant(RAMP_SLOPES, u_BL, torch.float64)
    lead_BL = torch.where(block.length_BL > 1, slopes[(width_BL * len(slopes)).long()], 0.0)
    u_BL = torch.where(is_kind["ramp"], ramp(centre_BL, block.offset_BL / last_BL, lead_BL), u_BL)

    # Kept clean: `clean_BL` positions of the block, at least one short of all, so that something is left to learn.
    clean_BL = (pick_BL * block.length_BL).long()
    rank_BL = torch.where(is_kind["absorbing"], random_rank(block, uniform), block.offset_BL)
    given_BL = (is_kind["absorbing"] | is_kind["prefix"] | is_kind["ordered"]) & (rank_BL < clean_BL)
    sigma_BL = schedule.sigma(u_BL)
    sigma_BL = torch.where(is_kind["absorbing"] | is_kind["ordered"], torch.inf, sigma_BL)
    return Levels(torch.where(given_BL, 0.0, sigma_BL).float(), is_kind["shared"])


RAMP_SLOPES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
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

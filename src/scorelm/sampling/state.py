"""The state of a generation: positions of several rows, what is known of them, and the random numbers of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.model.layout import Layout, number_blocks
from scorelm.noise.forward import add_noise, to_sigma
from scorelm.noise.schedule import Schedule
from scorelm.text.batching import pad
from scorelm.text.packing import first_fit
from scorelm.text.templates import Hole, Template
from scorelm.text.tokenizer import Special

FREE = -1
"""In the place of a token that is to be written."""


@dataclass(frozen=True)
class Rows:
    """What stays as it is about the rows of a request."""

    layout: Layout
    special: Special
    table_VE: Tensor
    """Embeddings of all tokens."""
    wanted_BL: Tensor
    """Positions to be written."""
    prompt_BL: Tensor
    """Given tokens other than the ends of the text."""
    closed_B: Tensor
    """Rows whose ``</s>`` is given, so that no other may be written."""
    hole_BL: Tensor
    """The condition on what is written at a position: the value of a `Hole`, 0 for none."""
    generators: list[torch.Generator]
    greedy: bool = False
    """Whether the likeliest token is written always."""


@dataclass(frozen=True)
class Budget:
    """What a path may spend.

    Attributes:
        schedule: maps u in [0, 1] to sigma.
        steps: to make at most.
        nats: of each step in each row, for paths on information; None to spend the steps evenly.
        start: level u that the free positions begin at, at most.
    """

    schedule: Schedule
    steps: int
    nats: float | None = None
    start: float = 1.0


@dataclass
class State:
    """Everything that a step changes; tensors [B, L, ...]."""

    rows: Rows
    budget: Budget
    x_BLE: Tensor
    sigma_BL: Tensor
    ids_BL: Tensor
    """Given and finished tokens, and where steps are recorded the likeliest token elsewhere."""
    free_BL: Tensor
    """Positions to be written; false beyond the ``</s>`` that an open row has written."""
    real_BL: Tensor
    """Positions of the row, as opposed to padding."""
    x0_BLE: Tensor
    """The newest clean estimate, fed back as self-conditioning."""
    before_x0_BLE: Tensor
    before_sigma_BL: Tensor
    """The estimate of the step before and its level, for multistep solvers; inf where there was none."""
    length_B: Tensor
    nfe_B: Tensor
    """Evaluations that each row has taken part in."""
    change_BL: Tensor
    """How far the last prediction moved the estimate, in units of an embedding's norm."""
    step: int = 0
    """Of the path; it counts those in which nothing moves, too."""

    @property
    def open_BL(self) -> Tensor:
        """Positions that are not finished."""
        return self.free_BL & (self.sigma_BL > 0)

    @cached_property
    def order_BL(self) -> Tensor:
        """A random order of each row's free positions, drawn once."""
        return self.shuffle()

    def shuffle(self) -> Tensor:
        """A random place among its row's free positions for each of them, [B, L] from 0."""
        return shuffle(self.rows.generators, self.free_BL)

    def draws(self, mask_BL: Tensor) -> RowDraws:
        """Random numbers for the positions of a mask."""
        return RowDraws(self.rows.generators, mask_BL, self.x_BLE.shape[-1], self.rows.greedy)

    def sigma_at(self, u_BL: Tensor) -> Tensor:
        """Sigma at the levels u where a position is free, 0 elsewhere: inf at u = 1, 0 at u = 0, float32."""
        return torch.where(self.free_BL, to_sigma(u_BL, self.budget.schedule), 0.0)

    def put(self, mask_BL: Tensor, x_NE: Tensor, sigma: Tensor | float) -> None:
        """Place positions at a state and level."""
        self.x_BLE[mask_BL] = x_NE
        self.sigma_BL[mask_BL] = sigma

    def forget(self, back_BL: Tensor) -> None:
        """Take positions back to no evidence at all."""
        self.put(back_BL, self.x_BLE.new_zeros(()), torch.inf)

    def end_rows(self) -> None:
        """End open rows at the ``</s>`` they have written: what follows becomes padding."""
        special = self.rows.special
        column_L = torch.arange(self.free_BL.shape[1], device=self.free_BL.device)
        ended_BL = self.free_BL & (self.sigma_BL == 0) & (self.ids_BL == special.eos)
        end_B = torch.where(ended_BL, column_L + 1, self.length_B[:, None]).amin(1)
        beyond_BL = column_L >= end_B[:, None]
        self.length_B.copy_(end_B)
        self.ids_BL[beyond_BL] = special.pad
        self.sigma_BL[beyond_BL] = 0
        self.free_BL &= ~beyond_BL
        self.real_BL &= ~beyond_BL


def start(
    table_VE: Tensor,
    templates: Sequence[Template],
    seeds: Sequence[int],
    special: Special,
    block: int,
    budget: Budget,
    greedy: bool = False,
) -> State:
    """The state before the first step: given tokens at sigma 0, free positions at sigma inf.

    Args:
        table_VE: embeddings of all tokens.
        templates: one for each row.
        seeds: one for each row.
        special: ids of the special tokens.
        block: positions in a block; 0 is the whole row.
        budget: for the path. Below a `start` of 1, given tokens other than the ends get noise of that level, and are
            to be written anew.
        greedy: write the likeliest token always; the noise is then the same for every seed, and so is what is written.
    """
    rows = [[token if isinstance(token, int) else FREE for token in template] for template in templates]
    holes = [[token.value if isinstance(token, Hole) else 0 for token in template] for template in templates]
    ids_BL, length_B = map(torch.from_numpy, pad(rows, special.pad))
    hole_BL = torch.from_numpy(pad(holes, 0)[0])
    free_BL = ids_BL == FREE
    ids_BL[free_BL] = special.pad
    closed_B = torch.tensor([row[-1] == special.eos for row in rows])
    position_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
    block_BL = number_blocks(position_BL, (ids_BL[:, :1] == special.bos).long(), block)
    real_BL = position_BL < length_B[:, None]
    layout = Layout.one_stream(real_BL.long(), position_BL, block_BL).to(table_VE.device)
    ids_BL, free_BL, real_BL, length_B, closed_B, hole_BL = (
        t.to(table_VE.device) for t in (ids_BL, free_BL, real_BL, length_B, closed_B, hole_BL)
    )
    prompt_BL = ~free_BL & real_BL & (layout.block_BL > 0) & (ids_BL != special.eos)
    x_BLE = torch.where(free_BL[..., None], 0.0, table_VE[ids_BL])
    sigma_BL = torch.where(free_BL, torch.inf, 0.0)
    nothing_BLE = torch.zeros_like(x_BLE)
    if budget.start < 1:
        free_BL = free_BL | prompt_BL
    generators = [generator(0 if greedy else seed) for seed in seeds]
    facts = Rows(layout, special, table_VE, free_BL.clone(), prompt_BL, closed_B, hole_BL, generators, greedy)
    state = State(
        facts, budget, x_BLE, sigma_BL, ids_BL, free_BL, real_BL, nothing_BLE, nothing_BLE.clone(),
        torch.full_like(sigma_BL, torch.inf), length_B, torch.zeros_like(length_B), torch.zeros_like(sigma_BL),
    )  # fmt: skip
    if budget.start < 1 and seeds:
        level = to_sigma(torch.tensor(budget.start, dtype=torch.float64), budget.schedule).to(table_VE.device)
        x_NE, eps_NE = state.x_BLE[prompt_BL], state.draws(prompt_BL).normal()
        state.put(prompt_BL, add_noise(x_NE, level.expand(len(x_NE)), eps_NE), level)
    return state


def generator(seed: int) -> torch.Generator:
    """A CPU generator for a seed from 0 to below 2^63; torch itself reads the lowest 32 bits only."""
    word = seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed(word)


class RowDraws:
    """Random numbers for a set of positions, each row's from its own generator, whatever its neighbours are.

    Args:
        generators: one for each row.
        mask_BL: the positions.
        dim: size of an embedding.
        greedy: whether the likeliest token stands for a drawn one.
    """

    def __init__(self, generators: Sequence[torch.Generator], mask_BL: Tensor, dim: int, greedy: bool = False) -> None:
        self.generators, self.counts, self.dim = generators, mask_BL.sum(1).tolist(), dim
        self.device, self.greedy = mask_BL.device, greedy

    def _rows(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        parts = [draw(n, g) for n, g in zip(self.counts, self.generators, strict=True)]
        return torch.cat(parts).to(self.device)

    def normal(self) -> Tensor:
        return self._rows(lambda n, g: torch.randn(n, self.dim, generator=g))

    def token(self, logits_NV: Tensor) -> Tensor:
        """Inverse-transform draws in float64, in two levels: a chunk of the vocabulary, then a token inside it."""
        if self.greedy:
            return logits_NV.argmax(-1)
        u_N = self._rows(lambda n, g: torch.rand(n, dtype=torch.float64, generator=g))
        probability_NV = logits_NV.softmax(-1)
        chunks = -(-probability_NV.shape[1] // CHUNK)
        rest = chunks * CHUNK - probability_NV.shape[1]
        padded_NV = F.pad(probability_NV, (0, rest)) if rest else probability_NV
        probability_NCK = padded_NV.view(-1, chunks, CHUNK)
        chunk_N, rest_N = inverse_transform(probability_NCK.sum(-1, dtype=torch.float64), u_N)
        inside_NK = probability_NCK[torch.arange(len(chunk_N), device=self.device), chunk_N]
        return chunk_N * CHUNK + inverse_transform(inside_NK.double(), rest_N)[0]


CHUNK = 64
"""Tokens that are summed before the first level of a draw."""


def inverse_transform(weight_NC: Tensor, u_N: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an index in proportion to weights, by u in [0, 1): the index [N], and how far u is through it, in [0, 1)."""
    total_NC = weight_NC.cumsum(-1)
    below_one = 1 - 2.0**-52  # rounding never reaches the total, where only weights of 0 may follow
    target_N1 = u_N[:, None] * below_one * total_NC[:, -1:]
    index_N1 = torch.searchsorted(total_NC, target_N1, right=True)
    weight_N1 = weight_NC.gather(1, index_N1)
    through_N1 = (target_N1 - (total_NC.gather(1, index_N1) - weight_N1)) / weight_N1
    return index_N1.squeeze(1), through_N1.squeeze(1).clamp(0, below_one)


def shuffle(generators: Sequence[torch.Generator], free_BL: Tensor) -> Tensor:
    """A random place among its row's free positions for each of them, [B, L] from 0; each row by its own generator."""
    rank_BL = torch.zeros(free_BL.shape, dtype=torch.long)
    for row, generator in enumerate(generators):
        count = int(free_BL[row].sum())
        rank_BL[row, free_BL[row].cpu()] = torch.randperm(count, generator=generator)
    return rank_BL.to(free_BL.device)


def pack(extents: Sequence[int], length: int) -> Tensor:
    """Where to find each position of dense rows of the model: [R, W] indices into flat [B, L]; -1 is padding.

    Row b fills `extents[b]` columns from its first; rows share a row of the model, which is as long as the longest
    extent, so that short ones waste nothing (first-fit decreasing).
    """
    pieces = [np.arange(row * length, row * length + extent) for row, extent in enumerate(extents) if extent]
    return torch.from_numpy(first_fit(pieces, max(extents)))


def side_by_side(layout: Layout, extents: Sequence[int]) -> tuple[Tensor, Layout]:
    """The first columns of each row in dense rows of the model: where each position is taken from, and their layout."""
    length = layout.position_BL.shape[1]
    index_RW = pack(extents, length).to(layout.position_BL.device)
    at_RW = index_RW.clamp(min=0)
    found = layout.map(lambda t_BL: t_BL.flatten(0, 1)[at_RW])
    return at_RW, replace(found, segment_BL=torch.where(index_RW >= 0, at_RW // length + 1, 0))

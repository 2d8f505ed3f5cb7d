"""The state of a generation: positions of several rows, what is known of them, and the random numbers of each row.

What decides who moves where (levels, masks, lengths) is on the host, and what is computed with (embeddings, estimates,
tokens) on the model's device, so that the host need not wait for a GPU to know what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from scorelm.device import send
from scorelm.model.layout import Layout, number_blocks
from scorelm.model.prediction import places_of
from scorelm.noise.forward import add_noise, to_sigma
from scorelm.noise.schedule import Schedule
from scorelm.sampling.draws import RowDraws, generator, shuffle
from scorelm.text.batching import pad
from scorelm.text.fit import best_fit, line_up
from scorelm.text.templates import Hole, Template
from scorelm.text.tokenizer import Special
from scorelm.text.windows import count_up

FREE = -1
"""In the place of a token that is to be written."""


@dataclass(frozen=True)
class Rows:
    """What stays as it is about the rows of a request; on the host but for the table."""

    layout: Layout
    special: Special
    table_VE: Tensor
    """Embeddings of all tokens, on the model's device."""
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
    """Everything that a step changes; tensors [B, L, ...]. `ids_BL` and those [B, L, E] are on the model's device."""

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
    """How far the last prediction moved the estimate, in units of an embedding's norm, where steps are recorded."""
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
        device, dim = self.x_BLE.device, self.x_BLE.shape[-1]
        return RowDraws(self.rows.generators, mask_BL, dim, self.rows.greedy, device)

    def places(self, mask_BL: Tensor) -> Tensor:
        """Places of the true positions of a mask, counted row after row, on the model's device."""
        return places_of(mask_BL, self.x_BLE.device)

    @property
    def x_PE(self) -> Tensor:
        """All positions, row after row: a view to read and write, as the two below are."""
        return self.x_BLE.view(-1, self.x_BLE.shape[-1])

    @property
    def x0_PE(self) -> Tensor:
        return self.x0_BLE.view(-1, self.x0_BLE.shape[-1])

    @property
    def before_x0_PE(self) -> Tensor:
        return self.before_x0_BLE.view(-1, self.before_x0_BLE.shape[-1])

    def sigma_at(self, u_BL: Tensor) -> Tensor:
        """Sigma at the levels u where a position is free, 0 elsewhere: inf at u = 1, 0 at u = 0, float32."""
        return torch.where(self.free_BL, to_sigma(u_BL, self.budget.schedule), 0.0)

    def put(self, mask_BL: Tensor, x_NE: Tensor | float, sigma: Tensor | float) -> None:
        """Place positions at a state and level; levels are on the host."""
        self.x_PE[self.places(mask_BL)] = x_NE
        self.sigma_BL[mask_BL] = sigma

    def write(self, mask_BL: Tensor, ids_N: Tensor) -> None:
        """Finish positions with these tokens."""
        at_N = self.places(mask_BL)
        self.ids_BL.view(-1)[at_N] = ids_N
        self.x_PE[at_N] = self.rows.table_VE[ids_N]
        self.sigma_BL[mask_BL] = 0

    def forget(self, back_BL: Tensor) -> None:
        """Take positions back to no evidence at all."""
        self.put(back_BL, 0.0, torch.inf)

    def end_rows(self) -> None:
        """End open rows at the ``</s>`` they have written: what follows becomes padding.

        Only where there are open rows, the host reads what was written.
        """
        special = self.rows.special
        if self.rows.closed_B.all():
            return
        column_L = torch.arange(self.free_BL.shape[1])
        ended_BL = self.free_BL & (self.sigma_BL == 0) & (self.ids_BL.cpu() == special.eos)
        end_B = torch.where(ended_BL, column_L + 1, self.length_B[:, None]).amin(1)
        beyond_BL = column_L >= end_B[:, None]
        self.length_B.copy_(end_B)
        self.ids_BL.view(-1)[self.places(beyond_BL)] = special.pad
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
    layout = Layout.one_stream(real_BL.long(), position_BL, block_BL)
    prompt_BL = ~free_BL & real_BL & (layout.block_BL > 0) & (ids_BL != special.eos)
    ids_BL = send(ids_BL, table_VE.device)
    x_BLE = torch.where(send(free_BL, table_VE.device)[..., None], 0.0, table_VE[ids_BL])
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
        level = to_sigma(torch.tensor(budget.start, dtype=torch.float64), budget.schedule)
        x_NE = state.x_PE[state.places(prompt_BL)]
        level_N = send(level, table_VE.device).expand(len(x_NE))
        state.put(prompt_BL, add_noise(x_NE, level_N, state.draws(prompt_BL).normal()), level)
    return state


def pack(extents: Sequence[int], length: int) -> Tensor:
    """Where to find each position of dense rows of the model: [R, W] indices into flat [B, L]; -1 is padding.

    Row b fills `extents[b]` columns from its first; rows share a row of the model, which is as long as the longest
    extent, so that short ones waste nothing.
    """
    extent_B, width = np.array(extents), max(extents)
    filled_N = np.flatnonzero(extent_B)
    extent_N = extent_B[filled_N]
    row_N = best_fit(extent_N, width)
    _, column_N = line_up(row_N, extent_N)
    index_RW = np.full((row_N.max() + 1, width), -1)
    index_RW.ravel()[count_up(row_N * width + column_N, extent_N)] = count_up(filled_N * length, extent_N)
    return torch.from_numpy(index_RW)


def side_by_side(layout: Layout, extents: Sequence[int]) -> tuple[Tensor, Layout]:
    """The first columns of each row in dense rows of the model: where each position is taken from, and their layout."""
    length = layout.position_BL.shape[1]
    index_RW = pack(extents, length)
    at_RW = index_RW.clamp(min=0)
    found = layout.map(lambda t_BL: t_BL.flatten(0, 1)[at_RW])
    return at_RW, replace(found, segment_BL=torch.where(index_RW >= 0, at_RW // length + 1, 0))

"""The state of a generation: positions of several rows, what is known of them, and the random numbers of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.model.embedding import Embedding
from scorelm.noise.plan import Path
from scorelm.text.conditioning import Template
from scorelm.text.packing import first_fit
from scorelm.text.tokenizer import BOS, EOS, PAD


@dataclass
class State:
    """Everything that a step changes; tensors [B, L, ...]."""

    x_BLE: Tensor
    sigma_BL: Tensor
    ids_BL: Tensor
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

    def soften(self, soft_BL: Tensor, sigma: Tensor, eps_NE: Tensor) -> None:
        """Doubt tokens that are given: noise of one level is put on them, and they are to be written anew."""
        self.x_BLE[soft_BL] += sigma * eps_NE
        self.sigma_BL[soft_BL] = sigma
        self.free_BL |= soft_BL

    def forget(self, back_BL: Tensor) -> None:
        """Take positions back to no evidence at all."""
        self.sigma_BL[back_BL] = torch.inf
        self.x_BLE[back_BL] = 0.0

    def end_rows(self) -> None:
        """End open rows at the ``</s>`` they have written: what follows becomes padding."""
        column_L = torch.arange(self.free_BL.shape[1], device=self.free_BL.device)
        ended_BL = self.free_BL & (self.sigma_BL == 0) & (self.ids_BL == EOS)
        end_B = torch.where(ended_BL, column_L + 1, self.length_B[:, None]).amin(1)
        beyond_BL = column_L >= end_B[:, None]
        self.length_B.copy_(end_B)
        self.ids_BL[beyond_BL] = PAD
        self.sigma_BL[beyond_BL] = 0
        self.free_BL &= ~beyond_BL
        self.real_BL &= ~beyond_BL


def start(embedding: Embedding, templates: Sequence[Template], path: Path) -> tuple[State, Layout]:
    """The state before the first step: given tokens at sigma 0, free positions at sigma inf; and where they stand."""
    longest = max(map(len, templates))
    ids_BL = torch.full((len(templates), longest), PAD)
    free_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for row, template in enumerate(templates):
        ids_BL[row, : len(template)] = torch.tensor([PAD if token is None else token for token in template])
        free_BL[row, : len(template)] = torch.tensor([token is None for token in template])
    length_B = torch.tensor([len(t) for t in templates])
    position_BL = torch.arange(longest).expand_as(ids_BL)
    first_B1 = (ids_BL[:, :1] == BOS).long()
    block_BL = torch.where(position_BL < first_B1, 0, 1 + (position_BL - first_B1) // (path.block or longest))
    real_BL = position_BL < length_B[:, None]
    stream_BL = torch.where(position_BL < first_B1, CLEAN, NOISY)
    device = embedding.weight.device
    layout = Layout(real_BL.long(), position_BL, block_BL, stream_BL).to(device)
    ids_BL, free_BL, real_BL, length_B = (t.to(device) for t in (ids_BL, free_BL, real_BL, length_B))
    x_BLE = torch.where(free_BL[..., None], 0.0, embedding(ids_BL))
    sigma_BL = torch.where(free_BL, torch.inf, 0.0)
    nothing_BLE = torch.zeros_like(x_BLE)
    state = State(
        x_BLE, sigma_BL, ids_BL, free_BL, real_BL,
        nothing_BLE, nothing_BLE.clone(), torch.full_like(sigma_BL, torch.inf), length_B, torch.zeros_like(length_B),
    )  # fmt: skip
    return state, layout


class RowDraws:
    """Random numbers for a set of positions, each row's from its own generator, whatever its neighbours are."""

    def __init__(self, generators: Sequence[torch.Generator], mask_BL: Tensor, dim: int) -> None:
        self.generators, self.counts, self.dim = generators, mask_BL.sum(1).tolist(), dim
        self.device = mask_BL.device

    def _rows(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        parts = [draw(n, g) for n, g in zip(self.counts, self.generators, strict=True)]
        return torch.cat(parts).to(self.device)

    def normal(self) -> Tensor:
        return self._rows(lambda n, g: torch.randn(n, self.dim, generator=g))

    def token(self, logits_NV: Tensor) -> Tensor:
        """Inverse-transform draws in float64, in two levels: a chunk of the vocabulary, then a token inside it."""
        u_N = self._rows(lambda n, g: torch.rand(n, dtype=torch.float64, generator=g))
        probability_NV = logits_NV.softmax(-1)
        chunks = -(-probability_NV.shape[1] // CHUNK)
        padded_NV = F.pad(probability_NV, (0, chunks * CHUNK - probability_NV.shape[1]))
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

"""Random numbers of rows: each row's come from a generator of its own, on the host, whatever its neighbours are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.device import send

CPU = torch.device("cpu")


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
        device: where the numbers are to be.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        mask_BL: Tensor,
        dim: int,
        greedy: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.generators, self.counts, self.dim = generators, mask_BL.sum(1).tolist(), dim
        self.device, self.greedy = device, greedy

    def _rows(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        parts = [draw(n, g) for n, g in zip(self.counts, self.generators, strict=True)]
        return send(torch.cat(parts), self.device)

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
        *_, index_N1 = place(inside_NK.double(), rest_N)
        return chunk_N * CHUNK + index_N1.squeeze(1)


CHUNK = 64
"""Tokens that are summed before the first level of a draw."""
BELOW_ONE = 1 - 2.0**-52
"""What u is scaled by: rounding then never reaches the total, where only weights of 0 may follow."""


def inverse_transform(weight_NC: Tensor, u_N: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an index in proportion to weights, by u in [0, 1): the index [N], and how far u is through it, in [0, 1)."""
    total_NC, target_N1, index_N1 = place(weight_NC, u_N)
    weight_N1 = weight_NC.gather(1, index_N1)
    through_N1 = (target_N1 - (total_NC.gather(1, index_N1) - weight_N1)) / weight_N1
    return index_N1.squeeze(1), through_N1.squeeze(1).clamp(0, BELOW_ONE)


def place(weight_NC: Tensor, u_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of weights up to each, u of the whole sum, and the index whose weight reaches that: [N, 1]."""
    total_NC = weight_NC.cumsum(-1)
    target_N1 = u_N[:, None] * BELOW_ONE * total_NC[:, -1:]
    return total_NC, target_N1, torch.searchsorted(total_NC, target_N1, right=True)


def shuffle(generators: Sequence[torch.Generator], free_BL: Tensor) -> Tensor:
    """A random place among its row's free positions for each of them, [B, L] from 0; each row by its own generator."""
    rank_BL = torch.zeros(free_BL.shape, dtype=torch.long)
    free_BL, device = free_BL.cpu(), free_BL.device
    for row, generator in enumerate(generators):
        count = int(free_BL[row].sum())
        rank_BL[row, free_BL[row]] = torch.randperm(count, generator=generator)
    return rank_BL.to(device)

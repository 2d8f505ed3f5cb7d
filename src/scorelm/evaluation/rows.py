"""Texts as rows of token ids to be priced, in batches of equal work; a row's random numbers are its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scorelm.errors import InputError
from scorelm.noise.levels import GOLDEN
from scorelm.sampling.state import shuffle
from scorelm.text.batching import by_length, pad
from scorelm.text.tokenizer import Special, Tokenizer

POSITIONS = 4096
"""Most positions in a batch."""


@dataclass(frozen=True)
class CutTexts:
    """Texts cut into rows.

    Attributes:
        ids: token ids of every row; a text longer than a row goes on in the next one.
        text: which text each row belongs to.
        characters: of every text.
    """

    ids: list[list[int]]
    text: list[int]
    characters: list[int]

    @property
    def tokens(self) -> Tensor:
        """Tokens of every text, ``<s>`` and ``</s>`` included: [T] float64."""
        return self.by_text(torch.tensor([len(row) for row in self.ids]))

    def by_text(self, value_N: Tensor) -> Tensor:
        """Sums of a row's values over each text, [T] float64."""
        total_T = torch.zeros(len(self.characters), dtype=torch.float64)
        return total_T.index_add(0, torch.tensor(self.text), value_N.double())


def cut(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> CutTexts:
    """Tokenise texts between ``<s>`` and ``</s>`` and cut them into rows of at most `max_length` tokens.

    Raises:
        InputError: no text.
    """
    ids: list[list[int]] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        document = tokenizer.encode_document(text)
        for start in range(0, len(document), max_length):
            ids.append(document[start : start + max_length])
            owner.append(number)
    if not ids:
        raise InputError("there is no text to measure")
    return CutTexts(ids, owner, [len(text) for text in texts])


@dataclass(frozen=True)
class RowBatch:
    """Some rows side by side: integer tensors [B, L]."""

    index: list[int]
    """Which rows they are."""
    ids_BL: Tensor
    real_BL: Tensor
    """1 where a row has a token, 0 where it is padded."""
    position_BL: Tensor
    special: Special

    @property
    def begins_B1(self) -> Tensor:
        """1 for rows that begin with ``<s>``, which is always given; 0 for those that go on with a long text."""
        return (self.ids_BL[:, :1] == self.special.bos).long()

    def free(self, closed: bool) -> Tensor:
        """Positions whose tokens are priced, [B, L] bool: all but ``<s>`` and, where the length is known, ``</s>``."""
        free_BL = (self.real_BL > 0) & (self.position_BL >= self.begins_B1)
        return free_BL & (self.ids_BL != self.special.eos) if closed else free_BL

    def totals(self, value_N: Tensor, at_BL: Tensor) -> Tensor:
        """Sums over each row of values that stand at the true positions of `at_BL`, in reading order: [B] float64."""
        total_B = torch.zeros(len(self.index), dtype=torch.float64, device=at_BL.device)
        return total_B.index_add(0, at_BL.nonzero()[:, 0], value_N.double())

    def low_discrepancy(self, seed: int) -> Tensor:
        """A number in [0, 1) for each row: multiples of the golden ratio from an offset that the seed gives, [B]."""
        start = np.random.default_rng(seed).random()
        return torch.tensor([(start + GOLDEN * i) % 1 for i in self.index], dtype=torch.float64)

    def seeds(self, seed: int, draw: int) -> list[int]:
        """A seed for each row, whatever its neighbours are."""
        words = [np.random.SeedSequence([seed, i, draw]).generate_state(1, np.uint64)[0] for i in self.index]
        return [int(word) % 2**32 for word in words]

    def generators(self, seed: int, draw: int) -> list[torch.Generator]:
        """A generator for each row, whatever its neighbours are."""
        return [torch.Generator().manual_seed(own) for own in self.seeds(seed, draw)]

    def noise(self, size: int, seed: int, draw: int) -> Tensor:
        """Standard normal [B, L, size], each row's own."""
        eps_BLE = torch.zeros(*self.ids_BL.shape, size)
        for row, generator in enumerate(self.generators(seed, draw)):
            length = int(self.real_BL[row].sum())
            eps_BLE[row, :length] = torch.randn(length, size, generator=generator)
        return eps_BLE.to(self.ids_BL.device)

    def shuffled(self, free_BL: Tensor, seed: int, draw: int) -> Tensor:
        """A random place among its row's free positions for each of them, [B, L] from 0."""
        return shuffle(self.generators(seed, draw), free_BL)


def batches(
    rows: Sequence[Sequence[int]], device: torch.device, special: Special, positions: int = POSITIONS
) -> Iterator[RowBatch]:
    """All rows, the shortest first, in batches of at most `positions` positions with padding."""
    for index in by_length([len(row) for row in rows], positions):
        ids_BL, length_B = map(torch.from_numpy, pad([rows[i] for i in index], special.pad))
        position_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
        real_BL = (position_BL < length_B[:, None]).long()
        yield RowBatch(index, ids_BL.to(device), real_BL.to(device), position_BL.to(device), special)


def length_nats(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
    """Nats that it takes to say how long each row is, from a histogram of lengths with half a count added: [N].

    A model that sees a whole row knows its length beforehand, so a likelihood that leaves this out is not one.
    """
    total = sum(lengths) + 0.5 * (len(lengths) - 1)
    return torch.tensor([-math.log((lengths[len(row)] + 0.5) / total) for row in rows], dtype=torch.float64)

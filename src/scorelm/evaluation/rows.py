"""Texts as rows of token ids to be priced, in batches of equal work; a row's random numbers are its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scorelm.device import send
from scorelm.errors import InputError
from scorelm.noise.levels import GOLDEN
from scorelm.sampling.draws import shuffle
from scorelm.text.batching import by_length, pad
from scorelm.text.normalization import as_read
from scorelm.text.templates import Template
from scorelm.text.tokenizer import Special, Tokenizer, count_lost

POSITIONS, LOGITS = 4096, 1 << 23
"""Most positions in a batch, and most logits (positions times vocabulary), which are what takes its memory."""
ON_GPU = 16
"""How many times as many make good use of a GPU."""


@dataclass(frozen=True)
class CutTexts:
    """Texts cut into rows.

    Attributes:
        ids: token ids of every row; a text longer than a row goes on in the next one.
        text: which text each row belongs to.
        characters: of every text, as the tokenizer gives it back.
        unknown: characters of every text that do not come back from the tokenizer.
    """

    ids: list[list[int]]
    text: list[int]
    characters: list[int]
    unknown: list[int]

    @property
    def tokens(self) -> Tensor:
        """Tokens of every text, ``<s>`` and ``</s>`` included: [T] float64."""
        return self.by_text(torch.tensor([len(row) for row in self.ids]))

    def holding(self, token: int) -> list[int]:
        """Numbers of the texts with a token in them."""
        return sorted({text for ids, text in zip(self.ids, self.text, strict=True) if token in ids})

    def by_text(self, value_N: Tensor) -> Tensor:
        """Sums of a row's values over each text, [T] float64."""
        total_T = torch.zeros(len(self.characters), dtype=torch.float64)
        return total_T.index_add(0, torch.tensor(self.text), value_N.double())


def cut(texts: Sequence[str], tokenizer: Tokenizer, max_length: int, lossy: bool = False) -> CutTexts:
    """Tokenise texts between ``<s>`` and ``</s>`` and cut them into rows of at most `max_length` tokens.

    Args:
        texts: the texts.
        tokenizer: of the model that reads the rows.
        max_length: of a row, in tokens.
        lossy: leave out ``<unk>``, which stands for characters that the tokenizer cannot spell.

    Raises:
        InputError: no text.
    """
    rows = CutTexts([], [], [], [])
    for number, text in enumerate(texts):
        document = tokenizer.encode_document(text)
        spelled = [token for token in document if token != tokenizer.special.unk]
        back, document = tokenizer.decode(spelled), spelled if lossy else document
        rows.characters.append(len(back))
        rows.unknown.append(count_lost(as_read(text, tokenizer), back))
        for start in range(0, len(document), max_length):
            rows.ids.append(document[start : start + max_length])
            rows.text.append(number)
    if not rows.ids:
        raise InputError("there is no text to measure")
    return rows


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
    given_B1: Tensor | None = None
    """Tokens at the beginning of each row that are given and have no price; by default ``<s>`` only."""

    @property
    def begins_B1(self) -> Tensor:
        """1 for rows that begin with ``<s>``, which is always given; 0 for those that go on with a long text."""
        return (self.ids_BL[:, :1] == self.special.bos).long()

    def free(self, closed: bool) -> Tensor:
        """Positions whose tokens are priced, [B, L] bool: all but what is given and, for known lengths, ``</s>``."""
        given_B1 = self.begins_B1 if self.given_B1 is None else self.given_B1
        free_BL = (self.real_BL > 0) & (self.position_BL >= given_B1)
        return free_BL & (self.ids_BL != self.special.eos) if closed else free_BL

    def templates(self, closed: bool) -> list[Template]:
        """The rows with a hole for each token that is priced."""
        ids_BL, free_BL, found = self.ids_BL.cpu().tolist(), self.free(closed).cpu().tolist(), list[Template]()
        for row, length in enumerate(self.real_BL.sum(1).cpu().tolist()):
            pairs = zip(ids_BL[row][:length], free_BL[row][:length], strict=True)
            found.append([None if free else token for token, free in pairs])
        return found

    def totals(self, value_N: Tensor, at_BL: Tensor) -> Tensor:
        """Sums over each row of values that stand at the true positions of `at_BL`, in reading order: [B] float64."""
        total_B = torch.zeros(len(self.index), dtype=torch.float64, device=value_N.device)
        return total_B.index_add(0, send(at_BL.nonzero()[:, 0], value_N.device), value_N.double())

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
        lengths = self.real_BL.sum(1).cpu().tolist()
        for row, (length, generator) in enumerate(zip(lengths, self.generators(seed, draw), strict=True)):
            eps_BLE[row, :length] = torch.randn(length, size, generator=generator)
        return send(eps_BLE, self.ids_BL.device)

    def shuffled(self, free_BL: Tensor, seed: int, draw: int) -> Tensor:
        """A random place among its row's free positions for each of them, [B, L] from 0."""
        return shuffle(self.generators(seed, draw), free_BL)


def most_positions(vocab_size: int, device: torch.device) -> int:
    """Most positions in a batch whose logits are over a vocabulary of that size."""
    times = 1 if device.type == "cpu" else ON_GPU
    return max(1, min(times * POSITIONS, times * LOGITS // vocab_size))


def batches(
    rows: Sequence[Sequence[int]],
    device: torch.device,
    special: Special,
    positions: int = POSITIONS,
    given: Sequence[int] | None = None,
) -> Iterator[RowBatch]:
    """All rows, the shortest first, in batches of at most `positions` positions with padding, at least one row.

    Args:
        rows: token ids.
        device: where the tensors are to be.
        special: ids of the special tokens.
        positions: most positions in a batch.
        given: how many tokens at the beginning of each row are given; by default ``<s>`` only.
    """
    for index in by_length([len(row) for row in rows], positions):
        ids_BL, length_B = map(torch.from_numpy, pad([rows[i] for i in index], special.pad))
        position_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
        real_BL = (position_BL < length_B[:, None]).long()
        given_B1 = None if given is None else torch.tensor([[given[i]] for i in index], device=device)
        yield RowBatch(index, ids_BL.to(device), real_BL.to(device), position_BL.to(device), special, given_B1)


def length_nats(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
    """Nats that it takes to say how long each row is, and whether it ends or goes on in another row: [N].

    A model that sees a whole row knows both beforehand, so a likelihood that leaves them out is not one. Lengths have
    the probabilities of a histogram with half a count added. Its last index counts texts that fill a row together with
    longer ones, so that a full row takes ln 2 more to say which of the two it is; shorter rows always end.
    """
    full, total = len(lengths) - 1, sum(lengths) + 0.5 * (len(lengths) - 1)
    chances = [(lengths[len(row)] + 0.5) / total / (2 if len(row) == full else 1) for row in rows]
    return -torch.tensor(chances, dtype=torch.float64).log()

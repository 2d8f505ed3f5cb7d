"""The documents of a corpus in windows that fit a row: what is in each, without copying what Arrow holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import datasets

Documents: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"
Ids = np.ndarray[Any, np.dtype[Any]]
Places = tuple[Ids, Ids, Ids]
"""Of some windows the number of the document, where in it the window begins, and its length in tokens, each [N]."""


class Tokens:
    """The token ids of documents, which stay where Arrow holds them."""

    def __init__(self, documents: Documents) -> None:
        flat = list(_flat_arrays(documents))
        self._values = [values for values, _ in flat]
        self._first = _sum_up([len(offsets) - 1 for _, offsets in flat])
        self._begin_D = np.concatenate([np.zeros(0, np.int64), *(offsets[:-1] for _, offsets in flat)])
        self.length_D = np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for _, offsets in flat)])

    def read(self, places: Places) -> Ids:
        """The tokens of windows one after the other, int64 [T]; the windows are in the order of the documents."""
        document_N, start_N, length_N = places
        source_T = count_up(self._begin_D[document_N] + start_N, length_N)
        ends = _sum_up(length_N)[np.searchsorted(document_N, self._first)]
        ids_T = np.empty(len(source_T), np.int64)
        for array in np.flatnonzero(np.diff(ends)):
            part = slice(ends[array], ends[array + 1])
            ids_T[part] = self._values[array][source_T[part]]
        return ids_T


def _flat_arrays(documents: Documents) -> Iterator[tuple[Ids, Ids]]:
    """Token ids of many documents in one array, and the offsets at which each begins and the last ends."""
    if hasattr(documents, "with_format"):
        for chunk in documents.with_format("arrow")[:]["ids"].chunks:
            if len(chunk):
                yield chunk.values.to_numpy(), chunk.offsets.to_numpy()
    elif len(documents):
        ids = [np.asarray(document["ids"], dtype=np.int64) for document in documents]
        yield np.concatenate(ids), np.cumsum([0, *map(len, ids)])


def count_up(start_N: Ids, length_N: Ids) -> Ids:
    """From each start as many consecutive numbers as its length says, one run after the other: [T]."""
    end_N = np.cumsum(length_N)
    return np.repeat(start_N - end_N + length_N, length_N) + np.arange(length_N.sum())


def _sum_up(counts: Ids | list[int]) -> Ids:
    """The sums of the first 0, 1, 2 and so on of N counts: [N + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class Windows:
    """All documents in windows of at most `max_length` tokens; a short one is a window of its own."""

    def __init__(self, documents: Documents, max_length: int) -> None:
        self.tokens, self._max_length = Tokens(documents), max_length
        self._first = _sum_up(-(-self.tokens.length_D // max_length))

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def positions(self) -> int:
        """Number of positions that all of them fill."""
        return int(self.tokens.length_D.sum())

    def draw_shifts(self, random: np.random.Generator) -> Ids:
        """Draw for every document by how much its first window is shorter than it could be, [D]."""
        slack_D: Ids = np.diff(self._first) * self._max_length - self.tokens.length_D
        shift_D: Ids = random.integers(slack_D + 1, dtype=np.int32)
        return shift_D

    def cut(self, window_N: Ids, shift_D: Ids) -> Places:
        """What some windows, given by their numbers, hold where the documents are shifted by that much."""
        document_N = np.searchsorted(self._first, window_N, side="right") - 1
        begin_N = (window_N - self._first[document_N]) * self._max_length - shift_D[document_N]
        end_N = np.minimum(begin_N + self._max_length, self.tokens.length_D[document_N])
        start_N = np.maximum(begin_N, 0)
        return document_N, start_N, end_N - start_N

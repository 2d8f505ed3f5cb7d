"""Rows of whole documents side by side, shuffled, sharded, batched and resumable: Grain's best-fit packing.

Segments keep the documents of a row apart; see Krell et al. 2021 (arXiv 2107.02027) for packing without mixing.
"""

from __future__ import annotations

import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from scorelm.text.tokenizer import PAD

if TYPE_CHECKING:
    import datasets
    import grain

Documents: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"
Ids = np.ndarray[Any, np.dtype[Any]]
Batch = dict[str, Ids]

_POSITIONS_AT_A_TIME = 1 << 17  # more fill rows better, and take longer to the first batch and to resume
_LEAST_BINS = 64  # rows that are packed at a time
_LARGEST_TABLE = 1 << 16  # documents
_HARMLESS = "Failed to load jax profiler"


def packed_rows(
    documents: Documents,
    *,
    max_length: int,
    rows: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    epochs: int | None = None,
) -> grain.IterDataset[Batch]:
    """Pack documents (column ``ids``) into batches of ``ids``, ``segment`` and ``position``: int64 [rows, max_length].

    Segments count from 1 within a row, positions from 0 within a document; padding is ``PAD``, segment 0, position 0.
    Every epoch has a new order and gives each of ``world`` ranks its own documents; ``epochs=None`` never ends, and a
    finite number fills its last batch up with empty rows. Of a document longer than ``max_length`` each epoch takes
    one random window. Up to 131,072 positions are packed at a time, so a row may hold documents of two epochs.
    ``it = iter(...)`` has ``it.get_state()``, which JSON can hold, and ``it.set_state(state)``, which repeats exactly.

    Raises:
        ValueError: a size that is not positive, a rank outside the world, or fewer documents than ranks.
    """
    grain = _grain()
    source = _Documents(documents)
    _check(len(source), max_length=max_length, rows=rows, rank=rank, world=world)
    epoch_positions = source.positions(max_length) // world
    stream = grain.MapDataset.source(_Epochs(source, max_length, seed, rank, world, epochs)).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    packed = grain.experimental.BestFitPackIterDataset(
        stream,
        length_struct={"ids": max_length},
        num_packing_bins=max(_LEAST_BINS, min(_POSITIONS_AT_A_TIME, epoch_positions) // max_length),
        padding_struct={"ids": PAD},
        seed=int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]),
    )
    return packed.batch(rows, batch_fn=_Stack(rows, max_length))


def packing_efficiency(batch: Mapping[str, Ids]) -> float:
    """Return the share of a batch's positions that hold a token rather than padding, between 0 and 1."""
    return float(np.mean(np.asarray(batch["segment"]) > 0))


def first_fit(pieces: Sequence[Ids], width: int) -> Ids:
    """Put pieces, the longest first, each into the first row with room for it: [R, width] of ids, padded by -1."""
    found: list[list[Ids]] = []
    used: list[int] = []
    for piece in sorted(pieces, key=len, reverse=True):
        place = next((k for k, n in enumerate(used) if n + len(piece) <= width), len(found))
        if place == len(found):
            found.append([])
            used.append(0)
        found[place].append(piece)
        used[place] += len(piece)
    index_RW = np.full((len(found), width), -1)
    for place, parts in enumerate(found):
        index_RW[place, : used[place]] = np.concatenate(parts)
    return index_RW


class _Documents:
    """Random access to token ids, without a copy where Arrow already holds them."""

    def __init__(self, documents: Documents) -> None:
        self._pieces: list[tuple[Ids, Ids]] = []
        self._starts = [0]
        for values, offsets in _arrays(documents):
            self._pieces.append((values, offsets))
            self._starts.append(self._starts[-1] + len(offsets) - 1)

    def __len__(self) -> int:
        return self._starts[-1]

    def positions(self, max_length: int) -> int:
        """Positions that an epoch fills."""
        return sum(int(np.minimum(np.diff(offsets), max_length).sum()) for _, offsets in self._pieces)

    def __getitem__(self, index: int) -> Ids:
        piece = bisect_right(self._starts, index) - 1
        values, offsets = self._pieces[piece]
        at = index - self._starts[piece]
        return values[offsets[at] : offsets[at + 1]]


def _arrays(documents: Documents) -> Iterator[tuple[Ids, Ids]]:
    """Flat token ids and the offsets of the documents in them."""
    if hasattr(documents, "with_format"):
        for chunk in documents.with_format("arrow")[:]["ids"].chunks:
            if len(chunk):
                yield chunk.values.to_numpy(), chunk.offsets.to_numpy()
    elif len(documents):
        ids = [np.asarray(document["ids"], dtype=np.int64) for document in documents]
        yield np.concatenate(ids), np.cumsum([0, *map(len, ids)])


class _Epochs:
    """One rank's documents, epoch after epoch in a new order, each cut to a random window where it is too long."""

    def __init__(
        self, documents: _Documents, max_length: int, seed: int, rank: int, world: int, epochs: int | None
    ) -> None:
        self._documents = documents
        self._max_length = max_length
        self._seed = seed
        self._rank = rank
        self._world = world
        self._share = len(range(rank, len(documents), world))
        self._length = sys.maxsize if epochs is None else epochs * self._share
        self._in_epoch = lru_cache(maxsize=1)(self._order)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        epoch, at = divmod(index, self._share)
        document = self._in_epoch(epoch)(self._rank + at * self._world)
        ids = self._documents[document]
        spare = len(ids) - self._max_length
        start = int(np.random.default_rng((self._seed, epoch, document)).integers(spare + 1)) if spare > 0 else 0
        return {"ids": ids[start : start + self._max_length]}

    def _order(self, epoch: int) -> Callable[[int], int]:
        """Which document is at which place: a table for few, and Grain's shuffle, which is slow for few, for many."""
        size = len(self._documents)
        if size <= _LARGEST_TABLE:
            table: list[int] = np.random.default_rng((self._seed, epoch)).permutation(size).tolist()
            return table.__getitem__
        word = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        return partial(_grain().experimental.index_shuffle, max_index=size - 1, seed=word, rounds=4)


class _Stack:
    """Rows as Grain packs them to one batch under our names, filled up with empty rows."""

    def __init__(self, rows: int, max_length: int) -> None:
        self._shape = (rows, max_length)

    def __call__(self, packed: Sequence[Batch]) -> Batch:
        batch = {
            "ids": np.full(self._shape, PAD, dtype=np.int64),
            "segment": np.zeros(self._shape, dtype=np.int64),
            "position": np.zeros(self._shape, dtype=np.int64),
        }
        names = {"ids": "ids", "segment": "ids_segment_ids", "position": "ids_positions"}
        for ours, theirs in names.items():
            for row, values in enumerate(packed):
                batch[ours][row] = values[theirs]
        return batch


def _check(documents: int, *, max_length: int, rows: int, rank: int, world: int) -> None:
    for name, size in {"max_length": max_length, "rows": rows, "world": world}.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, not {size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be at least 0 and below world {world}, not {rank}")
    if documents < world:
        raise ValueError(f"{documents} documents are too few to share among {world} ranks")


def _grain() -> Any:
    """Grain, imported without its warning that jax, which is not needed, is absent."""
    with _without_warning(_HARMLESS):
        import grain
        import grain.experimental
    return grain


@contextmanager
def _without_warning(beginning: str) -> Iterator[None]:
    from absl import logging as absl_logging

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger = absl_logging.get_absl_logger()
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)

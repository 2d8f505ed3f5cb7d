"""Pack whole documents side by side into rows, shuffled, shared among ranks, batched and resumable.

Grain's best-fit packing does the work. Segments keep the documents of a row apart, as in Krell et al. 2021
(arXiv 2107.02027).
"""

from __future__ import annotations

import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from scorelm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import grain

Documents: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"
Ids = np.ndarray[Any, np.dtype[Any]]
PackedRows = dict[str, Ids]
"""``ids``, ``segment`` and ``position`` of some rows, each int64 [rows, width]."""

_POSITIONS_AT_A_TIME = 1 << 17  # more fill rows better, and take longer to the first batch and to resume
_LEAST_BINS = 64  # fewest rows that are packed at a time
_LARGEST_TABLE = 1 << 16  # most documents whose order is kept as a table
_HARMLESS = "Failed to load jax profiler"


def packed_rows(
    documents: Documents,
    *,
    max_length: int,
    rows: int,
    pad: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    epochs: int | None = None,
) -> grain.IterDataset[PackedRows]:
    """Pack documents into batches of ``ids``, ``segment`` and ``position``, each int64 [rows, max_length].

    Segments count from 1 within a row, positions from 0 within a document; padding has segment 0 and position 0.
    Every epoch has a new order, in which each rank has its own documents. A document longer than ``max_length`` is cut
    into windows, as few as can hold it and elsewhere in every epoch, so that an epoch has all of it. Up to 131,072
    positions are packed at a time, so a row may hold documents of two epochs. ``it = iter(...)`` has
    ``it.get_state()``, which JSON can hold, and ``it.set_state(state)``, after which the same batches come again.

    Args:
        documents: rows with a column ``ids``.
        max_length: width of a row in tokens.
        rows: rows in a batch.
        pad: id that fills a row up, from the tokenizer.
        seed: of the order and the windows.
        rank: whose documents to pack, of ``world``.
        world: number of ranks.
        epochs: times to go over the documents, with empty rows at the end of the last batch; None never ends.

    Raises:
        InputError: a size that is not positive, a rank outside the world, or fewer documents than ranks.
    """
    grain = import_grain()
    _check_sizes(max_length=max_length, rows=rows, rank=rank, world=world)
    windows = Windows(documents, max_length)
    if len(windows) < world:
        raise InputError(f"{len(windows)} documents are too few to share among {world} ranks")
    stream = grain.MapDataset.source(_Epochs(windows, seed, rank, world, epochs)).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    return pack(stream, max_length, rows, pad, (seed, rank), windows.documents.positions // world)


def pack(
    stream: Any, max_length: int, rows: int, pad: int, seed: tuple[int, int], positions: int = _POSITIONS_AT_A_TIME
) -> grain.IterDataset[PackedRows]:
    """Pack what a stream gives, mappings with ``ids`` of at most `max_length` tokens, into batches of rows.

    Args:
        stream: a `grain.IterDataset`.
        max_length: as the others of `packed_rows`.
        rows: likewise.
        pad: likewise.
        seed: of the order of the rows.
        positions: of an epoch; no more are packed at a time.
    """
    packed = import_grain().experimental.BestFitPackIterDataset(
        stream,
        length_struct={"ids": max_length},
        num_packing_bins=max(_LEAST_BINS, min(_POSITIONS_AT_A_TIME, positions) // max_length),
        padding_struct={"ids": pad},
        seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
    )
    return packed.batch(rows, batch_fn=_Stack(rows, max_length, pad))


def packing_efficiency(batch: Mapping[str, Ids]) -> float:
    """Return the share of a batch's positions that hold a token and not padding, between 0 and 1."""
    return float(np.mean(np.asarray(batch["segment"]) > 0))


def first_fit(pieces: Sequence[Ids], width: int) -> Ids:
    """Put each piece, the longest first, into the first row with room for it: [R, width], filled up with -1."""
    rows: list[list[Ids]] = []
    used: list[int] = []
    for piece in sorted(pieces, key=len, reverse=True):
        place = next((k for k, n in enumerate(used) if n + len(piece) <= width), len(rows))
        if place == len(rows):
            rows.append([])
            used.append(0)
        rows[place].append(piece)
        used[place] += len(piece)
    index_RW = np.full((len(rows), width), -1)
    for place, parts in enumerate(rows):
        index_RW[place, : used[place]] = np.concatenate(parts)
    return index_RW


class _Documents:
    """Random access to the token ids of documents, not copied where Arrow already holds them."""

    def __init__(self, documents: Documents) -> None:
        self._pieces: list[tuple[Ids, Ids]] = []
        self._starts = [0]
        for values, offsets in _flat_arrays(documents):
            self._pieces.append((values, offsets))
            self._starts.append(self._starts[-1] + len(offsets) - 1)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def positions(self) -> int:
        """Number of positions that an epoch fills."""
        return int(self.lengths.sum())

    @cached_property
    def lengths(self) -> Ids:
        """Tokens in every document."""
        return np.concatenate([np.diff(offsets) for _, offsets in self._pieces]) if self._pieces else np.zeros(0, int)

    def __getitem__(self, index: int) -> Ids:
        piece = bisect_right(self._starts, index) - 1
        values, offsets = self._pieces[piece]
        at = index - self._starts[piece]
        return values[offsets[at] : offsets[at + 1]]


def _flat_arrays(documents: Documents) -> Iterator[tuple[Ids, Ids]]:
    """Token ids of many documents in one array, and the offsets at which each begins and the last ends."""
    if hasattr(documents, "with_format"):
        for chunk in documents.with_format("arrow")[:]["ids"].chunks:
            if len(chunk):
                yield chunk.values.to_numpy(), chunk.offsets.to_numpy()
    elif len(documents):
        ids = [np.asarray(document["ids"], dtype=np.int64) for document in documents]
        yield np.concatenate(ids), np.cumsum([0, *map(len, ids)])


class Windows:
    """All documents in windows of at most `max_length` tokens; a short one is a window of its own."""

    def __init__(self, documents: Documents, max_length: int) -> None:
        self.documents, self._max_length = _Documents(documents), max_length
        counts = np.maximum(-(-self.documents.lengths // max_length), 1)
        self._first = np.cumsum([0, *counts]) if (counts > 1).any() else None

    def __len__(self) -> int:
        return len(self.documents) if self._first is None else int(self._first[-1])

    def cut(self, index: int, seed: tuple[int, ...]) -> Ids:
        """The tokens of a window; `seed` decides where its document is cut."""
        if self._first is None:
            return self.documents[index]
        document = int(np.searchsorted(self._first, index, side="right")) - 1
        ids, count = self.documents[document], int(self._first[document + 1] - self._first[document])
        slack = count * self._max_length - len(ids)
        shift = int(np.random.default_rng((*seed, document)).integers(min(slack, self._max_length - 1) + 1))
        start = (index - int(self._first[document])) * self._max_length - shift
        return ids[max(start, 0) : start + self._max_length]


class _Epochs:
    """One rank's windows, epoch after epoch in a new order."""

    def __init__(self, windows: Windows, seed: int, rank: int, world: int, epochs: int | None) -> None:
        self._windows = windows
        self._seed = seed
        self._rank = rank
        self._world = world
        self._share = len(range(rank, len(windows), world))
        self._length = sys.maxsize if epochs is None else epochs * self._share
        self._order_of = lru_cache(maxsize=1)(self._shuffle)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Ids]:
        epoch, at = divmod(index, self._share)
        window = self._order_of(epoch)(self._rank + at * self._world)
        return {"ids": self._windows.cut(window, (self._seed, epoch))}

    def _shuffle(self, epoch: int) -> Callable[[int], int]:
        """Return what gives the document at each place of an epoch's order.

        That is a table if there are few, and otherwise Grain's shuffle, which is slower but needs no memory.
        """
        size = len(self._windows)
        if size <= _LARGEST_TABLE:
            table: list[int] = np.random.default_rng((self._seed, epoch)).permutation(size).tolist()
            return table.__getitem__
        word = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        return partial(import_grain().experimental.index_shuffle, max_index=size - 1, seed=word, rounds=4)


class _Stack:
    """Makes one batch, under our names, of rows as Grain packs them, and fills it up with empty rows."""

    def __init__(self, rows: int, max_length: int, pad: int) -> None:
        self._shape, self._pad = (rows, max_length), pad

    def __call__(self, packed: Sequence[dict[str, Ids]]) -> PackedRows:
        batch = {
            "ids": np.full(self._shape, self._pad, dtype=np.int64),
            "segment": np.zeros(self._shape, dtype=np.int64),
            "position": np.zeros(self._shape, dtype=np.int64),
        }
        names = {"ids": "ids", "segment": "ids_segment_ids", "position": "ids_positions"}
        for ours, theirs in names.items():
            for row, values in enumerate(packed):
                batch[ours][row] = values[theirs]
        return batch


def _check_sizes(*, max_length: int, rows: int, rank: int, world: int) -> None:
    for name, size in {"max_length": max_length, "rows": rows, "world": world}.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, not {size}")
    if not 0 <= rank < world:
        raise InputError(f"rank must be at least 0 and below world {world}, not {rank}")


def import_grain() -> Any:
    """Import Grain without its warning that jax, which is not needed, is absent."""
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

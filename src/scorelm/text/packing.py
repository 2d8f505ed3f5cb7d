"""Pack whole documents side by side into rows, shuffled, shared among ranks, batched and resumable.

A chunk of some thousands of documents is packed at a time, and its rows are then handed out in batches. So the number
of the chunk and how many of its rows are taken are all that there is to remember.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Protocol, Self

import numpy as np

from scorelm.errors import InputError
from scorelm.text.fit import PackedRows, empty_rows, fill_rows
from scorelm.text.windows import Documents, Ids, Tokens, Windows

_POSITIONS_AT_A_TIME = 1 << 17  # more fill rows better, and take longer to the first batch and to resume
_LEAST_ROWS = 64  # fewest rows that are packed at a time


class Chunks(Protocol):
    """An iterator that packs some documents at a time, into as many rows as it takes."""

    def __next__(self) -> PackedRows: ...

    def get_state(self) -> Any:
        """Where to go on, for `set_state`; JSON can hold it."""

    def set_state(self, state: Any) -> None:
        """Go on from there."""


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
) -> Packed:
    """Pack documents into batches of ``ids``, ``segment`` and ``position``, each int64 [rows, max_length].

    Segments count from 1 within a row, positions from 0 within a document; padding has segment 0 and position 0.
    Every epoch has a new order, in which each rank has its own documents. A document longer than ``max_length`` is cut
    into windows, as few as can hold it and elsewhere in every epoch, so that an epoch has all of it. About 131,072
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
    _check_sizes(max_length=max_length, rows=rows, rank=rank, world=world)
    windows = Windows(documents, max_length)
    if len(windows) < world:
        raise InputError(f"{len(windows)} documents are too few to share among {world} ranks")
    return Packed(partial(_Shuffled, windows, max_length, pad, seed, rank, world, epochs), max_length, rows, pad)


def pack(stream: Any, max_length: int, rows: int, pad: int, seed: tuple[int, int]) -> Packed:
    """Pack what a stream gives, mappings with ``ids`` of at most `max_length` tokens, into batches of rows.

    Args:
        stream: endless; its iterators have `get_state` and `set_state`.
        max_length: as the others of `packed_rows`.
        rows: likewise.
        pad: likewise.
        seed: of the order of the rows.
    """
    return Packed(lambda: _Collected(iter(stream), max_length, pad, seed), max_length, rows, pad)


def packing_efficiency(batch: Mapping[str, Ids]) -> float:
    """Return the share of a batch's positions that hold a token and not padding, between 0 and 1."""
    return float(np.mean(np.asarray(batch["segment"]) > 0))


class Packed:
    """Batches of rows, from their beginning each time that they are iterated over."""

    def __init__(self, chunks: Callable[[], Chunks], width: int, rows: int, pad: int) -> None:
        self._chunks, self._shape, self._pad = chunks, (rows, width), pad

    def __iter__(self) -> Batches:
        return Batches(self._chunks(), self._shape, self._pad)


class Batches:
    """The rows of chunks, so many at a time; what a chunk leaves over goes into a batch with the next one's first.

    Args:
        chunks: packed rows.
        shape: rows in a batch, and their width.
        pad: id of empty rows.
    """

    def __init__(self, chunks: Chunks, shape: tuple[int, int], pad: int) -> None:
        self._chunks, self._shape, self._pad = chunks, shape, pad
        self.set_state({"chunk": chunks.get_state(), "taken": 0})

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there; nothing is packed before the next batch is wanted."""
        self._before, self._taken = state["chunk"], state["taken"]
        self._chunks.set_state(self._before)
        self._chunk: PackedRows | None = None

    def get_state(self) -> dict[str, Any]:
        """Where to go on: the chunk, and how many of its rows are taken; JSON can hold it."""
        return {"chunk": self._before, "taken": self._taken}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedRows:
        parts, missing = list[PackedRows](), self._shape[0]
        while missing and (chunk := self._find_rows()) is not None:
            parts.append({name: values[self._taken : self._taken + missing] for name, values in chunk.items()})
            self._taken += len(parts[-1]["ids"])
            missing -= len(parts[-1]["ids"])
        if not parts:
            raise StopIteration
        if missing:
            parts.append(empty_rows(missing, self._shape[1], self._pad))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _find_rows(self) -> PackedRows | None:
        """The chunk with the next row, if there is one."""
        while self._chunk is None or self._taken == len(self._chunk["ids"]):
            if self._chunk is not None:
                self._before, self._taken = self._chunks.get_state(), 0
            self._chunk = next(self._chunks, None)
            if self._chunk is None:
                return None
        return self._chunk


class _Shuffled:
    """One rank's windows, epoch after epoch in a new order, as many at a time as fill a chunk on average."""

    def __init__(
        self, windows: Windows, width: int, pad: int, seed: int, rank: int, world: int, epochs: int | None
    ) -> None:
        self._windows, self._width, self._pad = windows, width, pad
        self._seed, self._rank, self._world = seed, rank, world
        self._share = len(range(rank, len(windows), world))
        self._end = sys.maxsize if epochs is None else epochs * self._share
        positions = max(_LEAST_ROWS * width, min(_POSITIONS_AT_A_TIME, windows.positions // world))
        self._size = -(-positions * len(windows) // windows.positions)
        self._number = 0
        self._draw_epoch = lru_cache(maxsize=1)(self._draw)

    def get_state(self) -> int:
        return self._number

    def set_state(self, state: int) -> None:
        self._number = state

    def __next__(self) -> PackedRows:
        begin = self._number * self._size
        end = min(begin + self._size, self._end)
        if begin >= end:
            raise StopIteration
        parts = []
        for epoch in range(begin // self._share, -(-end // self._share)):
            order, shift_D = self._draw_epoch(epoch)
            first = epoch * self._share
            parts.append(self._windows.cut(order[max(begin - first, 0) : end - first], shift_D))
        document_N, start_N, length_N = map(np.concatenate, zip(*parts, strict=True))
        random = np.random.default_rng((self._seed, self._rank, self._number, 1))
        self._number += 1
        return fill_rows(self._windows.tokens, (document_N, start_N, length_N), self._width, self._pad, random)

    def _draw(self, epoch: int) -> tuple[Ids, Ids]:
        """The windows of this rank in the order of an epoch, and where documents are cut in it, alike in all ranks."""
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._windows))[self._rank :: self._world].copy()
        return order, self._windows.draw_shifts(random)


class _Collected:
    """What a stream gives, as much at a time as makes a chunk."""

    def __init__(self, stream: Any, width: int, pad: int, seed: tuple[int, int]) -> None:
        self._stream, self._seed = stream, seed
        self._width, self._pad = width, pad
        self._number = 0

    def get_state(self) -> dict[str, Any]:
        return {"number": self._number, "stream": self._stream.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._number = state["number"]
        self._stream.set_state(state["stream"])

    def __next__(self) -> PackedRows:
        texts, missing = [], max(_LEAST_ROWS * self._width, _POSITIONS_AT_A_TIME)
        while missing > 0:
            texts.append(next(self._stream))
            missing -= len(texts[-1]["ids"])
        tokens, random = Tokens(texts), np.random.default_rng((*self._seed, self._number, 1))
        self._number += 1
        places = (np.arange(len(texts)), np.zeros(len(texts), np.int64), tokens.length_D)
        return fill_rows(tokens, places, self._width, self._pad, random)


def _check_sizes(*, max_length: int, rows: int, rank: int, world: int) -> None:
    for name, size in {"max_length": max_length, "rows": rows, "world": world}.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, not {size}")
    if not 0 <= rank < world:
        raise InputError(f"rank must be at least 0 and below world {world}, not {rank}")

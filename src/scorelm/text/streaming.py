"""The rows of a stream: a dataset of the hub that is tokenised and packed while it is read, and resumed exactly.

A stream is read in chunks of records, and the windows of each are shuffled among themselves. So the epoch, the state of
`datasets` before the chunk, the number of the chunk and a place in it are all that there is to remember.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from scorelm.config.text import DataConfig
from scorelm.errors import InputError
from scorelm.text.corpus import quiet
from scorelm.text.packing import Packed, pack
from scorelm.text.records import Counts
from scorelm.text.sides import Sorter
from scorelm.text.source import Hub, Reading
from scorelm.text.tokenizer import Tokenizer
from scorelm.text.windows import Windows


@dataclass(frozen=True)
class Stream:
    """What is trained on of a dataset that is not fetched as a whole."""

    source: Hub
    tokenizer: Tokenizer
    holdout: float
    """Share of the examples that are left out, as `scorelm.text.corpus.load_corpus` does."""

    def packed_rows(self, *, max_length: int, rows: int, seed: int, rank: int, world: int) -> Packed:
        """Endless batches of rows, as `scorelm.text.packing.packed_rows` makes them of documents that are there.

        Every rank reads its own part of the records: its own files, where their number can be divided by that of
        ranks, and otherwise all of them, of which it leaves out the records of the others.
        """
        windows = Windowed(self, max_length, seed, rank, world)
        return pack(windows, max_length, rows, self.tokenizer.special.pad, (seed, rank))


def open_stream(config: DataConfig, tokenizer: Tokenizer) -> Stream:
    """The stream of a dataset on the hub; see `scorelm.text.source.open_source` for errors."""
    with quiet():
        return Stream(Hub(config.source, Reading.of(config)), tokenizer, config.holdout)


class Windowed:
    """The windows of at most `max_length` tokens that one rank of `world` reads, epoch after epoch."""

    def __init__(self, stream: Stream, max_length: int, seed: int, rank: int, world: int) -> None:
        self.stream, self.max_length = stream, max_length
        self.seed = seed
        self.rank, self.world = rank, world

    def __iter__(self) -> _Place:
        return _Place(self)


class _Place:
    """A place in the windows of a rank."""

    def __init__(self, of: Windowed) -> None:
        self._of = of
        self._rows = of.stream.source.part(of.rank, of.world)
        self._beginning = self._rows.state_dict()
        self.set_state({"epoch": 0, "rows": None, "chunk": 0, "at": 0})

    def set_state(self, state: dict[str, Any]) -> None:
        """Go there; nothing is read before the next window is wanted."""
        self._epoch, self._before, self._chunk, self._at = (state[name] for name in ("epoch", "rows", "chunk", "at"))
        self._rows.load_state_dict(self._beginning if self._before is None else self._before)
        self._records: Iterator[dict[str, Any]] = iter(self._rows)
        self._windows: list[list[int]] | None = None
        self._found = self._at > 0

    def get_state(self) -> dict[str, Any]:
        """Where to go on, for `set_state`; JSON can hold it."""
        return {"epoch": self._epoch, "rows": self._before, "chunk": self._chunk, "at": self._at}

    def __next__(self) -> dict[str, list[int]]:
        while self._windows is None or self._at >= len(self._windows):
            if self._windows is not None:
                self._before, self._chunk, self._at = self._rows.state_dict(), self._chunk + 1, 0
            self._read()
        self._found, self._at = True, self._at + 1
        return {"ids": self._windows[self._at - 1]}

    def _read(self) -> None:
        """Read the windows of a chunk, or begin again at the end.

        Raises:
            InputError: the source cannot be read, or this part of it has no text.
        """
        of, stream = self._of, self._of.stream
        texts = stream.source.read_chunk(self._records)
        if not len(texts):
            if not self._found:
                part = f"part {of.rank + 1} of {of.world} of " if of.world > 1 else ""
                raise InputError(f"{part}{stream.source.name} has no text to train on: lower --shards or --holdout")
            self.set_state({"epoch": self._epoch + 1, "rows": None, "chunk": 0, "at": 0})
            return
        counts = Counts()
        sorter, documents = Sorter(stream.holdout, counts), []
        for own, lead in stream.source.examples(texts, counts):
            whole, held_out = sorter.sort(own, lead)
            kept = (text for text, out in zip(whole.to_pylist(), held_out, strict=True) if not out)
            documents += [{"ids": stream.tokenizer.encode_document(text)} for text in kept]
        windows = Windows(documents, of.max_length)
        random = np.random.default_rng((of.seed, self._epoch, self._chunk, of.rank))
        places = windows.cut(random.permutation(len(windows)), windows.draw_shifts(random))
        self._windows = [documents[n]["ids"][start : start + length] for n, start, length in zip(*places, strict=True)]

"""Batches that are packed ahead of the step that takes them: by a thread, or for a GPU by processes."""

from __future__ import annotations

import os
import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Ahead:
    """An iterator of batches, the next of which a thread packs meanwhile.

    Its state is that of the batches that were taken, so that a run resumes with the next one.

    Args:
        batches: an iterator with `get_state` and `set_state`.
    """

    def __init__(self, batches: Any) -> None:
        self._batches, self._state = batches, batches.get_state()
        self._thread = ThreadPoolExecutor(1, "packing")
        self._next: Future[tuple[dict[str, np.ndarray], Any]] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch, self._state = (self._next or self._thread.submit(self._pack)).result()
        self._next = self._thread.submit(self._pack)
        return batch

    def _pack(self) -> tuple[dict[str, np.ndarray], Any]:
        return next(self._batches), self._batches.get_state()

    def get_state(self) -> Any:
        """Where to go on after the batches that were taken."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Go on from there."""
        if self._next is not None:
            self._next.exception()
        self._next, self._state = None, state
        self._batches.set_state(state)


class Streams(IterableDataset[tuple[int, dict[str, np.ndarray], Any]]):
    """What processes read, the stream of its own number each: that number, a batch, and the state after it."""

    def __init__(self, streams: Sequence[Any], states: Sequence[Any]) -> None:
        self.streams, self.states = streams, states

    def __iter__(self) -> Iterator[tuple[int, dict[str, np.ndarray], Any]]:
        info = get_worker_info()
        assert info is not None
        batches = iter(self.streams[info.id])
        if self.states[info.id] is not None:
            batches.set_state(self.states[info.id])
        while True:
            yield info.id, next(batches), batches.get_state()


class Packers:
    """Streams of batches, each packed by a process of its own, which is what a GPU needs to be fed.

    Like `Ahead`, each stream has the state of the batches that were taken from it. Nothing that the processes read
    leads back here: PyTorch waits 5 seconds for each process of a loader that is part of a cycle of references.

    Args:
        streams: endless ones, whose iterators have `get_state` and `set_state`.
    """

    def __init__(self, streams: Sequence[Any]) -> None:
        self.streams = streams
        self.states: list[Any] = [None] * len(streams)
        self._waiting: list[deque[tuple[dict[str, np.ndarray], Any]]] = [deque() for _ in streams]
        self._loader: Iterator[Any] | None = None

    def take(self, number: int, again: bool = False) -> dict[str, np.ndarray]:
        """The next batch of a stream; where a process has ended, all are started `again`, once."""
        if self._loader is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")  # where there are fewer cores
                loader = DataLoader(
                    Streams(self.streams, tuple(self.states)), batch_size=None, num_workers=len(self.streams),
                    collate_fn=as_it_is, worker_init_fn=stand_apart, multiprocessing_context="fork",
                )  # fmt: skip
                self._loader = iter(loader)
        while not self._waiting[number]:
            try:
                of, batch, state = next(self._loader)
            except RuntimeError:  # a process has ended, and its batches with it
                if again:
                    raise
                self.go_on_from(number, self.states[number])
                return self.take(number, again=True)
            self._waiting[of].append((batch, state))
        batch, self.states[number] = self._waiting[number].popleft()
        return batch

    def go_on_from(self, number: int, state: Any) -> None:
        """Let a stream go on from a state; all begin anew from what was taken of them."""
        self.states[number], self._loader = state, None
        for waiting in self._waiting:
            waiting.clear()


def as_it_is(item: Any) -> Any:
    """What a process has made, unchanged."""
    return item


def stand_apart(number: int) -> None:
    """Leave Ctrl-C to the process that trains, and end without an error when a whole job is told to: that one saves."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


@dataclass
class Turn:
    """One stream of `Packers`, as `Ahead` has one."""

    packers: Packers
    number: int

    def __next__(self) -> dict[str, np.ndarray]:
        return self.packers.take(self.number)

    def get_state(self) -> Any:
        """Where to go on after the batches that were taken."""
        return self.packers.states[self.number]

    def set_state(self, state: Any) -> None:
        """Go on from there."""
        self.packers.go_on_from(self.number, state)

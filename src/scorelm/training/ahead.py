"""Batches that a thread packs ahead of the step that takes them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np


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

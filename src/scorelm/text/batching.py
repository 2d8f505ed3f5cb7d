"""Rows of unequal length side by side: which go together, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def by_length(lengths: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Numbers of rows, the shortest first, in groups of at most `positions` positions with padding, at least one row.

    Args:
        lengths: of every row.
        positions: most positions in a group.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        take = 1
        while take < len(order) and (take + 1) * lengths[order[take]] <= positions:
            take += 1
        yield order[:take]
        order = order[take:]


def pad(rows: Sequence[Sequence[int]], filler: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows as one array [B, L], padded behind by `filler`, and their lengths [B]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.full((len(rows), int(lengths.max(initial=0))), filler, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded, lengths

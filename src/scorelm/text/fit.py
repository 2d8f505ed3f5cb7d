"""Windows side by side in rows: which row each goes into, by the lengths alone, and all rows written at once.

Segments keep the documents of a row apart, as in Krell et al. 2021 (arXiv 2107.02027).
"""

from __future__ import annotations

import numpy as np

from scorelm.text.windows import Ids, Places, Tokens, count_up

PackedRows = dict[str, Ids]
"""``ids``, ``segment`` and ``position`` of some rows, each int64 [rows, width]."""


def fill_rows(tokens: Tokens, places: Places, width: int, pad: int, random: np.random.Generator) -> PackedRows:
    """Pack windows of at most `width` tokens into few rows, which come in a random order."""
    document_N, start_N, length_N = places
    row_N = best_fit(length_N, width)
    count = int(row_N.max()) + 1
    row_N = random.permutation(count)[row_N]
    segment_N, column_N = line_up(row_N, length_N)
    by_document = np.argsort(document_N)
    document_N, start_N, length_N = document_N[by_document], start_N[by_document], length_N[by_document]
    at_T = count_up((row_N * width + column_N)[by_document], length_N)
    packed = empty_rows(count, width, pad)
    packed["ids"].ravel()[at_T] = tokens.read((document_N, start_N, length_N))
    packed["segment"].ravel()[at_T] = np.repeat(segment_N[by_document], length_N)
    packed["position"].ravel()[at_T] = count_up(np.zeros_like(length_N), length_N)
    return packed


def best_fit(length_N: Ids, width: int) -> Ids:
    """The row of each piece, the longest first: the fullest that has room for it, or else a new one. int64 [N]."""
    rows_with: list[list[int]] = [[] for _ in range(width)]  # by how much room they have
    rooms = 0  # bit n: there is a row with room for n more
    order, found, count = np.argsort(-length_N, kind="stable"), [], 0
    for length in length_N[order].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            room, row, count = width, count, count + 1
        room -= length
        if room:
            rows_with[room].append(row)
            rooms |= 1 << room
        found.append(row)
    row_N = np.empty(len(length_N), np.int64)
    row_N[order] = found
    return row_N


def line_up(row_N: Ids, length_N: Ids) -> tuple[Ids, Ids]:
    """Of each piece which one of its row it is, from 1 on, and the column in which it begins; both int64 [N]."""
    by_row = np.argsort(row_N, kind="stable")
    row, length = row_N[by_row], length_N[by_row]
    first, begin = np.searchsorted(row, row), np.cumsum(length) - length
    segment_N, column_N = np.empty_like(row_N), np.empty_like(row_N)
    segment_N[by_row] = np.arange(len(row)) - first + 1
    column_N[by_row] = begin - begin[first]
    return segment_N, column_N


def empty_rows(count: int, width: int, pad: int) -> PackedRows:
    """Rows of padding."""
    packed = {name: np.zeros((count, width), np.int64) for name in ("ids", "segment", "position")}
    packed["ids"].fill(pad)
    return packed

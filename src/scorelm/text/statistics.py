"""The statistics of a text, as functions of arrays: lengths, repeats, packed rows, tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np

from scorelm.text.packing import packed_rows, packing_efficiency
from scorelm.text.sides import hashes_of, normal_form
from scorelm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

Counted = np.ndarray[Any, np.dtype[Any]]
PACKED = 1 << 18
"""Tokens that are packed to see how full rows become; a larger text is packed in part."""
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
_FEWEST_WIDTHS = 4
_ROWS = 8
_BINS = 10
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Bin:
    """How many lengths are from `low` to `high`, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """How long examples are; `p90` is the length that nine in ten of them do not exceed."""

    total: int
    min: int
    median: int
    mean: float
    p90: int
    p99: int
    max: int
    histogram: tuple[Bin, ...]


@dataclass(frozen=True)
class Packing:
    """What rows of a width make of the training side."""

    width: int
    longer: int
    """Examples that do not fit into a row."""
    windows: int
    """That these are cut into."""
    rows: int
    """In an epoch, about."""
    efficiency: float
    """Share of the positions that hold a token and not padding."""


@dataclass(frozen=True)
class Piece:
    """What a token adds to a text, how often it is there, and which share of all tokens that is."""

    piece: str
    count: int
    share: float


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens a text is made of, ``<s>``, ``</s>`` and ``<pad>`` not counted."""

    size: int
    """Of the tokenizer, special tokens included."""
    used: int
    unused: int
    """Tokens that are not in the text, bytes apart."""
    unused_bytes: int
    unused_pieces: tuple[str, ...]
    """The first of the unused ones."""
    byte_share: float
    """Share of the tokens that are bytes of a character which has no token."""
    unknown_share: float
    """Share of the tokens that are ``<unk>``."""
    entropy_nats: float
    """Of a token drawn from the text: what guessing by frequency alone costs."""
    entropy_bits: float
    commonest: tuple[Piece, ...]


def measure_lengths(lengths: Counted) -> Lengths:
    """Summarise lengths, int64 [N], at least one; quantiles are lengths that there are."""
    median, p90, p99 = (int(q) for q in np.quantile(lengths, (0.5, 0.9, 0.99), method="inverted_cdf"))
    least, most, total = int(lengths.min()), int(lengths.max()), int(lengths.sum())
    return Lengths(total, least, median, total / len(lengths), p90, p99, most, histogram(lengths, p99))


def histogram(lengths: Counted, usual: int) -> tuple[Bin, ...]:
    """Count lengths in bins of one round width, about ten of them up to `usual`; what is longer is in the last one."""
    least, most = int(lengths.min()), int(lengths.max())
    need = max(1, -(-(usual - least + 1) // _BINS))
    scale = 10 ** (len(str(need)) - 1)
    step = next(scale * k for k in (1, 2, 5, 10) if scale * k >= need)
    start = least // step * step
    last = (usual - start) // step
    counts = np.bincount(np.minimum((lengths - start) // step, last), minlength=last + 1).tolist()
    ends = [start + step * (k + 1) - 1 for k in range(last)] + [max(most, start + step * (last + 1) - 1)]
    return tuple(Bin(start + step * k, end, count) for k, (end, count) in enumerate(zip(ends, counts, strict=True)))


def measure_texts(batches: Iterable[pa.StringArray]) -> tuple[Counted, Counted, Counted]:
    """The characters in every text, a hash of it, and a hash of its normal form."""
    import pyarrow.compute as pc

    found = [(as_numbers(pc.utf8_length(some)), hashes_of(some), hashes_of(normal_form(some))) for some in batches]
    characters, exact, near = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return characters, exact, near


def count_repeats(hashes: Counted) -> int:
    """How many there were before."""
    return len(hashes) - len(np.unique(hashes))


def common(hashes: Counted, most: int) -> list[tuple[int, int]]:
    """What is there several times, the most often first: how many times, and where first."""
    _, firsts, times = np.unique(hashes, return_index=True, return_counts=True)
    order = np.lexsort((firsts, -times))[:most]
    return [(int(times[k]), int(firsts[k])) for k in order if times[k] > 1]


def as_numbers(array: pa.Array) -> Counted:
    """An Arrow array of lengths as int64."""
    numbers: Counted = array.to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def entropy(counts: Counted) -> float:
    """Entropy in nats of what occurs so many times, [V]; 0 where nothing occurs."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum()) + 0.0


def measure_vocabulary(counts: Counted, tokenizer: Tokenizer, most: int = 10) -> Vocabulary:
    """What a text says of a vocabulary.

    Args:
        counts: how often every token occurs, int64 [V].
        tokenizer: whose tokens these are.
        most: how many to name of the commonest ones, and twice that of those that are not used.
    """
    special, pieces = tokenizer.special, tokenizer.pieces(range(tokenizer.vocab_size))
    counts = counts.copy()
    counts[[special.bos, special.eos, special.pad]] = 0
    is_byte = np.array([bool(_BYTE.fullmatch(piece)) for piece in pieces])
    plain = ~is_byte
    plain[list(special)] = False
    unused, total = np.flatnonzero(plain & (counts == 0)).tolist(), max(1, int(counts.sum()))
    order = [k for k in np.argsort(-counts, kind="stable")[:most].tolist() if counts[k]]
    nats = entropy(counts)
    return Vocabulary(
        size=tokenizer.vocab_size,
        used=int((counts > 0).sum()),
        unused=len(unused),
        unused_bytes=int((is_byte & (counts == 0)).sum()),
        unused_pieces=tuple(pieces[k] for k in unused[: 2 * most]),
        byte_share=float(counts[is_byte].sum() / total),
        unknown_share=float(counts[special.unk] / total),
        entropy_nats=nats,
        entropy_bits=nats / log(2),
        commonest=tuple(Piece(pieces[k], int(counts[k]), float(counts[k] / total)) for k in order),
    )


def count_ids(batches: Iterable[pa.ListArray], vocab_size: int) -> tuple[Counted, Counted]:
    """The tokens in every document, and how often every token occurs, [vocab_size]."""
    import pyarrow.compute as pc

    lengths, counts = [np.zeros(0, np.int64)], np.zeros(vocab_size, np.int64)
    for ids in batches:
        lengths.append(as_numbers(pc.list_value_length(ids)))
        counts += np.bincount(as_numbers(ids.flatten()), minlength=vocab_size)
    return np.concatenate(lengths), counts


def widths_to_try(max_length: int, longest: int) -> list[int]:
    """Row widths worth a look: `max_length`, and powers of two until the longest example fits."""
    powers = [width for k, width in enumerate(WIDTHS) if k < _FEWEST_WIDTHS or WIDTHS[k - 1] < longest]
    return sorted({max_length, *powers})


def measure_packing(sample: Any, lengths: Counted, width: int, pad: int) -> Packing:
    """Pack about an epoch of documents into rows as training does, and see how full they become.

    Args:
        sample: the documents to pack, rows with a column ``ids``.
        lengths: tokens of all training documents, int64 [N].
        width: of a row in tokens.
        pad: id that fills a row up.
    """
    packed = iter(packed_rows(sample, max_length=width, rows=_ROWS, pad=pad, seed=0))
    total = int(lengths.sum())
    batches = islice(packed, max(1, min(total, PACKED) // (_ROWS * width)))
    efficiency = float(np.mean([packing_efficiency(batch) for batch in batches]))
    longer = lengths[lengths > width]
    windows = int((-(-longer // width)).sum())
    return Packing(width, len(longer), windows, int(np.ceil(total / (width * efficiency))), efficiency)

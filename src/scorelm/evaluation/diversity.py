"""How varied a set of generated texts is, how near to real text, and how much of it is copied from training.

All but MAUVE works on words, so that models with different tokenizers compare. An empty text has no words, no n-grams
and entropy 0; an empty set of texts is an error.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain, count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scorelm.errors import InputError

WORD = re.compile(r"\w+|[^\w\s]")
IntArray = NDArray[np.int64]


def words(text: str) -> list[str]:
    """The words (letters, digits, underscores) and single other signs of a text, in order and in their own case."""
    return WORD.findall(text)


def unigram_entropy(texts: Sequence[str]) -> float:
    """Mean over texts of the entropy, in nats, of the words inside a text: the 'sample entropy' of diffusion papers.

    Read it beside perplexity, which rewards text that repeats a few words (arXiv 2409.02908, there on tokens).

    Raises:
        InputError: no texts.
    """
    counts = [np.array(list(Counter(text).values()), dtype=np.float64) for text in _split(texts)]
    shares = [number / number.sum() for number in counts]
    return abs(float(np.mean([(share * np.log(share)).sum() for share in shares])))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of the set, in [0, 1]; 0 if there is none (arXiv 1510.03055).

    It falls as the set grows: compare sets of one size.

    Raises:
        InputError: no texts, or n below 1.
    """
    grams = [gram for text in _split(texts) for gram in _grams(text, n)]
    return len(set(grams)) / max(len(grams), 1)


def self_bleu(texts: Sequence[str], most: int = 100) -> float:
    """Mean sentence BLEU-4 of each text against all the others, from 0 (nothing shared) to 100 (all the same).

    Texygen (arXiv 1802.01886), by sacrebleu on this module's words, with exponential smoothing and no orders above
    the text's length. At most `most` evenly spaced texts are used, since cost is quadratic; one text alone scores 0.

    Raises:
        InputError: no texts, `most` below 2, or sacrebleu is not installed.
    """
    if most < 2:
        raise InputError(f"self-BLEU compares at least 2 texts, not {most}")
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise InputError("sacrebleu is not installed: pip install 'scorelm[eval]'") from None
    lines = [" ".join(text) for text in _split(texts)]
    if len(lines) == 1:
        return 0.0
    lines = [lines[i] for i in np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int)]
    bleu = BLEU(tokenize="none", effective_order=True)
    scores = [bleu.sentence_score(line, lines[:i] + lines[i + 1 :]).score for i, line in enumerate(lines)]
    return float(np.mean(scores))


def repetition(texts: Sequence[str], n: int) -> float:
    """Share of n-grams of words, over all texts, that occurred earlier in the same text (arXiv 1908.04319).

    In [0, 1]; 0 if there is no n-gram. The paper's seq-rep-n, pooled over texts instead of averaged.

    Raises:
        InputError: no texts, or n below 1.
    """
    grams = [list(_grams(text, n)) for text in _split(texts)]
    total = sum(map(len, grams))
    return 1 - sum(len(set(text)) for text in grams) / total if total else 0.0


def zipf_coefficient(texts: Sequence[str]) -> float:
    """Slope, sign dropped, of log frequency over log rank of the words: about 1 for real text (arXiv 1904.09751).

    Least squares over the 5,000 commonest words, as in the paper's code; 0 if there are fewer than two different ones.

    Raises:
        InputError: no texts.
    """
    counts = Counter(chain.from_iterable(_split(texts))).most_common(5000)
    if len(counts) < 2:
        return 0.0
    rank, frequency = np.log(np.arange(1, len(counts) + 1)), np.log([number for _, number in counts])
    return abs(float(np.polyfit(rank, frequency, 1)[0]))


def length_distance(texts: Sequence[str], reference: Sequence[str]) -> float:
    """Wasserstein-1 distance, in words, between the lengths of two sets of texts of any two sizes.

    The area between the two cumulative distributions, which is exact in one dimension (Vallender 1974).

    Raises:
        InputError: no texts on either side.
    """
    lengths = [[len(text) for text in _split(side)] for side in (texts, reference)]
    cumulative = [np.bincount(side, minlength=max(map(max, lengths)) + 1).cumsum() / len(side) for side in lengths]
    return float(np.abs(cumulative[0] - cumulative[1]).sum())


class Copies(NamedTuple):
    """What generated texts share with training texts."""

    share: float
    """Share of all n-grams of the generated texts that occur in a training text, in [0, 1]; 0 if there is none."""
    longest: float
    """Mean over generated texts of the longest run of words that a training text holds as well, in words."""
    exact: float
    """Share of generated texts that are, word for word, a training text, in [0, 1]; an empty text is none."""


def copy_rate(texts: Sequence[str], training: Sequence[str], n: int = 8) -> Copies:
    """How much of the generated texts stands word for word in training texts, without hashing or sampling.

    Texts shorter than `n` words have no n-gram: they count only in `longest` and `exact`.

    Raises:
        InputError: no texts on either side, or n below 1.
    """
    own, known = _split(texts), _split(training)
    grams, copied = sum(len(list(_grams(text, n))) for text in own), 0
    text_of = np.repeat(np.arange(len(own)), [len(text) + 1 for text in own])
    longest = np.zeros(len(own), dtype=np.int64)
    for length, starts in enumerate(_shared_starts(*_numbered(own, known)), 1):
        longest[text_of[starts]] = length
        copied += len(starts) if length == n else 0
    lines = {tuple(text) for text in known if text}
    exact = sum(tuple(text) in lines for text in own)
    return Copies(copied / max(grams, 1), float(longest.mean()), exact / len(own))


def check_packages(judged: bool) -> None:
    """Refuse, before long work, what could not be measured at its end.

    Args:
        judged: whether there is a judge, which MAUVE takes.

    Raises:
        InputError: a package is missing.
    """
    for module, package in (("sacrebleu", "sacrebleu"), ("mauve", "mauve-text"))[: 1 + judged]:
        if find_spec(module) is None:
            raise InputError(f"{package} is not installed: pip install 'scorelm[eval]'")


def mauve(features: NDArray[np.floating], reference_features: NDArray[np.floating], seed: int = 0) -> float:
    """MAUVE of features [n, D] of generated texts and [m, D] of real ones, in (0, 1], 1 for equal (arXiv 2102.01454).

    By the authors' package: k-means (of the seed) into min(n, m) / 10 clusters, at least 2. It depends on how many
    texts there are (the paper takes 5,000): compare equal sizes. One thread, so that cores do not change the value.

    Raises:
        InputError: mauve-text is not installed, or shapes or values that cannot be compared.
    """
    p, q = np.asarray(features, dtype=np.float64), np.asarray(reference_features, dtype=np.float64)
    if p.ndim != 2 or not p.size or not q.size or p.shape[1:] != q.shape[1:]:
        raise InputError(f"MAUVE takes features of shapes [n, D] and [m, D], not {p.shape} and {q.shape}")
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise InputError("MAUVE takes finite features, but some are infinite or not numbers")
    try:
        from mauve import compute_mauve
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise InputError("mauve-text is not installed: pip install 'scorelm[eval]'") from None
    with threadpool_limits(1), _silent():
        found = compute_mauve(p_features=p, q_features=q, seed=seed)
    # Equal histograms are ties that the package's integration may take in the wrong order (it then returns 0.75).
    return 1.0 if np.array_equal(found.p_hist, found.q_hist) else float(found.mauve)


def diversity(texts: Sequence[str], reference: Sequence[str], training: Sequence[str] | None) -> dict[str, float]:
    """Every measure of this module but MAUVE, by name; without `training`, those of copying are left out.

    `reference` are real texts that the model has not seen, `training` those that it was trained on.

    Raises:
        InputError: no texts in one of the sets, or sacrebleu is not installed.
    """
    found = {
        "entropy": unigram_entropy(texts),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(texts),
        "repetition_4": repetition(texts, 4),
        "zipf": zipf_coefficient(texts),
        "length_distance": length_distance(texts, reference),
    }
    if training is not None:
        copies = copy_rate(texts, training)
        found |= {"copied": copies.share, "longest_copy": copies.longest, "exact_copies": copies.exact}
    return found


def _split(texts: Sequence[str]) -> list[list[str]]:
    if not len(texts):
        raise InputError("there are no texts to measure")
    return [words(text) for text in texts]


def _grams(text: list[str], n: int) -> Iterator[tuple[str, ...]]:
    if n < 1:
        raise InputError(f"n-grams have at least 1 word, not {n}")
    return zip(*(text[k:] for k in range(n)), strict=False)


def _numbered(*sides: list[list[str]]) -> Iterator[IntArray]:
    """The texts of each side in one row, the same words by the same numbers, from 1; a 0 ends each text."""
    ids: dict[str, int] = {}
    for texts in sides:
        rows = ([*(ids.setdefault(word, len(ids) + 1) for word in text), 0] for text in texts)
        yield np.fromiter(chain.from_iterable(rows), np.int64)


def _shared_starts(own: IntArray, other: IntArray) -> Iterator[IntArray]:
    """For runs of 1, 2, ... words: where those of `own` start that `other` holds as well, until there is none.

    A shared run of k + 1 words is a shared run of k and one more word, so only places of shared runs of k stay, and a
    label stands for the run. The end of a text is another number in each row, so that no run crosses it.
    """
    width = int(max(own.max(), other.max())) + 2
    rows = (own, np.where(other == 0, width - 1, other))
    starts = [np.arange(len(row)) for row in rows]
    labels = [np.zeros_like(row) for row in rows]
    for length in count():
        keys = [label * width + row[start + length] for label, row, start in zip(labels, rows, starts, strict=True)]
        shared = np.intersect1d(keys[0], keys[1])
        if not len(shared):
            return
        kept = [np.isin(key, shared) for key in keys]
        starts = [start[keep] for start, keep in zip(starts, kept, strict=True)]
        labels = [np.searchsorted(shared, key[keep]) for key, keep in zip(keys, kept, strict=True)]
        yield starts[0]


@contextmanager
def _silent() -> Iterator[None]:
    """Drop warnings and whatever is written to standard error, by native code too."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as null, warnings.catch_warnings(action="ignore"):
            os.dup2(null.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

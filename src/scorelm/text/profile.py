"""What a text is like: all that is worth knowing of it before a model is trained on it.

All of it is counted, except how full rows become: that is tried, on a part of a large text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scorelm.text.corpus import Corpus
from scorelm.text.normalization import as_read
from scorelm.text.records import Counts
from scorelm.text.sides import read_sides
from scorelm.text.statistics import (
    PACKED,
    Counted,
    Lengths,
    Packing,
    Vocabulary,
    common,
    count_ids,
    count_repeats,
    measure_lengths,
    measure_packing,
    measure_texts,
    measure_vocabulary,
    widths_to_try,
)
from scorelm.text.tokenizer import Tokenizer, count_lost

if TYPE_CHECKING:
    import datasets

Watch = Callable[[float, str], object]
"""Told the share of the work that is done, from 0 to 1, and what is being done."""
BEGINNING = 200
"""Characters of an example that are kept to show it."""
_BATCH = 1000


@dataclass(frozen=True)
class Repeated:
    """The beginning of a text that is there several times."""

    times: int
    text: str


@dataclass(frozen=True)
class Example:
    """The beginning of an example, and its whole length in characters and in tokens."""

    characters: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Statistics:
    """All that is known of a text."""

    examples: int
    """On both sides, as are all numbers but those of `packing`."""
    train: int
    heldout: int
    records: int
    """Of files with columns; 0 where there is none."""
    missing: int
    """Records without the field."""
    blank: int
    """Examples that are white space only, which are left out."""
    fields: tuple[str, ...]
    exact_duplicates: int
    """Examples that there were before."""
    near_duplicates: int
    """Examples that there were before in all but case and white space."""
    most_repeated: tuple[Repeated, ...]
    characters: Lengths
    tokens: Lengths
    """``<s>`` and ``</s>`` included."""
    longest: tuple[Example, ...]
    train_tokens: int
    """Of the training side."""
    packed_tokens: int
    """Of these, as many as were packed to see how full rows become; all of them unless the text is large."""
    packing: tuple[Packing, ...]
    vocabulary: Vocabulary
    characters_per_token: float
    """Of the text as the tokenizer reads it, ``<s>`` and ``</s>`` not counted."""
    lost_characters: int
    """That do not come back from the tokens."""


def measure(corpus: Corpus, documents: Corpus, tokenizer: Tokenizer, max_length: int, watch: Watch) -> Statistics:
    """Count what there is in a text.

    Args:
        corpus: the text, from `load_corpus`.
        documents: its tokens, from `tokenise`.
        tokenizer: that made them.
        max_length: tokens in a row.
        watch: told how far the work is.
    """
    watch(0.0, "comparing examples")
    characters, exact, near = measure_texts(columns(corpus, "text"))
    tokens, ids = count_ids(columns(documents, "ids"), tokenizer.vocab_size)
    found, repeats = counts_of(corpus), count_repeats(exact)
    longest = np.argsort(-characters, kind="stable")[:5].tolist()
    read, lost = measure_losses(corpus, documents, tokenizer, watch)
    train = tokens[: len(corpus.train)]
    packed_tokens, packing = try_widths(documents.train, train, max_length, tokenizer.special.pad, watch)
    return Statistics(
        examples=len(tokens),
        train=len(train),
        heldout=len(corpus.heldout),
        records=found.records,
        missing=found.missing,
        blank=found.blank,
        fields=tuple(found.fields),
        exact_duplicates=repeats,
        near_duplicates=count_repeats(near) - repeats,
        most_repeated=tuple(Repeated(times, text_at(corpus, place)) for times, place in common(exact, 3)),
        characters=measure_lengths(characters),
        tokens=measure_lengths(tokens),
        longest=tuple(Example(int(characters[k]), int(tokens[k]), text_at(corpus, k)) for k in longest),
        train_tokens=int(train.sum()),
        packed_tokens=packed_tokens,
        packing=packing,
        vocabulary=measure_vocabulary(ids, tokenizer),
        characters_per_token=read / max(1, int(tokens.sum()) - 2 * len(tokens)),
        lost_characters=lost,
    )


def counts_of(corpus: Corpus) -> Counts:
    """What was counted when the text was read, which the cache has beside it."""
    kept = read_sides(Path(corpus.train.cache_files[0]["filename"]).parent)
    return Counts() if kept is None else kept[2]


def text_at(corpus: Corpus, place: int) -> str:
    """The beginning of an example, by its number; those of the training side come first."""
    size = len(corpus.train)
    text: str = (corpus.train[place] if place < size else corpus.heldout[place - size])["text"]
    return text[:BEGINNING]


def columns(corpus: Corpus, name: str) -> Iterator[Any]:
    """A column of both sides as Arrow arrays, the training side first."""
    for side in (corpus.train, corpus.heldout):
        for batch in side.with_format("arrow").iter(_BATCH):
            yield batch[name].combine_chunks()


def measure_losses(corpus: Corpus, documents: Corpus, tokenizer: Tokenizer, watch: Watch) -> tuple[int, int]:
    """Characters of the text as the tokenizer reads it, and how many of them do not come back; see `measure`."""
    characters = lost = done = 0
    for texts, ids in zip(columns(corpus, "text"), columns(documents, "ids"), strict=True):
        for text, row in zip(texts.to_pylist(), ids.to_pylist(), strict=True):
            read = as_read(text, tokenizer)
            characters, lost = characters + len(read), lost + count_lost(read, tokenizer.decode(row))
        done += len(texts)
        watch(0.5 * done / (len(corpus.train) + len(corpus.heldout)), "looking for what does not come back")
    return characters, lost


def try_widths(
    documents: datasets.Dataset, lengths: Counted, max_length: int, pad: int, watch: Watch
) -> tuple[int, tuple[Packing, ...]]:
    """Pack documents into rows of several widths, every so manieth of them where they have more than `PACKED` tokens.

    Args:
        documents: of the training side.
        lengths: their lengths in tokens, int64 [N].
        max_length: one of the widths.
        pad: id that fills a row up.
        watch: told how far the work is.

    Returns:
        How many tokens were packed, and what came of it for each width.
    """
    step = max(1, int(lengths.sum()) // PACKED)
    sample = documents.select(range(0, len(documents), step))
    widths, found = widths_to_try(max_length, int(lengths.max())), []
    for k, width in enumerate(widths):
        watch(0.5 + 0.5 * k / len(widths), f"packing rows of {width:,} tokens")
        found.append(measure_packing(sample, lengths, width, pad))
    return int(lengths[::step].sum()), tuple(found)

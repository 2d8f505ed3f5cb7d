"""A corpus is a training side and a held-out side, one example to a row, first as text and then as token ids.

Hugging Face ``datasets`` keeps both in Arrow files in its cache (``HF_DATASETS_CACHE``), never beside the user's data.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scorelm.errors import InputError, brief, exists, writing
from scorelm.text.files import digest_of
from scorelm.text.normalization import as_read
from scorelm.text.records import Counts, listed
from scorelm.text.sides import Writer, new_folder, read_sides, write_counts
from scorelm.text.source import AS_IT_IS, CHUNK, Reading, Source, open_source
from scorelm.text.tokenizer import Tokenizer, count_lost

if TYPE_CHECKING:
    import datasets

_ROWS_PER_PROCESS = 50_000  # fewer are tokenised sooner than another process starts


@dataclass(frozen=True)
class Corpus:
    """Examples to train on and examples held out, with a fingerprint of the whole.

    Both sides have one column: ``text`` from ``load_corpus``, ``ids`` from ``tokenise``.
    """

    name: str
    train: datasets.Dataset
    heldout: datasets.Dataset
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What a user should know of it, in lines: how many examples, what was left out, and what looks odd."""


def load_corpus(source: str, reading: Reading = AS_IT_IS, *, holdout: float = 0.02) -> Corpus:
    """Load ``kjv`` (embedded), a file, a directory of files, or a split of a Hugging Face dataset.

    Without a split, a line of a ``.txt`` or ``.md`` file is one example, and only a line feed ends it. Blank examples
    are left out. A hash of its text decides whether an example is held out, so that equal examples, and those that
    differ by case or white space only, are always on one side, on every machine. The fingerprint changes with every
    example and with their order.

    Args:
        source: ``kjv``, a path, or a name on the Hugging Face hub.
        reading: what the examples in it are.
        holdout: probability that an example is held out, at least 0 and below 1.

    Raises:
        InputError: the source is missing, empty, unreadable or not UTF-8, most of it has no such field, or ``holdout``
            is out of range or leaves nothing to train on.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"holdout must be at least 0 and below 1, not {holdout}")
    with quiet(), _writing_cache():
        found = open_source(source, reading)
        folder = _folder(found.fingerprint, holdout)
        damaged = exists(folder)
        if (kept := read_sides(folder)) is None:
            if damaged:
                shutil.rmtree(folder, ignore_errors=True)
            with new_folder(folder) as draft:
                write_counts(draft, _write_sides(found, draft, holdout))
            kept = read_sides(folder)
    if kept is None:
        raise InputError(f"cannot read what was just written to {folder}: remove it and try again")
    train, heldout, counts = kept
    if not counts.examples:
        raise InputError(f"{brief(source)} is empty: there is no text in it")
    if not len(train):
        count = "the only example is" if counts.examples == 1 else f"all {counts.examples} examples are"
        raise InputError(f"{brief(source)} leaves nothing to train on: {count} held out, so set holdout to 0")
    return Corpus(found.name, train, heldout, found.fingerprint, tuple(_notes(found, counts, reading)))


def find_corpus(name: str, fingerprint: str, holdout: float) -> Corpus | None:
    """A corpus that was loaded before, by its fingerprint, wherever its source has gone; None if it is not cached."""
    with quiet():
        kept = read_sides(_folder(fingerprint, holdout))
    return None if kept is None else Corpus(name, kept[0], kept[1], fingerprint)


def fingerprint_of(source: str, reading: Reading) -> str:
    """The fingerprint that `load_corpus` gives, without reading the examples; see there for errors."""
    with quiet(), _writing_cache():
        return open_source(source, reading).fingerprint


def _folder(fingerprint: str, holdout: float) -> Path:
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    return cache / "scorelm" / digest_of(b"2", fingerprint.encode(), repr(float(holdout)).encode())


def _write_sides(found: Source, folder: Path, holdout: float) -> Counts:
    counts = Counts()
    writer = Writer(folder, holdout, counts)
    try:
        for own, lead in found.batches(counts):
            writer.add(own, lead)
    finally:
        writer.close()
    if 2 * counts.missing > counts.records:
        field, some = repr(found.reading.field), found.reading.field in counts.fields
        lacking = f"most records of {found.name} have no {field}" if some else f"{found.name} has no field {field}"
        number = f"{counts.missing:,} of {counts.records:,}, and " * some
        raise InputError(f"{lacking}; {number}its fields are {listed(counts.fields)}")
    return counts


def _notes(found: Source, counts: Counts, reading: Reading) -> Iterator[str]:
    """What is to be said of a source."""
    line = f"{found.name}: {counts.examples:,} example{'s' * (counts.examples != 1)}"
    if counts.fields:
        line += f", {counts.missing:,} without {reading.field!r}"
    line += f", {counts.blank:,} empty, {counts.duplicates:,} duplicate{'s' * (counts.duplicates != 1)}"
    if counts.missing:
        line += f"; the fields are {listed(islice(counts.fields, 10))}"
    if counts.separators:
        line += f"; CSV separator: {', '.join(counts.separators)}"
    yield line
    if reading.streaming:
        yield f"a stream: this is its beginning, of at most {CHUNK[0]:,} records or {CHUNK[1]:,} characters"
    if left_out := found.left_out:
        yield f"left out: {brief(left_out, 1000)}"
    if wrapped := found.wrapped():
        yield (
            f"{brief(', '.join(wrapped))}: every line is an example, but the lines look hard-wrapped, inside "
            "sentences; --split paragraph or --split sentence-window keeps sentences whole"
        )


def tokenise(corpus: Corpus, tokenizer: Tokenizer, *, max_length: int, processes: int | None = None) -> Corpus:
    """Turn text into a column ``ids`` of whole documents, ``<s>`` and ``</s>`` included.

    The result is cached, so a second call with the same tokenizer reads it back. The notes say how much of the text the
    tokenizer cannot give back, and how many documents are longer than a row.

    Args:
        corpus: from `load_corpus`.
        tokenizer: makes the ids.
        max_length: most tokens in a row; longer documents stay whole, and packing cuts windows from them.
        processes: how many tokenise at once; by default one for each core, and fewer for a small corpus.
    """
    with quiet(), _writing_cache():
        sides = [_encode(side, tokenizer, processes) for side in (corpus.train, corpus.heldout)]
    train, heldout = (side.remove_columns(["lost", "characters"]) for side in sides)
    lost, characters = (sum(_total(side, name) for side in sides) for name in ("lost", "characters"))
    notes, longer = [], int((_count_tokens(train) > max_length).sum())
    if lost:
        notes.append(
            f"{lost / characters:.1%} of characters ({lost:,} of {characters:,}) do not round-trip through this "
            "tokenizer: they are learned as it gives them back"
        )
    if longer:
        notes.append(
            f"{longer:,} of {len(train):,} examples are longer than {max_length} tokens: each is cut into windows, "
            "all of which are read in every epoch"
        )
    fingerprint = digest_of(corpus.fingerprint.encode(), tokenizer.to_bytes())
    return Corpus(corpus.name, train, heldout, fingerprint, tuple(notes))


def length_histogram(dataset: datasets.Dataset, max_length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count the documents of each length in tokens, ``<s>`` and ``</s>`` included: int64 ``[max_length + 1]``.

    Longer documents count as ``max_length``, which is the length of the windows that are cut from them.
    """
    lengths = np.minimum(_count_tokens(dataset), max_length)
    return np.bincount(lengths, minlength=max_length + 1).astype(np.int64)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep ``datasets`` and ``huggingface_hub`` silent inside, and restore their settings afterwards."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    silent_before = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not silent_before:
            datasets.enable_progress_bars()


@contextmanager
def _writing_cache() -> Iterator[None]:
    """Say in one line that the cache of ``datasets`` cannot be written, and what to do."""
    import datasets

    with writing(Path(datasets.config.HF_DATASETS_CACHE), "set HF_HOME to a directory that can be written"):
        yield


def _encode(side: datasets.Dataset, tokenizer: Tokenizer, processes: int | None) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    number, ids = datasets.Value("int32"), datasets.List(datasets.Value("int32"))
    features = datasets.Features({"ids": ids, "lost": number, "characters": number})
    if not len(side):
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    useful = processes or min(os.cpu_count() or 1, len(side) // _ROWS_PER_PROCESS)
    encode = partial(
        side.map,
        _encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=side.column_names,
        features=features,
        num_proc=min(useful, len(side)) if useful > 1 else None,
    )
    with suppress(pa.ArrowInvalid, OSError):  # what the cache has is damaged
        if len(found := encode()) == len(side):
            return found
    return encode(load_from_cache_file=False)


def _encode_batch(batch: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, list[Any]]:
    texts = batch["text"]
    ids = [tokenizer.encode_document(text) for text in texts]
    texts = [as_read(text, tokenizer) for text in texts]
    lost = [count_lost(text, tokenizer.decode(tokens)) for text, tokens in zip(texts, ids, strict=True)]
    return {"ids": ids, "lost": lost, "characters": [len(text) for text in texts]}


def _total(dataset: datasets.Dataset, name: str) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(dataset.data.column(name)).as_py() or 0)


def _count_tokens(dataset: datasets.Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    import pyarrow.compute as pc

    table = dataset.with_format("arrow")[:]
    return np.asarray(pc.list_value_length(table["ids"]), dtype=np.int64)

"""A corpus is a training side and a held-out side of one example a row, first as text and then as token ids.

Hugging Face ``datasets`` parses and caches both in Arrow files (``HF_DATASETS_CACHE``), never beside the user's data.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from scorelm.text.files import EMBEDDED, column, digest_of, kind_of, one_line, read_files
from scorelm.text.tokenizer import Tokenizer
from scorelm.untrusted import exists

if TYPE_CHECKING:
    import datasets

_ROWS_PER_PROCESS = 50_000  # fewer are tokenised before a second process has started


@dataclass(frozen=True)
class Corpus:
    """Examples to train on and examples held out, with a fingerprint of the whole.

    Both sides have one column: ``text`` from ``load_corpus``, ``ids`` from ``tokenise``.
    """

    name: str
    train: datasets.Dataset
    heldout: datasets.Dataset
    fingerprint: str


def load_corpus(source: str, *, field: str = "text", holdout: float = 0.02) -> Corpus:
    """Load ``kjv`` (embedded), a file, a directory of files, or a Hugging Face dataset's ``train`` split.

    A line of a ``.txt`` file, which ends at a line feed alone, is one example; the other kinds are read at ``field``.
    Blank examples are dropped. A hash of its text puts an example on the held-out side with probability ``holdout``,
    so equal examples are always together, on every machine. The fingerprint changes with any example and their order.

    Raises:
        ValueError: the source is missing, empty, unreadable or not UTF-8, has no such field, or ``holdout`` is not in
            [0, 1) or leaves nothing to train on.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be at least 0 and below 1, not {holdout}")
    with _quiet():
        if _is_hub_name(source):
            name, examples = source, _from_hub(source, field)
            fingerprint = digest_of(field.encode(), examples._fingerprint.encode())
        else:
            name, (examples, fingerprint) = Path(source).name.partition(".")[0], read_files(source, field)
        sides = ({"holdout": holdout, "to_heldout": to_heldout} for to_heldout in (False, True))
        train, heldout = (
            examples.filter(_belongs, batched=True, input_columns=["text"], fn_kwargs=side) for side in sides
        )
    if not len(train) and not len(heldout):
        raise ValueError(f"{source} is empty: it has no line that is not blank")
    if not len(train):
        raise ValueError(f"{source} has only {len(heldout)} examples, all held out: set holdout to 0")
    return Corpus(name, train, heldout, fingerprint)


def tokenise(corpus: Corpus, tokenizer: Tokenizer, *, max_length: int, processes: int | None = None) -> Corpus:
    """Turn text into a column ``ids`` of whole documents, ``<s>`` and ``</s>`` included, once per tokenizer.

    The result is cached, so a second call reads it back. ``processes`` defaults to the number of cores, fewer for a
    small corpus. Documents longer than ``max_length`` tokens stay whole: packing cuts windows from them.

    Raises:
        ValueError: every document to train on is longer than ``max_length``.
    """
    with _quiet():
        train, heldout = (_encoded(side, tokenizer, processes) for side in (corpus.train, corpus.heldout))
    shortest = int(_lengths(train).min())
    if shortest > max_length:
        raise ValueError(
            f"every line of {corpus.name} is longer than max length {max_length}: the shortest has {shortest} tokens, "
            f"so use --max-length {shortest} or more, or split the lines"
        )
    return Corpus(corpus.name, train, heldout, digest_of(corpus.fingerprint.encode(), tokenizer.to_bytes()))


def length_histogram(dataset: datasets.Dataset, max_length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count documents by length in tokens, ``<s>`` and ``</s>`` included: int64 ``[max_length + 1]``.

    Longer documents count at ``max_length``, since that is how long a window of them is.
    """
    lengths = np.minimum(_lengths(dataset), max_length)
    return np.bincount(lengths, minlength=max_length + 1).astype(np.int64)


@contextmanager
def _quiet() -> Iterator[None]:
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


def _is_hub_name(source: str) -> bool:
    path = Path(source)
    known = source == EMBEDDED or exists(path) or kind_of(path)
    return not known and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) is not None


def _belongs(texts: list[str | None], holdout: float, to_heldout: bool) -> list[bool]:
    """Which texts are not blank and on the wanted side of the split."""
    return [bool(text and text.strip()) and _is_heldout(cast(str, text), holdout) == to_heldout for text in texts]


def _is_heldout(text: str, holdout: float) -> bool:
    draw = hashlib.blake2b(text.encode(), digest_size=8, person=b"scorelm holdout").digest()
    return int.from_bytes(draw, "little") < holdout * 2**64


def _from_hub(name: str, field: str) -> Any:
    import datasets

    with one_line(f"{name} is no file or directory, and the Hugging Face hub gave no such dataset"):
        loaded = datasets.load_dataset(name, split="train")
    return column(loaded, field, name)


def _encoded(side: datasets.Dataset, tokenizer: Tokenizer, processes: int | None) -> datasets.Dataset:
    import datasets

    features = datasets.Features({"ids": datasets.List(datasets.Value("int32"))})
    if not len(side):
        return datasets.Dataset.from_dict({"ids": []}, features=features)
    useful = processes or min(os.cpu_count() or 1, len(side) // _ROWS_PER_PROCESS)
    return side.map(
        _ids,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=side.column_names,
        features=features,
        num_proc=min(useful, len(side)) if useful > 1 else None,
    )


def _ids(batch: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    return {"ids": [tokenizer.encode_document(text) for text in batch["text"]]}


def _lengths(dataset: datasets.Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    import pyarrow.compute as pc

    table = dataset.with_format("arrow")[:]
    return np.asarray(pc.list_value_length(table["ids"]), dtype=np.int64)

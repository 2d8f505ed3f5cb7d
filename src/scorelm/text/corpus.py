"""A corpus is a training side and a held-out side, one example to a row, first as text and then as token ids.

Hugging Face ``datasets`` keeps both in Arrow files in its cache (``HF_DATASETS_CACHE``), never beside the user's data.
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

from scorelm.errors import InputError, brief, exists, writing
from scorelm.text.files import EMBEDDED, as_input_error, digest_of, kind_of, read_files, text_column
from scorelm.text.tokenizer import Tokenizer

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


def load_corpus(source: str, *, field: str = "text", holdout: float = 0.02) -> Corpus:
    """Load ``kjv`` (embedded), a file, a directory of files, or a Hugging Face dataset's ``train`` split.

    A line of a ``.txt`` file is one example, and only a line feed ends it. Blank examples are dropped. A hash of its
    text decides whether an example is held out, so equal examples are always on one side, on every machine. The
    fingerprint changes with every example and with their order.

    Args:
        source: ``kjv``, a path, or a name on the Hugging Face hub.
        field: the column to read, except of ``.txt`` files.
        holdout: probability that an example is held out, at least 0 and below 1.

    Raises:
        InputError: the source is missing, empty, unreadable or not UTF-8, has no such field, or ``holdout`` is out of
            range or leaves nothing to train on.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"holdout must be at least 0 and below 1, not {holdout}")
    with _quiet(), _writing_cache():
        if _is_hub_name(source):
            name, examples = source, _load_from_hub(source, field)
            fingerprint = digest_of(field.encode(), examples._fingerprint.encode())
        else:
            name, (examples, fingerprint) = Path(source).name.partition(".")[0], read_files(source, field)
        sides = ({"holdout": holdout, "to_heldout": to_heldout} for to_heldout in (False, True))
        train, heldout = (
            examples.filter(_is_on_side, batched=True, input_columns=["text"], fn_kwargs=side) for side in sides
        )
    if not len(train) and not len(heldout):
        raise InputError(f"{brief(source)} is empty: every line is blank")
    if not len(train):
        count = "the only example is" if len(heldout) == 1 else f"all {len(heldout)} examples are"
        raise InputError(f"{brief(source)} leaves nothing to train on: {count} held out, so set holdout to 0")
    return Corpus(name, train, heldout, fingerprint)


def tokenise(corpus: Corpus, tokenizer: Tokenizer, *, max_length: int, processes: int | None = None) -> Corpus:
    """Turn text into a column ``ids`` of whole documents, ``<s>`` and ``</s>`` included.

    The result is cached, so a second call with the same tokenizer reads it back.

    Args:
        corpus: from `load_corpus`.
        tokenizer: makes the ids.
        max_length: most tokens in a row; longer documents stay whole, and packing cuts windows from them.
        processes: how many tokenise at once; by default one for each core, and fewer for a small corpus.

    Raises:
        InputError: every document to train on is longer than ``max_length``.
    """
    with _quiet(), _writing_cache():
        train, heldout = (_encode(side, tokenizer, processes) for side in (corpus.train, corpus.heldout))
    shortest = int(_count_tokens(train).min())
    if shortest > max_length:
        raise InputError(
            f"every line of {corpus.name} is longer than max length {max_length}: the shortest has {shortest} tokens, "
            f"so use --max-length {shortest} or more, or split the lines"
        )
    return Corpus(corpus.name, train, heldout, digest_of(corpus.fingerprint.encode(), tokenizer.to_bytes()))


def length_histogram(dataset: datasets.Dataset, max_length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count the documents of each length in tokens, ``<s>`` and ``</s>`` included: int64 ``[max_length + 1]``.

    Longer documents count as ``max_length``, which is the length of the windows that are cut from them.
    """
    lengths = np.minimum(_count_tokens(dataset), max_length)
    return np.bincount(lengths, minlength=max_length + 1).astype(np.int64)


@contextmanager
def _quiet() -> Iterator[None]:
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
    """Say in one line that the cache of ``datasets`` cannot be written."""
    import datasets

    with writing(Path(datasets.config.HF_DATASETS_CACHE)):
        yield


def _is_hub_name(source: str) -> bool:
    path = Path(source)
    known = source == EMBEDDED or exists(path) or kind_of(path)
    return not known and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) is not None


def _is_on_side(texts: list[str | None], holdout: float, to_heldout: bool) -> list[bool]:
    """For each text, whether it is on the wanted side of the split and not blank."""
    return [bool(text and text.strip()) and _is_heldout(cast(str, text), holdout) == to_heldout for text in texts]


def _is_heldout(text: str, holdout: float) -> bool:
    draw = hashlib.blake2b(text.encode(), digest_size=8, person=b"scorelm holdout").digest()
    return int.from_bytes(draw, "little") < holdout * 2**64


def _load_from_hub(name: str, field: str) -> Any:
    import datasets

    with as_input_error(f"{name} is not a file or directory, and the Hugging Face hub gave no such dataset"):
        loaded = datasets.load_dataset(name, split="train")
    return text_column(loaded, field, name)


def _encode(side: datasets.Dataset, tokenizer: Tokenizer, processes: int | None) -> datasets.Dataset:
    import datasets

    features = datasets.Features({"ids": datasets.List(datasets.Value("int32"))})
    if not len(side):
        return datasets.Dataset.from_dict({"ids": []}, features=features)
    useful = processes or min(os.cpu_count() or 1, len(side) // _ROWS_PER_PROCESS)
    return side.map(
        _encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=side.column_names,
        features=features,
        num_proc=min(useful, len(side)) if useful > 1 else None,
    )


def _encode_batch(batch: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    return {"ids": [tokenizer.encode_document(text) for text in batch["text"]]}


def _count_tokens(dataset: datasets.Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    import pyarrow.compute as pc

    table = dataset.with_format("arrow")[:]
    return np.asarray(pc.list_value_length(table["ids"]), dtype=np.int64)

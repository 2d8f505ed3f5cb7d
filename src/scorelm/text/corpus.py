"""A corpus is a training side and a held-out side of one example a row, first as text and then as token ids.

Hugging Face ``datasets`` parses and caches both in Arrow files (``HF_DATASETS_CACHE``), never beside the user's data.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import lzma
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from scorelm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import datasets

_EMBEDDED = "kjv"
_KINDS = {".txt": "text", ".txt.xz": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_READABLE = ".txt, .jsonl, .json, .csv or .parquet"
_CHUNK = 1 << 20  # bytes
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
            fingerprint = _digest(field.encode(), examples._fingerprint.encode())
        else:
            name, (examples, fingerprint) = Path(source).name.partition(".")[0], _local(source, field)
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
    return Corpus(corpus.name, train, heldout, _digest(corpus.fingerprint.encode(), tokenizer.to_bytes()))


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
    known = source == _EMBEDDED or path.exists() or _kind(path)
    return not known and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) is not None


def _kind(path: Path) -> str | None:
    return _KINDS.get("".join(path.suffixes[-2:]).lower()) or _KINDS.get(path.suffix.lower())


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _belongs(texts: list[str | None], holdout: float, to_heldout: bool) -> list[bool]:
    """Which texts are not blank and on the wanted side of the split."""
    return [bool(text and text.strip()) and _is_heldout(cast(str, text), holdout) == to_heldout for text in texts]


def _is_heldout(text: str, holdout: float) -> bool:
    draw = hashlib.blake2b(text.encode(), digest_size=8, person=b"scorelm holdout").digest()
    return int.from_bytes(draw, "little") < holdout * 2**64


def _local(source: str, field: str) -> tuple[datasets.Dataset, str]:
    """Examples of the files at ``source`` in the column ``text``, and a fingerprint of their contents."""
    import datasets

    digests = {path: digest for path in _files(source) if (digest := _checked(path))}
    if not digests:
        raise ValueError(f"{source} is empty: it has no line that is not blank")
    parts, seen = [], []
    for kind, group in groupby(digests, key=lambda path: cast(str, _kind(path))):
        paths = list(group)
        reader = kind if kind == "text" else f"{kind} {field}"
        seen.append(_digest(reader.encode(), *(digests[path].encode() for path in paths)))
        parts.append(_lines(paths, seen[-1]) if kind == "text" else _parsed(kind, paths, field))
    return datasets.concatenate_datasets(parts), _digest(*(part.encode() for part in seen))


def _files(source: str) -> list[Path]:
    if source == _EMBEDDED:
        return [Path(str(files("scorelm.assets").joinpath("kjv.txt.xz")))]
    path = Path(source)
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.is_file() and _kind(entry))
        if not found:
            raise ValueError(f"directory {source} holds no {_READABLE} file")
        return found
    if not path.exists():
        raise ValueError(f"{source} does not exist: check the path")
    if not _kind(path):
        raise ValueError(f"cannot read {source}: {path.suffix or 'no'} extension, where {_READABLE} is needed")
    return [path]


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, lzma.open(path)) if path.suffix == ".xz" else path.open("rb")


def _checked(path: Path) -> str | None:
    """Digest of a file's contents, None if it is blank; text must be UTF-8."""
    digest, blank, offset = hashlib.blake2b(digest_size=16), True, 0
    decoder = codecs.getincrementaldecoder("latin-1" if _kind(path) == "parquet" else "utf-8")()
    try:
        with _opened(path) as file:
            chunk = b"begin"
            while chunk:
                chunk = file.read(_CHUNK)
                digest.update(chunk)
                blank = blank and not chunk.strip()
                pending = len(decoder.getstate()[0])
                decoder.decode(chunk, final=not chunk)
                offset += len(chunk)
    except UnicodeDecodeError as error:
        place = offset - pending + error.start
        raise ValueError(f"{path} is not UTF-8 (byte offset {place}): convert it, for example with iconv") from None
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return None if blank else digest.hexdigest()


def _lines(paths: list[Path], fingerprint: str) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_generator(
        _examples,
        features=datasets.Features({"text": datasets.Value("string")}),
        gen_kwargs={"paths": [str(path) for path in paths]},
        fingerprint=fingerprint,
    )


def _examples(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        with _opened(Path(path)) as file:
            for number, line in enumerate(file):
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
                yield {"text": text.removesuffix("\n").rstrip("\r")}


def _parsed(kind: str, paths: list[Path], field: str) -> Any:
    import datasets

    names = [str(path) for path in paths]
    options = {"keep_default_na": False} if kind == "csv" else {}  # or a line that reads NA would be missing
    with _one_line(f"cannot read {', '.join(names)} as {kind}"):
        parsed = datasets.load_dataset(kind, data_files=names, split="train", **options)
    return _column(parsed, field, names[0])


def _from_hub(name: str, field: str) -> Any:
    import datasets

    with _one_line(f"{name} is no file or directory, and the Hugging Face hub gave no such dataset"):
        loaded = datasets.load_dataset(name, split="train")
    return _column(loaded, field, name)


@contextmanager
def _one_line(complaint: str) -> Iterator[None]:
    """Turn any failure into a ValueError that names its cause in one line."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(f"{complaint} ({reason})") from None


def _column(dataset: Any, field: str, source: str) -> Any:
    """The one column ``field`` of a dataset as strings, under the name ``text``."""
    import datasets

    if field not in dataset.column_names:
        raise ValueError(f"{source} has no field {field!r}; its fields are {', '.join(dataset.column_names)}")
    column = dataset.select_columns([field])
    kind = getattr(column.features[field], "dtype", "a list")
    if kind not in ("string", "large_string"):
        raise ValueError(f"field {field!r} of {source} holds {kind}, not text")
    column = column if field == "text" else column.rename_column(field, "text")
    return column if kind == "string" else column.cast(datasets.Features({"text": datasets.Value("string")}))


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

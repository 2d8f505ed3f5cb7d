"""What a source is, a place on the disk or on the Hugging Face hub, and the examples that are read from it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from scorelm.config.recipe import TextOptions
from scorelm.errors import InputError, brief, exists
from scorelm.text.files import EMBEDDED, as_input_error, digest_of, find_files, kind_of, name_of
from scorelm.text.records import (
    Counts,
    first_lines,
    read_line_arrays,
    read_lines,
    read_records,
    require_field,
    text_column,
)
from scorelm.text.splits import Split, looks_hard_wrapped, make_split

if TYPE_CHECKING:
    import pyarrow as pa

_AT_ONCE = 1000  # records or examples


@dataclass(frozen=True)
class Reading:
    """How the text of a source is read.

    Attributes:
        field: the column to read, except of text files.
        split: what an example is, as `scorelm.text.splits` has it; None for lines of text files and whole records.
        csv_separator: of CSV files; None to find out.

    Raises:
        InputError: no such split, or a separator of more than one character.
    """

    field: str = "text"
    split: str | None = None
    csv_separator: str | None = None

    def __post_init__(self) -> None:
        make_split("line" if self.split is None else self.split)
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise InputError(f"a CSV separator is one character, or 'tab', not {brief(repr(self.csv_separator))}")

    @classmethod
    def of(cls, options: TextOptions) -> Self:
        """What options of the command line or of a recipe say."""
        return cls(options.field, options.split, options.csv_separator)

    @property
    def separator(self) -> str | None:
        """The separator as a character."""
        return "\t" if self.csv_separator in ("tab", "\\t") else self.csv_separator

    def split_of(self, kind: str) -> Split | None:
        """How texts of a kind of file become examples; None where each line or record is one as it is."""
        usual = "line" if kind == "text" else "file"
        return None if self.split in (None, usual) else make_split(self.split)

    def digest(self, kind: str) -> bytes:
        """What of all this makes a difference for a kind of file."""
        columns = "" if kind == "text" else self.field
        separator = self.separator if kind == "csv" else ""
        return repr((kind, columns, separator, self.split if self.split_of(kind) else None)).encode()


AS_IT_IS = Reading()
"""Lines of text files, whole records, and the column ``text``."""

Pairs = Iterator[tuple[Any, Any]]
"""Arrow arrays of examples, and of what each repeats of the one before it, or None."""


class Source(Protocol):
    """Where text comes from."""

    name: str
    reading: Reading
    fingerprint: str
    """Changes with every example and with their order."""
    left_out: str
    """What is not read, and why."""

    def wrapped(self) -> list[str]:
        """Text files of which every line is an example, though they look hard-wrapped."""

    def batches(self, counts: Counts) -> Pairs:
        """The examples, many at a time; `counts` takes what is found.

        Raises:
            InputError: something that cannot be read; names it.
        """


def open_source(source: str, reading: Reading) -> Source:
    """The source of that name: ``kjv`` (embedded), a path, or a dataset on the Hugging Face hub.

    Raises:
        InputError: there is none, or it is empty, damaged or not UTF-8.
    """
    if not source:
        raise InputError("the text has no name: give a file, a directory, a dataset of the Hugging Face hub, or kjv")
    path = Path(source)
    known = source == EMBEDDED or exists(path) or kind_of(path)
    if not known and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        return Hub(source, reading)
    return Disk(source, reading)


class Disk:
    """A file, or a directory of files."""

    def __init__(self, source: str, reading: Reading) -> None:
        self.name, self.reading = name_of(source), reading
        files = find_files(source)
        self.left_out, self.paths = files.describe_left_out(), list(files.digests)
        parts = ((reading.digest(str(kind_of(path))), digest) for path, digest in files.digests.items())
        self.fingerprint = digest_of(*(part for how, digest in parts for part in (how, digest.encode())))

    def wrapped(self) -> list[str]:
        """Text files of which every line is an example, though they look hard-wrapped."""
        lines = [path for path in self.paths if self.reading.split is None and kind_of(path) == "text"]
        return [path.name for path in lines if looks_hard_wrapped(first_lines(path))]

    def batches(self, counts: Counts) -> Pairs:
        """The examples of all files."""
        reading = self.reading
        for path in self.paths:
            kind = str(kind_of(path))
            split = reading.split_of(kind)
            with as_input_error(f"cannot read {brief(str(path))} as {kind}"):
                if kind != "text":
                    records = read_records(kind, path, reading.field, reading.separator, counts)
                    yield from _split_records(records, split, counts)
                elif split is not None:
                    yield from _arrays(split(read_lines(path)))
                else:
                    yield from ((lines, None) for lines in read_line_arrays(path))


class Hub:
    """The ``train`` split of a dataset on the Hugging Face hub."""

    left_out = ""

    def __init__(self, source: str, reading: Reading) -> None:
        import datasets

        self.name, self.reading = source, reading
        with as_input_error(f"{source} is not a file or directory, and the Hugging Face hub gave no such dataset"):
            self.rows = datasets.load_dataset(source, split="train")
        self.fingerprint = digest_of(reading.digest("hub"), self.rows._fingerprint.encode())

    def wrapped(self) -> list[str]:
        """None: a dataset has records."""
        return []

    def batches(self, counts: Counts) -> Pairs:
        """The examples of the dataset."""
        field, split = self.reading.field, self.reading.split_of("hub")
        with as_input_error(f"cannot read {self.name}"):
            counts.fields |= dict.fromkeys(self.rows.column_names)
            require_field(field, self.rows.column_names)
            for table in self.rows.select_columns([field]).with_format("arrow").iter(_AT_ONCE):
                yield from _split_records([text_column(table.column(0).combine_chunks(), field)], split, counts)


def _split_records(batches: Iterable[pa.StringArray], split: Split | None, counts: Counts) -> Pairs:
    for batch in batches:
        counts.records, counts.missing = counts.records + len(batch), counts.missing + batch.null_count
        texts = batch.drop_null()
        if split is None:
            yield texts, None
        else:
            yield from _arrays(_split_texts(texts.to_pylist(), split, counts))


def _split_texts(texts: list[str], split: Split, counts: Counts) -> Iterator[tuple[str, str]]:
    for text in texts:
        if text.strip():
            yield from split(io.StringIO(text, newline="\n"))
        else:
            counts.blank += 1


def _arrays(pairs: Iterator[tuple[str, str]]) -> Pairs:
    import pyarrow as pa

    while some := list(islice(pairs, _AT_ONCE)):
        lead, own = zip(*some, strict=True)
        yield pa.array(own, pa.string()), pa.array(lead, pa.string()) if any(lead) else None

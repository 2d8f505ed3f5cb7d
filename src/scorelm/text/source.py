"""What a source is, a place on the disk or on the Hugging Face hub, and the examples that are read from it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from scorelm.config.text import TextOptions
from scorelm.errors import InputError, brief, exists
from scorelm.text.files import EMBEDDED, as_input_error, digest_of, find_files, kind_of, name_of
from scorelm.text.records import (
    Counts,
    first_lines,
    listed,
    read_line_arrays,
    read_lines,
    read_records,
    require_field,
    text_column,
)
from scorelm.text.splits import Split, looks_hard_wrapped, make_split

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

CHUNK = 10_000, 1 << 24
"""Most records and characters of a stream that are read, and shuffled, together."""
_AT_ONCE = 1000  # records or examples


@dataclass(frozen=True)
class Reading:
    """How the text of a source is read.

    Attributes:
        field: the column to read, except of text files.
        split: what an example is, as `scorelm.text.splits` has it; None for lines of text files and whole records.
        csv_separator: of CSV files; None to find out.
        hub_split: of a dataset on the Hugging Face hub, as ``datasets`` reads it; None for ``train``.
        hub_config: which configuration of it; None for the one that it has, or its default.
        streaming: of a dataset on the hub, whether it is not fetched: its examples are then those of its first records,
            and `scorelm.text.streaming` reads on.

    Raises:
        InputError: no such split, a separator of more than one character, or an empty name.
    """

    field: str = "text"
    split: str | None = None
    csv_separator: str | None = None
    hub_split: str | None = None
    hub_config: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        make_split("line" if self.split is None else self.split)
        if "" in (self.hub_split, self.hub_config):
            raise InputError("--hub-split and --hub-config need a name")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise InputError(f"a CSV separator is one character, or 'tab', not {brief(repr(self.csv_separator))}")

    @classmethod
    def of(cls, options: TextOptions) -> Self:
        """What options of the command line or of a recipe say."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    @property
    def of_hub(self) -> list[str]:
        """The flags of what is for datasets on the hub only, and is given."""
        given = {"--hub-split": self.hub_split, "--hub-config": self.hub_config, "--streaming": self.streaming or None}
        return [flag for flag, value in given.items() if value is not None]

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
        InputError: there is none, it is empty, damaged or not UTF-8, or `reading` does not go with it.
    """
    if not source:
        raise InputError("the text has no name: give a file, a directory, a dataset of the Hugging Face hub, or kjv")
    path = Path(source)
    known = source == EMBEDDED or exists(path) or kind_of(path)
    if not known and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        return Hub(source, reading)
    if reading.of_hub:
        flags = " and ".join(reading.of_hub)
        raise InputError(f"{brief(source)} is no dataset of the Hugging Face hub: leave out {flags}")
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
    """A split of a dataset on the Hugging Face hub."""

    left_out = ""

    def __init__(self, source: str, reading: Reading) -> None:
        import datasets

        self.name, self.reading = source, reading
        config, split = reading.hub_config, reading.hub_split or "train"
        try:
            if reading.streaming:
                builder = datasets.load_dataset_builder(source, config)
                self.rows: Any = builder.as_streaming_dataset(split)
                version = repr((builder.config_id, builder.hash, split, CHUNK))
            else:
                self.rows = datasets.load_dataset(source, config, split=split)
                version = self.rows._fingerprint
        except Exception as error:
            raise InputError(_why_not(source, reading, error)) from None
        self.fingerprint = digest_of(reading.digest("hub"), version.encode())

    def wrapped(self) -> list[str]:
        """None: a dataset has records."""
        return []

    def batches(self, counts: Counts) -> Pairs:
        """The examples of the dataset; of a stream, those of its first records."""
        field = self.reading.field
        with as_input_error(f"cannot read {self.name}"):
            names = self.rows.column_names or list(next(iter(self.rows), {}))
            counts.fields |= dict.fromkeys(names)
            require_field(field, names)
        if self.reading.streaming:
            yield from self.examples(self.read_chunk(iter(self.part(0, 1))), counts)
            return
        with as_input_error(f"cannot read {self.name}"):
            for table in self.rows.select_columns([field]).with_format("arrow").iter(_AT_ONCE):
                yield from self.examples(text_column(table.column(0).combine_chunks(), field), counts)

    def part(self, index: int, count: int) -> datasets.IterableDataset:
        """One of the equal parts of a stream, which share no record, with a state of its own."""
        from datasets.distributed import split_dataset_by_node

        rows = deepcopy(self.rows).select_columns([self.reading.field])
        part: datasets.IterableDataset = split_dataset_by_node(rows, index, count)
        return part

    def read_chunk(self, records: Iterator[dict[str, Any]]) -> pa.StringArray:
        """The texts of the next records of a stream, `CHUNK` of them or characters; none at its end."""
        import pyarrow as pa

        field, (most, most_characters) = self.reading.field, CHUNK
        texts, size = list[Any](), 0
        with as_input_error(f"cannot read {self.name}"):
            for record in records:
                texts.append(record[field])
                size += len(texts[-1]) if isinstance(texts[-1], str) else 0
                if len(texts) == most or size >= most_characters:
                    break
            kind = pa.string() if all(text is None for text in texts) else None
            return text_column(pa.array(texts, kind), field)

    def examples(self, texts: pa.StringArray, counts: Counts) -> Pairs:
        """The examples in the texts of records."""
        return _split_records([texts], self.reading.split_of("hub"), counts)


def _why_not(source: str, reading: Reading, error: Exception) -> str:
    """Why the hub gives no such text: in one line, with the configurations or splits that there are."""
    import datasets

    name, config, split = brief(source), reading.hub_config, reading.hub_split or "train"
    nothing = f"{name} has no records to read"
    if isinstance(error, StopIteration):  # no file has a line
        return nothing
    if type(error) is ValueError:  # of `datasets` itself, and not of what parses files
        with suppress(Exception):
            default = config or datasets.get_dataset_default_config_name(source)
            if default not in (configs := datasets.get_dataset_config_names(source)):
                has = "several configurations" if config is None else f"no configuration {brief(config)}"
                return f"{name} has {has}: give --hub-config with one of {listed(configs)}"
            splits = datasets.get_dataset_split_names(source, default)
            if split in splits:
                return nothing if "no data" in str(error) else f"cannot read {name} ({brief(str(error))})"
            part = "" if reading.streaming else f", or a part such as {splits[0]}[:10%]"
            return f"{name} has no split {brief(split)}: give --hub-split with one of {listed(splits)}{part}"
    there = isinstance(error, datasets.exceptions.DatasetGenerationError)
    cause = (error.__cause__ if there else None) or error
    reason = brief((str(cause).strip() or type(cause).__name__).splitlines()[0])
    if there:
        return f"cannot read {name} ({reason})"
    return f"{name} is not a file or directory, and the Hugging Face hub gave no such dataset ({reason})"


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

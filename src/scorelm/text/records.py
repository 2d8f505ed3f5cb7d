"""The texts of files: lines of text files, and one column of JSON, CSV and Parquet files, byte for byte.

Nothing is guessed: a column is text or it is refused, and what has no text is counted.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scorelm.errors import InputError, brief
from scorelm.text.files import open_file

if TYPE_CHECKING:
    import pyarrow as pa

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
"""What is tried as the separator of a CSV file."""
_CHUNK = 1 << 22  # bytes
_LARGEST_ARRAY = 1 << 28  # bytes of JSON that are held in memory at once
_LOOKED_AT = 1 << 20  # bytes
_ROWS_AT_ONCE = 1000
_MOST_FIELDS = 1000  # that are remembered


@dataclass
class Counts:
    """What a source was found to hold."""

    examples: int = 0
    blank: int = 0
    """Examples that are left out, since they are white space only."""
    duplicates: int = 0
    """Examples whose normal form another one before them has."""
    records: int = 0
    """Of files with columns."""
    missing: int = 0
    """Records without the field, or with null in it."""
    fields: dict[str, None] = field(default_factory=dict)
    separators: dict[str, None] = field(default_factory=dict)
    """Names of the separators of CSV files."""


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, each with its line feed, which is all that ends one."""
    with open_file(path) as file:
        for number, line in enumerate(file):
            yield line.decode("utf-8-sig" if number == 0 else "utf-8")


def first_lines(path: Path) -> list[str]:
    """The whole lines in the first megabyte of a text file."""
    with open_file(path) as file:
        return file.read(_LOOKED_AT).decode(errors="ignore").split("\n")[:-1]


def read_line_arrays(path: Path) -> Iterator[pa.StringArray]:
    """The lines of a text file without their ends, many at a time: the same as `read_lines`, but fast."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with open_file(path) as file:
        chunk, rest = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8), b""
        while chunk or rest:
            whole, feed, rest = (rest + chunk).rpartition(b"\n") if chunk else (rest, b"", b"")
            if feed or not chunk:
                text = pa.array([whole], pa.large_binary()).cast(pa.large_string())
                yield pc.utf8_rtrim(pc.split_pattern(text, "\n").flatten().cast(pa.string()), characters="\r")
            chunk = file.read(max(_CHUNK, len(rest))) if chunk else b""


def read_records(kind: str, path: Path, field: str, separator: str | None, counts: Counts) -> Iterator[pa.StringArray]:
    """The texts of a JSON, CSV or Parquet file, many at a time; null where a record has none.

    Args:
        kind: of the file.
        path: where it is.
        field: the column that holds the text.
        separator: of a CSV file; None to find out.
        counts: takes what is found.

    Raises:
        InputError: a file without this field, with something in it that is not text, or damaged.
    """
    if kind == "csv":
        return _read_csv(path, field, separator, counts)
    return _read_json(path, field, counts) if kind == "json" else _read_parquet(path, field, counts)


def _read_json(path: Path, field: str, counts: Counts) -> Iterator[pa.StringArray]:
    """Parsed by Python, since Arrow's reader crashes on deep nesting and guesses types."""
    import pyarrow as pa

    for records in _parse_json(path, field):
        texts = []
        for number, record in records:
            if not isinstance(record, dict):
                raise InputError(f"record {number} is not an object")
            text = record.get(field)
            if text is not None and not isinstance(text, str):
                raise InputError(f"field {field!r} of record {number} holds {type(text).__name__}, not text")
            if text and not text.isascii():
                _check_surrogates(text, field, number)
            if not record.keys() <= counts.fields.keys() and len(counts.fields) < _MOST_FIELDS:
                counts.fields |= dict.fromkeys(record)
            texts.append(text)
        yield pa.array(texts, pa.string())


def _check_surrogates(text: str, field: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise InputError(f"field {field!r} of record {number} holds half a character ({code})") from None


def _parse_json(path: Path, field: str) -> Iterator[Iterable[tuple[int, Any]]]:
    """The items of a JSON array, or the lines of JSON Lines, many at a time, with their numbers from 1."""
    with open_file(path) as file:
        begin = file.read(1 << 20).removeprefix(codecs.BOM_UTF8)
        if begin.lstrip().startswith(b"["):
            contents = begin + file.read(_LARGEST_ARRAY + 1 - len(begin))
            if len(contents) > _LARGEST_ARRAY:
                raise InputError("its array is larger than 256 MiB: write one object on each line instead (.jsonl)")
            yield enumerate(_load(contents, field), 1)
            return
    with open_file(path) as file:
        number = 1
        while lines := file.readlines(_CHUNK):
            if number == 1:
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
            yield _parse_lines(lines, number, field)
            number += len(lines)


def _load(contents: bytes, field: str) -> Any:
    """Parse JSON in which no object has the field twice, since Python would drop all but the last."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and sum(key == field for key, _ in pairs) > 1:
            raise InputError(f"an object has {field!r} more than once")
        return found

    return json.loads(contents.decode(), object_pairs_hook=check)


def _parse_lines(lines: list[bytes], number: int, field: str) -> Iterable[tuple[int, Any]]:
    """The values that stand on lines, numbered from `number`; read as one array, which is faster, where that can be."""
    with suppress(ValueError, RecursionError):  # a blank line or a damaged one
        values = _load(b"[" + b",null,".join(lines) + b"]", field)
        if len(values) == 2 * len(lines) - 1 and not any(values[1::2]):
            return enumerate(values[::2], number)
    return _parse_each_line(lines, number, field)


def _parse_each_line(lines: list[bytes], start: int, field: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start):
        try:
            if line.strip():
                yield number, _load(line, field)
        except json.JSONDecodeError as error:
            need = "every line must be an object, or the whole file an array of objects"
            raise InputError(f"line {number}: {error.msg}; {need}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number}: {str(error).partition(';')[0]}") from None


def _read_csv(path: Path, field: str, separator: str | None, counts: Counts) -> Iterator[pa.StringArray]:
    """By Python's reader, which keeps every field as it is and knows the line of every row."""
    import pyarrow as pa

    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(open_file(path), "utf-8-sig", newline="") as file:
        if not (first := next((line for line in file if line.strip()), "")):
            return
        separator = separator or _find_separator(first, field, path)
        rows = csv.reader(chain([first], file), delimiter=separator, strict=True)
        counts.separators[SEPARATORS.get(separator, repr(separator))] = None
        try:
            header = next(rows)
            counts.fields |= dict.fromkeys(header)
            require_field(field, header)
            column, widths = header.index(field), {0, len(header)}
            while batch := list(islice(rows, _ROWS_AT_ONCE)):
                if not widths.issuperset(map(len, batch)):
                    raise InputError(_describe_widths(path, separator))
                yield pa.array([row[column] for row in batch if row], pa.string())
        except csv.Error as error:
            reason = "a quote is opened and not closed" if "end of data" in str(error) else error
            raise InputError(f"line {_line_of_damage(path, separator)}: {reason}") from None


def _numbered_rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file and the lines that they begin on; ends before a damaged one, with its line and no row."""
    line = 0
    with io.TextIOWrapper(open_file(path), "utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        try:
            for row in rows:
                yield line + 1, row
                line = rows.line_num
        except csv.Error:
            yield line + 1, []


def _line_of_damage(path: Path, separator: str) -> int:
    return deque(_numbered_rows(path, separator), maxlen=1)[0][0]


def _describe_widths(path: Path, separator: str) -> str:
    """Where the first row is that has more or fewer fields than the header, and how many there are."""
    header: list[str] = []
    first, wrong = (0, 0), 0
    for number, row in _numbered_rows(path, separator):
        if header and row and len(row) != len(header):
            first, wrong = (number, len(row)) if not wrong else first, wrong + 1
        header = header or (row if any(map(str.strip, row)) else [])
    return (
        f"line {first[0]} has {first[1]} fields and the header {len(header)}; rows like this: {wrong:,}; put quotes "
        "around text that holds the separator, or give another --csv-separator"
    )


def _find_separator(header: str, field: str, path: Path) -> str:
    """The separator with which a header has the field, or else the one that makes the most fields of it."""
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes)
    tried = sorted(SEPARATORS, key=lambda c: tabs and c != "\t")

    def fields(separator: str) -> list[str]:
        return next(csv.reader([header], delimiter=separator))

    return max(tried, key=lambda c: (field in fields(c), len(fields(c))))


def _read_parquet(path: Path, field: str, counts: Counts) -> Iterator[pa.StringArray]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        counts.fields |= dict.fromkeys(names)
        require_field(field, names)
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[field]):
            yield text_column(batch.column(field), field)


def require_field(field: str, fields: list[str]) -> None:
    """Refuse what has no such field, or two of that name.

    Raises:
        InputError: names the fields there are.
    """
    if field not in fields:
        raise InputError(f"it has no field {field!r}; its fields are {listed(fields)}")
    if fields.count(field) > 1:
        raise InputError(f"it has {fields.count(field)} columns {field!r}")


def listed(fields: Iterable[str]) -> str:
    """Names of fields in one line, in quotes where white space or a comma would be misread; none at all in words."""
    names = [repr(name) if not name or re.search(r"[\s,]", name) else name for name in fields]
    return brief(", ".join(names) or "none at all")


def text_column(column: Any, field: str) -> pa.StringArray:
    """The texts of an Arrow array of any kind of text.

    Raises:
        InputError: it does not hold text, or its text is not UTF-8.
    """
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"field {field!r} holds {kind}, not text")
    try:
        column.validate(full=True)
        return column.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise InputError(f"field {field!r} is damaged: {brief(str(error))}") from None

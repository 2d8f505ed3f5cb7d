"""Read examples from text, JSON, CSV and Parquet files, trusting nothing in them before it has been checked."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from scorelm.errors import InputError, brief, exists

if TYPE_CHECKING:
    import datasets

EMBEDDED = "kjv"
_KINDS = {".txt": "text", ".txt.xz": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_READABLE = ".txt, .jsonl, .json, .csv or .parquet"
_CHUNK = 1 << 20  # bytes
_LARGEST_ARRAY = 1 << 28  # bytes of JSON that are held in memory at once
_LARGEST_EXPANSION = 1000  # times a compressed file may grow; prose grows less than tenfold
_ROWS_AT_ONCE = 10_000


def kind_of(path: Path) -> str | None:
    """The kind of file that a name says it is, or None where no reader is known."""
    return _KINDS.get("".join(path.suffixes[-2:]).lower()) or _KINDS.get(path.suffix.lower())


def digest_of(*parts: bytes) -> str:
    """A fingerprint of byte strings and of where each ends."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def read_files(source: str, field: str) -> tuple[datasets.Dataset, str]:
    """Read the files at ``source``: their examples in a column ``text``, and a fingerprint of their contents.

    Raises:
        InputError: a file is missing, empty, damaged or not UTF-8, or has no such field; the message names it.
    """
    import datasets

    digests = {path: digest for path in _find_files(source) if (digest := _check_contents(path))}
    if not digests:
        raise InputError(f"{brief(source)} is empty: every line is blank")
    parts, seen = [], []
    for kind, group in groupby(digests, key=lambda path: cast(str, kind_of(path))):
        paths = list(group)
        reader = kind if kind == "text" else f"{kind} {field}"
        seen.append(digest_of(reader.encode(), *(digests[path].encode() for path in paths)))
        with as_input_error(f"cannot read {brief(', '.join(map(str, paths)))} as {kind}"):
            parts.append(_parse(kind, paths, field, seen[-1]))
    return datasets.concatenate_datasets(parts), digest_of(*(part.encode() for part in seen))


def _find_files(source: str) -> list[Path]:
    if source == EMBEDDED:
        return [Path(str(files("scorelm.assets").joinpath("kjv.txt.xz")))]
    path, name = Path(source), brief(source)
    if not exists(path):
        raise InputError(f"{name} does not exist: check the path")
    if path.is_dir():
        with as_input_error(f"cannot read directory {name}"):
            found = sorted(entry for entry in path.iterdir() if entry.is_file() and kind_of(entry))
        if not found:
            raise InputError(f"directory {name} holds no {_READABLE} file to read")
        return found
    if not kind_of(path):
        ending = f"ends in {path.suffix}" if path.suffix else "has no extension"
        raise InputError(f"cannot read {name}: its name {ending}, and {_READABLE} is needed")
    if not path.is_file():
        raise InputError(f"cannot read {name}: not a regular file")
    return [path]


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, lzma.open(path)) if path.suffix == ".xz" else path.open("rb")


def _check_contents(path: Path) -> str | None:
    """Refuse a file that is not UTF-8 text (Parquet apart); returns a digest of its contents, None if it is blank."""
    name, digest, blank, offset = brief(str(path)), hashlib.blake2b(digest_size=16), True, 0
    decoder = codecs.getincrementaldecoder("latin-1" if kind_of(path) == "parquet" else "utf-8")()
    try:
        most = max(64 * _CHUNK, _LARGEST_EXPANSION * path.stat().st_size)
        with _open(path) as file:
            chunk = b"begin"
            while chunk and offset <= most:
                chunk = file.read(_CHUNK)
                digest.update(chunk)
                blank = blank and not chunk.strip()
                pending = len(decoder.getstate()[0])
                decoder.decode(chunk, final=not chunk)
                offset += len(chunk)
    except UnicodeDecodeError as error:
        place = offset - pending + error.start
        raise InputError(f"{name} is not UTF-8 (byte offset {place}): convert it, for example with iconv") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    if offset > most:
        raise InputError(f"cannot read {name}: it expands to more than {_LARGEST_EXPANSION} times its size")
    return None if blank else digest.hexdigest()


def _generate(rows: Any, fingerprint: str, **arguments: Any) -> datasets.Dataset:
    import datasets

    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.Dataset.from_generator(rows, features=features, gen_kwargs=arguments, fingerprint=fingerprint)


def _read_lines(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        with _open(Path(path)) as file:
            for number, line in enumerate(file):
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
                yield {"text": text.removesuffix("\n").rstrip("\r")}


def _read_records(paths: list[str], field: str) -> Iterator[dict[str, str | None]]:
    """The field of every JSON object; parsed by Python, since Arrow's reader crashes on deep nesting."""
    fields: dict[str, None] = {}
    for path in paths:
        for number, record in _parse_json(Path(path)):
            if not isinstance(record, dict):
                raise InputError(f"{Path(path).name}: record {number} is not an object")
            text = record.get(field)
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise InputError(f"{Path(path).name}: field {field!r} of record {number} holds {kind}, not text")
            fields |= dict.fromkeys(record if len(fields) < _ROWS_AT_ONCE else ())
            yield {"text": text}
    _require_field(field, list(fields))


def _parse_json(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, or the lines of JSON Lines, with their numbers from 1."""
    with path.open("rb") as file:
        array = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        file.seek(0)
        if array:
            contents = file.read(_LARGEST_ARRAY + 1)
            if len(contents) > _LARGEST_ARRAY:
                raise InputError("its array is larger than 256 MiB: write one object on each line instead (.jsonl)")
            yield from enumerate(json.loads(contents.decode("utf-8-sig")), 1)
            return
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{path.name}: line {number}: {error.msg}") from None


def _require_field(field: str, fields: list[str]) -> None:
    if field not in fields:
        raise InputError(f"it has no field {field!r}; its fields are {brief(', '.join(fields))}")


def _parse(kind: str, paths: list[Path], field: str, fingerprint: str) -> Any:
    """The column ``text`` of files of one kind; of their other columns only the names are read."""
    import datasets

    names = [str(path) for path in paths]
    if kind == "text":
        return _generate(_read_lines, fingerprint, paths=names)
    if kind == "json":
        return _generate(_read_records, fingerprint, paths=names, field=field)
    for path in paths:
        _require_field(field, _csv_header(path) if kind == "csv" else _parquet_header(path))
    options = (
        {"keep_default_na": False, "usecols": [field]}  # by default, a line that reads NA would be a missing value
        if kind == "csv"
        else {"columns": [field], "batch_size": _ROWS_AT_ONCE}
    )
    return text_column(datasets.load_dataset(kind, data_files=names, split="train", **options), field, names[0])


def _csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next((row for row in csv.reader(file) if row), [])


def _parquet_header(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(path).names)


@contextmanager
def as_input_error(complaint: str) -> Iterator[None]:
    """Turn any failure inside into an InputError: the complaint, and the cause in parentheses, in one line."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(f"{complaint} ({brief(reason)})") from None


def text_column(dataset: Any, field: str, source: str) -> Any:
    """A dataset with only its column ``field``, as strings and under the name ``text``.

    Raises:
        InputError: there is no such column, or it does not hold text.
    """
    import datasets
    import pyarrow as pa

    if field not in dataset.column_names:
        raise InputError(f"{source} has no field {field!r}; its fields are {brief(', '.join(dataset.column_names))}")
    found = dataset.select_columns([field])
    kind = getattr(found.features[field], "dtype", "a list")
    if kind not in ("string", "large_string"):
        raise InputError(f"field {field!r} of {source} holds {kind}, not text")
    try:
        found.data.column(field).validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"field {field!r} of {source} is damaged: {brief(str(error))}") from None
    found = found if field == "text" else found.rename_column(field, "text")
    return found if kind == "string" else found.cast(datasets.Features({"text": datasets.Value("string")}))

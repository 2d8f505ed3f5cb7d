"""Which files a source is, and their contents: opened whether compressed or not, and checked before they are read."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, cast

from scorelm.errors import InputError, at_home, brief, exists

EMBEDDED = "kjv"
READABLE = ".txt, .md, .jsonl, .json, .csv, .tsv or .parquet"
_KINDS = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
_CHUNK = 1 << 20  # bytes
_LARGEST_EXPANSION = 1000  # times a compressed file may grow; prose grows less than tenfold


class _Decompressed(io.RawIOBase):
    """The contents of a file of one or more compressed streams.

    Python's own readers of .bz2 and .xz files take a damaged stream behind a whole one for the end of the file.
    """

    def __init__(self, path: Path, decompressor: Callable[[], Any]) -> None:
        self._file, self._new = path.open("rb"), decompressor
        self._stream = self._new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = b""
        while not found:
            given = b""
            if self._stream.eof:
                if not (given := self._stream.unused_data or self._file.read(_CHUNK)):
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not (given := self._file.read(_CHUNK)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            found = self._stream.decompress(given, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bzip2(path: Path) -> BinaryIO:
    return io.BufferedReader(_Decompressed(path, bz2.BZ2Decompressor))


def _open_xz(path: Path) -> BinaryIO:
    return io.BufferedReader(_Decompressed(path, lzma.LZMADecompressor))


def _open_zstandard(path: Path) -> BinaryIO:
    import pyarrow as pa

    stream = pa.input_stream(path, compression="zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


_COMPRESSED: dict[str, Callable[[Path], object]] = {
    ".gz": gzip.open, ".bz2": _open_bzip2, ".xz": _open_xz, ".zst": _open_zstandard,
}  # fmt: skip


def kind_of(path: Path) -> str | None:
    """The kind of file that a name says it is (text, json, csv or parquet), or None where there is no reader."""
    endings = [ending.lower() for ending in path.suffixes]
    compressed = bool(endings) and endings[-1] in _COMPRESSED
    kind = _KINDS.get(endings[-1 - compressed]) if len(endings) > compressed else None
    return None if compressed and kind == "parquet" else kind


def name_of(source: str) -> str:
    """What to call a source: the name of its file without the ending, or of its directory."""
    path = Path(os.path.abspath(at_home(Path(source))))
    ending = "".join(path.suffixes[-2 if path.suffix.lower() in _COMPRESSED else -1 :])
    return brief(path.name.removesuffix(ending if kind_of(path) else ""))


def open_file(path: Path) -> BinaryIO:
    """The contents of a file as a stream of bytes, decompressed where its name says that it is compressed."""
    opener = _COMPRESSED.get(path.suffix.lower())
    return path.open("rb") if opener is None else cast(BinaryIO, opener(path))


def digest_of(*parts: bytes) -> str:
    """A fingerprint of byte strings and of where each ends."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Files:
    """The files of a source.

    Attributes:
        digests: of the contents of every file that is read, in the order in which they are.
        left_out: files and directories that are not, and why.
    """

    digests: dict[Path, str]
    left_out: dict[str, str]

    def describe_left_out(self, most: int = 5) -> str:
        """What is left out, by reason and with at most so many names each; empty where that is nothing."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        parts = []
        for why, names in reasons.items():
            more = f" and {len(names) - most:,} more" if len(names) > most else ""
            parts.append(f"{', '.join(names[:most])}{more} ({why})")
        return "; ".join(parts)


def find_files(source: str) -> Files:
    """The files of a source, each checked to be readable.

    A directory is searched with all below it. Hidden files, links to directories and what has no reader are left out.

    Raises:
        InputError: there is none, or one is damaged, blank throughout or not UTF-8; the message names it.
    """
    if source == EMBEDDED:
        left_out: dict[str, str] = {}
        top = Path(str(files("scorelm.assets").joinpath("kjv.txt.xz")))
        found = [top]
    else:
        top = at_home(Path(source))
        found, left_out = _search(top)
    digests = {}
    for path in found:
        if (digest := _check_contents(path)) is not None:
            digests[path] = digest
        else:
            left_out[str(path.relative_to(top)) if top.is_dir() else path.name] = "blank"
    if not digests:
        raise InputError(f"{brief(source)} is empty: there is no text in it")
    return Files(digests, left_out)


def _search(path: Path) -> tuple[list[Path], dict[str, str]]:
    name = brief(str(path))
    if not exists(path):
        raise InputError(f"{name} does not exist: check the path")
    if path.is_dir():
        with as_input_error(f"cannot read directory {name}"):
            found, left_out = _walk(path)
        if not found:
            raise InputError(f"directory {name} holds no {READABLE} file to read")
        return found, left_out
    if not kind_of(path):
        ending = f"ends in {path.suffix}" if path.suffix else "has no extension"
        compressions = ", ".join(_COMPRESSED)
        raise InputError(
            f"cannot read {name}: its name {ending}, and {READABLE} is needed (all but .parquet also {compressions})"
        )
    if not path.is_file():
        raise InputError(f"cannot read {name}: not a regular file")
    return [path], {}


def _walk(top: Path) -> tuple[list[Path], dict[str, str]]:
    found: list[Path] = []
    left_out: dict[str, str] = {}

    def refuse(error: OSError) -> None:
        raise error

    for folder, directories, names in os.walk(top, onerror=refuse):
        here = Path(folder)
        for name in directories:
            if name.startswith(".") or (here / name).is_symlink():
                left_out[f"{(here / name).relative_to(top)}/"] = "hidden" if name.startswith(".") else "a link"
        directories[:] = sorted(name for name in directories if f"{(here / name).relative_to(top)}/" not in left_out)
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or not path.is_file() or not kind_of(path):
                why = "hidden" if name.startswith(".") else "not a file" if not path.is_file() else "no text format"
                left_out[str(path.relative_to(top))] = why
            else:
                found.append(path)
    return found, left_out


def _check_contents(path: Path) -> str | None:
    """Refuse a file that is not UTF-8 text (Parquet apart); returns a digest of its contents, None if it is blank."""
    name, digest = brief(str(path)), hashlib.blake2b(digest_size=16)
    blank, offset = True, 0
    decoder = codecs.getincrementaldecoder("latin-1" if kind_of(path) == "parquet" else "utf-8")()
    try:
        most = max(64 * _CHUNK, _LARGEST_EXPANSION * path.stat().st_size)
        with open_file(path) as file:
            chunk = b"begin"
            while chunk and offset <= most:
                chunk = file.read(_CHUNK)
                if not offset and kind_of(path) != "parquet" and _looks_like_utf16(chunk):
                    raise InputError(f"{name} is not UTF-8 but looks like UTF-16: convert it, for example with iconv")
                digest.update(chunk)
                blank = blank and not chunk.strip()
                pending = len(decoder.getstate()[0])
                decoder.decode(chunk, final=not chunk)
                offset += len(chunk)
    except UnicodeDecodeError as error:
        place = offset - pending + error.start
        raise InputError(f"{name} is not UTF-8 (byte offset {place}): convert it, for example with iconv") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    if offset > most:
        raise InputError(f"cannot read {name}: it expands to more than {_LARGEST_EXPANSION} times its size")
    return None if blank else digest.hexdigest()


def _looks_like_utf16(begin: bytes) -> bool:
    """Whether every second byte is zero, which UTF-8 allows, as in UTF-16 without a byte order mark."""
    return b"\0" in begin and any(begin[:100:2]) != any(begin[1:100:2])


@contextmanager
def as_input_error(complaint: str) -> Iterator[None]:
    """Turn any failure inside into an InputError: the complaint, and the cause in parentheses, in one line."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(f"{complaint} ({brief(reason)})") from None

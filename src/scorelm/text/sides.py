"""The two sides of a corpus: sorted by a hash of each example, and kept as Arrow files in the cache of ``datasets``.

The hash is of a normal form, so that examples which differ by case or white space only are always on one side, on every
machine and whatever file they come from.
"""

from __future__ import annotations

import json
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scorelm.text.records import Counts

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

TRAIN, HELDOUT = "train", "heldout"
_COUNTS = "counts.json"
_SPACES = r"[\t\n\v\f\r\x1c-\x1f ]"  # of ASCII


def normal_form(texts: pa.StringArray) -> pa.StringArray:
    """Texts without case, in Unicode's form NFKC, and with one space for each run of white space; none at the ends."""
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = pc.string_is_ascii(texts)
    texts = _changed(texts, pc.invert(plain), lambda some: pa.array(map(_folded, some.to_pylist()), pa.string()))
    lower = pc.ascii_trim(pc.ascii_lower(texts), " \t\n\v\f\r\x1c\x1d\x1e\x1f")
    odd = pc.match_substring_regex(lower, rf"{_SPACES}{{2}}|[\t\n\v\f\r\x1c-\x1f]")
    found: pa.StringArray = _changed(lower, odd, lambda some: pc.replace_substring_regex(some, rf"{_SPACES}+", " "))
    return found


def _folded(text: str) -> str:
    """The normal form of any text, and of texts in ASCII what Arrow makes of them faster."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def _changed(texts: Any, which: Any, change: Any) -> Any:
    import pyarrow.compute as pc

    return pc.replace_with_mask(texts, which, change(texts.filter(which))) if pc.any(which).as_py() else texts


def hashes_of(normal: pa.StringArray) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of every text, XXH64."""
    import pyarrow as pa
    from xxhash import xxh64_intdigest

    return np.fromiter(map(xxh64_intdigest, normal.cast(pa.binary()).to_pylist()), np.uint64, len(normal))


class Sorter:
    """Says on which side examples are, and leaves out those that are white space only.

    Args:
        holdout: share that is held out.
        counts: takes how many are left out.
    """

    def __init__(self, holdout: float, counts: Counts) -> None:
        self._limit = np.uint64(int(holdout * 2**64))
        self._last, self._counts = False, counts
        self.hashes: list[Any] = []
        """Of the normal forms of all examples so far, an array for each call."""

    def sort(self, own: pa.StringArray, lead: pa.StringArray | None = None) -> tuple[pa.StringArray, Any]:
        """The examples in full, and which of them are held out.

        Args:
            own: their texts.
            lead: what each repeats of the one before it; it is left out where the two are on different sides.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        normal = normal_form(own)
        filled = pc.greater(pc.binary_length(normal), 0)
        if not pc.all(filled, min_count=0).as_py():
            self._counts.blank += len(own) - pc.sum(filled).as_py()
            own, normal, lead = own.filter(filled), normal.filter(filled), lead and lead.filter(filled)
        self.hashes.append(hashes_of(normal))
        held_out = self.hashes[-1] < self._limit
        if lead is not None and len(own):
            same = held_out == np.concatenate([[self._last], held_out[:-1]])
            own = pc.binary_join_element_wise(pc.if_else(pa.array(same), lead, ""), own, "")
        self._last = held_out[-1] if len(own) else self._last
        return own, held_out


class Writer:
    """Writes examples to the side that their hash says, and counts what is left out.

    Args:
        folder: to write to; it exists.
        holdout: share that is held out.
        counts: takes what is found.
    """

    def __init__(self, folder: Path, holdout: float, counts: Counts) -> None:
        import pyarrow as pa

        self._schema = pa.schema([("text", pa.string())])
        self._files = {side: pa.OSFile(str(folder / f"{side}.arrow"), "wb") for side in (TRAIN, HELDOUT)}
        self._streams = {side: pa.ipc.new_stream(file, self._schema) for side, file in self._files.items()}
        self._sorter, self._counts = Sorter(holdout, counts), counts

    def add(self, own: pa.StringArray, lead: pa.StringArray | None = None) -> None:
        """Write examples; see `Sorter.sort`."""
        import pyarrow as pa

        own, held_out = self._sorter.sort(own, lead)
        for side, wanted in ((TRAIN, ~held_out), (HELDOUT, held_out)):
            if len(own):
                self._streams[side].write_batch(pa.record_batch([own.filter(pa.array(wanted))], schema=self._schema))

    def close(self) -> None:
        """Close the files, and count the examples that they have."""
        for side, stream in self._streams.items():
            stream.close()
            self._files[side].close()
        found = np.sort(np.concatenate([*self._sorter.hashes, np.zeros(0, np.uint64)]))
        self._counts.examples, self._counts.duplicates = len(found), int(np.count_nonzero(found[1:] == found[:-1]))


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `final` in the end, or goes if anything fails."""
    draft = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
    draft.mkdir(parents=True)
    try:
        yield draft
        try:
            draft.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was as fast
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_counts(folder: Path, counts: Counts) -> None:
    """Keep the counts beside the sides."""
    (folder / _COUNTS).write_text(json.dumps(asdict(counts)))


def read_sides(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset, Counts] | None:
    """Training and held-out side, each a column ``text`` that stays on the disk, and what `write_counts` has kept.

    None where they are not there, or no longer whole.
    """
    try:
        counts = Counts(**json.loads((folder / _COUNTS).read_text()))
        train, heldout = read_side(folder, TRAIN), read_side(folder, HELDOUT)
    except (OSError, ValueError, TypeError):
        return None
    return (train, heldout, counts) if len(train) + len(heldout) == counts.examples else None


def read_side(folder: Path, side: str) -> datasets.Dataset:
    """One side, a column ``text`` that stays on the disk."""
    import datasets
    from datasets.table import MemoryMappedTable

    table = MemoryMappedTable.from_file(str(folder / f"{side}.arrow"))
    return datasets.Dataset(table, fingerprint=f"{folder.name}-{side}")

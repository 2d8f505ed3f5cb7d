"""Normalisation of text, where a run asks for it: a tokenizer that changes a text before it looks tokens up.

So whatever reads the text for a model, in training, for a price or a prompt, changes it alike. What changes is English:
numbers become English words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from scorelm.config.text import NormalStep
from scorelm.errors import InputError
from scorelm.text.tokenizer import Special, Tokenizer

WORDS: dict[NormalStep, str] = {
    "nfc": "in Unicode's form NFC",
    "nfkc": "in Unicode's form NFKC",
    "numbers": "with numbers as words",
    "symbols": "without symbols",
    "lower": "in lower case",
}
"""What the steps do, in the order in which they do it."""
_NUMBER = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.([0-9]+)|(st|nd|rd|th)\b)?")
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_GONE = re.compile(r"(?:\0|[^\S\n])+")
_MOST_DIGITS = 15  # longer numbers are read digit by digit


@dataclass(frozen=True)
class NormalizingTokenizer:
    """A `Tokenizer` that normalises text and leaves the rest to another.

    Args:
        inner: the other one, whose file it is kept in; the steps are kept with the model.
        steps: what to do, at least one thing.

    Raises:
        InputError: numbers are to become words and the package for it is not there.
    """

    inner: Tokenizer
    steps: tuple[NormalStep, ...]

    def __post_init__(self) -> None:
        if "numbers" in self.steps and find_spec("num2words") is None:
            raise InputError("--normalize numbers needs the package num2words: pip install 'scorelm[numbers]'")

    @property
    def file_name(self) -> str:
        """What the file of the other one is called."""
        return self.inner.file_name

    @property
    def special(self) -> Special:
        """Ids of the special tokens."""
        return self.inner.special

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.inner.vocab_size

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.inner.encode(normalize(text, self.steps))

    def encode_inside(self, text: str) -> list[int]:
        """See `Tokenizer.encode_inside`."""
        return self.inner.encode_inside(normalize(text, self.steps))

    def encode_document(self, text: str) -> list[int]:
        """See `Tokenizer.encode_document`."""
        return self.inner.encode_document(normalize(text, self.steps))

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return self.inner.decode(ids)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """See `Tokenizer.pieces`."""
        return self.inner.pieces(ids)

    def to_bytes(self) -> bytes:
        """The bytes of the other one behind the names of the steps."""
        return ",".join(self.steps).encode() + b"\n" + self.inner.to_bytes()

    def save(self, path: str | Path) -> None:
        """Write the other one."""
        self.inner.save(path)


def normalizing(tokenizer: Tokenizer, steps: Sequence[NormalStep]) -> Tokenizer:
    """A tokenizer that takes these steps first; the same one where there are none.

    Raises:
        InputError: numbers are to become words and the package for it is not there.
    """
    if not steps:
        return tokenizer
    return NormalizingTokenizer(tokenizer, tuple(name for name in WORDS if name in steps))


def as_read(text: str, tokenizer: Tokenizer) -> str:
    """A text as it is before a tokenizer looks tokens up: normalised, where it normalises."""
    return normalize(text, tokenizer.steps) if isinstance(tokenizer, NormalizingTokenizer) else text


def in_words(steps: Sequence[NormalStep]) -> str:
    """What the steps do to a text, for people."""
    return ", ".join(what for name, what in WORDS.items() if name in steps)


def normalize(text: str, steps: Sequence[NormalStep]) -> str:
    """The text after these steps, in the order of `WORDS`; taking them again changes nothing more."""
    form: Literal["NFC", "NFKC"] | None = "NFKC" if "nfkc" in steps else "NFC" if "nfc" in steps else None
    if form is not None:
        text = unicodedata.normalize(form, text)
    if "numbers" in steps:
        text = _NUMBER.sub(_read_number, text)
    if "symbols" in steps:
        text = _GONE.sub(_leave_out, _strike(text))
    if "lower" in steps:
        text = text.lower()
    return text if form is None else unicodedata.normalize(form, text)


def _read_number(found: re.Match[str]) -> str:
    """A number in words, set apart from letters beside it; 1,000 and 3.5 and 21st are numbers."""
    num2words = import_module("num2words").num2words

    def by_digit(digits: str) -> str:
        return " ".join(num2words(int(digit)) for digit in digits)

    digits, fraction, ordinal = found[1].replace(",", ""), found[2], found[3]
    if len(digits) > _MOST_DIGITS or (digits[0] == "0" and len(digits) > 1):
        words = by_digit(digits) + (ordinal or "")
    else:
        words = num2words(int(digits), to="ordinal" if ordinal else "cardinal").replace(",", "")
    words += f" point {by_digit(fraction)}" if fraction else ""
    text, start, end = found.string, found.start(), found.end()
    before, behind = text[start - 1 : start].isalpha(), text[end : end + 1].isalpha()
    return f"{' ' * before}{words}{' ' * behind}"


def _strike(text: str) -> str:
    """The text with U+0000 for all but letters, their marks, digits, white space and apostrophes inside words."""
    kept = {found.start() for found in _APOSTROPHE.finditer(text)}
    return "".join(
        sign if unicodedata.category(sign)[0] in "LMN" or sign.isspace() or place in kept else "\0"
        for place, sign in enumerate(text)
    )


def _leave_out(found: re.Match[str]) -> str:
    """What is left of symbols and the spaces among them: a space, where there was one or words would touch."""
    run, text = found[0], found.string
    if run.isspace():
        return run
    inside = found.start() > 0 and found.end() < len(text) and not text[found.end()].isspace()
    inside = inside and not text[found.start() - 1].isspace()
    return " " if inside or any(sign.isspace() for sign in run) else ""

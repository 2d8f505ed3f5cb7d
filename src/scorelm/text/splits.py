"""How a text becomes examples: by lines, by paragraphs, whole, or in windows of sentences.

A split takes the lines of one text, each with its line feed, as `file.readlines` gives them. It leaves out only the
white space between examples. `SPLITS` is the registry that ``--split`` and its help are read from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from statistics import quantiles

from scorelm.config.registry import read
from scorelm.errors import InputError

Split = Callable[[Iterable[str]], Iterator[tuple[str, str]]]
"""Gives pairs: what an example repeats of the one before it ("" but for overlapping windows), and what is its own."""

_NO_END = r"(?<!\b[^\W\d_]\.)(?<!\bDr\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\bProf\.)"  # J., e.g.
_SENTENCE = re.compile(rf"""(?:[.!?…]{_NO_END}["'”’»)\]]*\s+|[。！？]["'”’»」』）)\]]*\s*|\n\s*\n\s*)""")
_CUT_AT = 1 << 20  # characters of a text that are held in memory to find sentences in
_FEWEST_LINES = 20  # to judge how a text is wrapped by
_NARROWEST, _WIDEST = 40, 130  # columns of hard-wrapped text


def make_split(text: str) -> Split:
    """The split of that name, such as ``sentence-window:200,0.25``.

    Raises:
        InputError: no such split, or numbers that do not fit it.
    """
    return read(text, SPLITS, "split")


def line() -> Split:
    """Every line is an example. The default for text files."""
    return lambda lines: (("", line.removesuffix("\n").rstrip("\r")) for line in lines)


def paragraph() -> Split:
    """Every run of lines without a blank one is an example, with its line feeds."""

    def split(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
        for blank, run in groupby(lines, lambda line: not line.strip()):
            if not blank:
                yield "", "".join(run).rstrip("\r\n")

    return split


def file() -> Split:
    """Every file, or the text of every record, is one example. The default for files with columns."""
    return lambda lines: iter([("", "".join(lines).rstrip("\r\n"))])


def sentence_window(characters: float = 200, overlap: float = 0) -> Split:
    """Whole sentences, up to so many characters (a token has about three), are an example.

    A window repeats only what was new in the one before it, so that nothing of a third one comes along.

    Args:
        characters: most in a window; a longer sentence is a window of its own.
        overlap: share of a window, below 1, that may be repeated at the start of the next one.

    Raises:
        InputError: numbers out of range.
    """
    if not (characters >= 1 and 0 <= overlap < 1):
        raise InputError("a sentence window needs at least 1 character, and an overlap of at least 0 and below 1")

    def split(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
        lead: list[str] = []
        own: list[str] = []
        length = 0
        for sentence in sentences(lines):
            if own and length + len(sentence.rstrip()) > characters:
                yield "".join(lead), "".join(own).rstrip()
                lead, own = _end_of(own, min(overlap * characters, characters - len(sentence.rstrip()))), []
                length = sum(map(len, lead))
            own.append(sentence)
            length += len(sentence)
        if own:
            yield "".join(lead), "".join(own).rstrip()

    return split


SPLITS: dict[str, Callable[..., Split]] = {
    "line": line, "paragraph": paragraph, "file": file, "sentence-window": sentence_window,
}  # fmt: skip
"""Every split, by name."""


def sentences(lines: Iterable[str]) -> Iterator[str]:
    """The sentences of a text, each with the white space behind it: together they are the text."""
    kept: list[str] = []
    length, most = 0, _CUT_AT
    for line in lines:
        kept.append(line)
        length += len(line)
        if length > most:
            *whole, rest = _cut("".join(kept))  # the last one may go on
            yield from whole
            kept, length = [rest], len(rest)
            most = max(_CUT_AT, 2 * length)
    yield from _cut("".join(kept))


def _cut(text: str) -> Iterator[str]:
    start = len(text) - len(text.lstrip())
    ends = [end.end() for end in _SENTENCE.finditer(text, start)]
    return (text[a:b] for a, b in pairwise([0, *ends, len(text)]) if a < b)


def _end_of(parts: Sequence[str], most: float) -> list[str]:
    """The last parts that have at most so many characters together."""
    start, length = len(parts), 0
    while start and length + len(parts[start - 1]) <= most:
        start -= 1
        length += len(parts[start])
    return list(parts[start:])


def looks_hard_wrapped(lines: Sequence[str]) -> bool:
    """Whether the lines of a text look as if an editor had broken its paragraphs into them at a fixed width.

    Then nearly every line that has another one below it is so long that the next word would hardly have fitted, and
    most of them end inside a sentence.
    """
    kept = [line.rstrip() for line in lines]
    inner = [(line, below.split()[0]) for line, below in pairwise(kept) if line and below]
    if len(inner) < _FEWEST_LINES:
        return False
    width = quantiles((len(line) for line, _ in inner), n=20)[-1]
    full = sum(len(line) + 1 + len(word) > 0.9 * width for line, word in inner) / len(inner)
    inside = sum(line[-1] not in ".!?:;…\"'”’)" for line, _ in inner) / len(inner)
    return _NARROWEST <= width <= _WIDEST and full > 0.75 and inside > 0.6

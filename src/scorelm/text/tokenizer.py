"""What the library asks of a tokenizer: text to token ids and back, and which ids are special."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol


class Special(NamedTuple):
    """The ids of the four tokens that stand for no text."""

    bos: int
    """``<s>``, the first token of every document."""
    eos: int
    """``</s>``, the last token of every document."""
    pad: int
    """``<pad>``, which fills rows up and is no part of a document."""
    unk: int
    """``<unk>``, which stands for what the vocabulary cannot spell."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    A tokenizer can be pickled, so that worker processes can have it; ids count from 0 to ``vocab_size - 1``.
    """

    @property
    def special(self) -> Special:
        """Ids of the special tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without ``<s>`` and ``</s>``.

        Raises:
            InputError: the text is not Unicode.
        """

    def encode_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that follows other text: no space is put before its first word.

        Raises:
            InputError: the text is not Unicode.
        """

    def encode_document(self, text: str) -> list[int]:
        """Return the token ids of a text between ``<s>`` and ``</s>``.

        Raises:
            InputError: the text is not Unicode.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, skipping ``<s>``, ``</s>`` and ``<pad>``; any sequence of ids is safe.

        Raises:
            InputError: an id outside the vocabulary.
        """

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary entry of each id, special ones included; a leading ``▁`` is a space.

        Raises:
            InputError: an id outside the vocabulary.
        """

    def to_bytes(self) -> bytes:
        """Return the bytes that are the whole tokenizer; equal tokenizers have equal bytes."""

    def save(self, path: str | Path) -> None:
        """Write those bytes to a file, all of it or nothing.

        Raises:
            InputError: the file cannot be written.
        """


def count_lost(text: str, decoded: str) -> int:
    """How many characters of a text a tokenizer has lost that gives it back as `decoded`; at least 1 if they differ."""
    return 0 if decoded == text else max(1, (Counter(text) - Counter(decoded)).total())

"""What the library asks of a tokenizer: text to token ids and back, and which ids are special."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from scorelm.errors import InputError, brief, exists, writing

FILES = ("tokenizer.model", "tokenizer.json")
"""What the file of a tokenizer is called in a directory: one of SentencePiece, or of Hugging Face's library."""


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
    def file_name(self) -> str:
        """Which of `FILES` it is kept in."""

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
        """Return what each id adds to a text, or the name of a special one: every space is ``▁``.

        ``<0xE4>`` is a byte that is only part of a character. Tokenizers that mark spaces otherwise, or the rest of
        words rather than spaces, say the same as those that write ``▁``.

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


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer: a ``tokenizer.json`` of Hugging Face's library, or else a SentencePiece ``.model``.

    Raises:
        InputError: the file cannot be read, is damaged, or is not of a kind that can be used; names the file.
    """
    if path.suffix == ".json":
        from scorelm.text.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer.load(path)
    from scorelm.text.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer.load(path)


def find_tokenizer(directory: Path) -> Path:
    """The file of the tokenizer in a directory, which may not be there: then it is the one of SentencePiece.

    Raises:
        InputError: there are two, and nobody knows which of them is meant.
    """
    found = [directory / name for name in FILES if exists(directory / name)]
    if len(found) > 1:
        raise InputError(f"{directory} has both {' and '.join(FILES)}: remove the one that is not the model's")
    return found[0] if found else directory / FILES[0]


def encode_behind_a_sign(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text without a space before its first word, from a tokenizer that puts one before every text.

    The text is encoded behind a digit, which is then taken off again. Where it merges with what follows, other signs
    are tried, and if all of them do, the space stays.
    """
    for sign in "019.-|":
        ids = tokenizer.encode(sign + text)
        for before in (1, 2):
            if "".join(tokenizer.pieces(ids[:before])) in (sign, f"▁{sign}"):
                return ids[before:]
    return tokenizer.encode(text)


def check_unicode(text: str) -> str:
    """The text.

    Raises:
        InputError: it has lone surrogates, as a command-line argument that is not UTF-8 has.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"not Unicode text: {brief(text)}") from None
    return text


def check_ids(ids: Iterable[int], size: int) -> list[int]:
    """The ids as integers.

    Raises:
        InputError: one is outside a vocabulary of that size.
    """
    tokens = list(map(int, ids))
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        wrong = next(token for token in tokens if not 0 <= token < size)
        raise InputError(f"token id {wrong} is outside the vocabulary of {size}")
    return tokens


def write_whole(path: str | Path, contents: bytes) -> None:
    """Write a file, all of it or nothing.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with writing(target):
        try:
            partial.write_bytes(contents)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

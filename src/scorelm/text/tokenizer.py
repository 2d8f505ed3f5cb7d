"""A SentencePiece tokenizer with fixed special ids, digits apart and bytes for whatever it has never seen.

Byte-pair encoding as in SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226); a tokenizer is its model bytes.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import sentencepiece

from scorelm.untrusted import brief, read_bounded

BOS, EOS, PAD, UNK = 0, 1, 2, 3

_SPECIAL = {"bos": BOS, "eos": EOS, "pad": PAD, "unk": UNK}
_DIGITS = "0123456789"
_BYTES = 256
_LONGEST_LINE = 1 << 30  # bytes; SentencePiece drops longer lines, and takes no larger limit
_LEAST_COVERAGE = 0.98  # SentencePiece takes no smaller one
_ERRORS_ONLY = 2
_MOST_BYTES = 1 << 24  # of a model file: three times the largest in use


class Tokenizer:
    """Text to token ids and back, with ``<s>`` = 0, ``</s>`` = 1, ``<pad>`` = 2, ``<unk>`` = 3.

    Text is not normalised: ``decode(encode(text)) == text``, leading, trailing and repeated spaces and line breaks
    included. The two exceptions are U+2581, SentencePiece's own sign for a space, which comes back as a space, and
    characters outside the vocabulary of a model without byte fallback, which come back as ``⁇``.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        """Wrap a loaded SentencePiece model; use ``train``, ``load`` or ``from_bytes`` instead.

        Raises:
            ValueError: the special ids of the model are not the ones above, or its vocabulary is not UTF-8.
        """
        found = {name: getattr(processor, f"{name}_id")() for name in _SPECIAL}
        if found != _SPECIAL:
            raise ValueError(
                f"its special ids are {_listed(found)} (-1 is absent), but {_listed(_SPECIAL)} are required: "
                "train a new tokenizer with these ids"
            )
        try:
            processor.id_to_piece(list(range(processor.vocab_size())))
            processor.decode(list(range(processor.vocab_size())))
        except UnicodeDecodeError:
            raise ValueError("its vocabulary is not UTF-8") from None
        self._processor = processor

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int, *, byte_fallback: bool = True) -> Tokenizer:
        """Train byte-pair encoding on lines of text, in memory; the same lines give the same tokenizer.

        With ``byte_fallback`` the rarest characters are left to bytes where the alphabet would fill more than half
        of the vocabulary; without it every character gets a token of its own.

        Raises:
            ValueError: no text, or a vocabulary size that the text cannot support (with the nearest that works).
        """
        texts = [line for line in lines if line.strip()]
        reserved = len(_SPECIAL) + len(_DIGITS) + (_BYTES if byte_fallback else 0)
        if not texts:
            raise ValueError("there is no text to train a tokenizer on")
        if vocab_size <= reserved:
            raise ValueError(f"vocabulary size {vocab_size} is too small: {reserved} tokens are reserved")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=byte_fallback,
                character_coverage=_coverage(texts, (vocab_size - reserved) // 2) if byte_fallback else 1.0,
                user_defined_symbols=list(_DIGITS),
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                max_sentence_length=_LONGEST_LINE,
                num_threads=1,
                minloglevel=_ERRORS_ONLY,
                bos_id=BOS,
                eos_id=EOS,
                pad_id=PAD,
                unk_id=UNK,
            )
        except RuntimeError as error:
            raise ValueError(_training_error(vocab_size, str(error))) from None
        return cls.from_bytes(model.getvalue())

    @classmethod
    def from_bytes(cls, proto: bytes) -> Tokenizer:
        """Read a tokenizer from the bytes of a SentencePiece model.

        Raises:
            ValueError: the bytes are not a SentencePiece model, or its special ids are not the required ones.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(proto) and processor.LoadFromSerializedProto(proto)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise ValueError("not a SentencePiece model, or a damaged one")
        return cls(processor)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer from a SentencePiece ``.model`` file.

        Raises:
            ValueError: the file cannot be read, is damaged, or has other special ids; names the file.
        """
        try:
            return cls.from_bytes(read_bounded(Path(path), _MOST_BYTES))
        except OSError as error:
            raise ValueError(f"cannot read tokenizer {path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"cannot use tokenizer {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the SentencePiece model to a file, all of it or nothing."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(self.to_bytes())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def to_bytes(self) -> bytes:
        """Return the bytes of the SentencePiece model, which are the whole tokenizer."""
        proto: bytes = self._processor.serialized_model_proto()
        return proto

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        size: int = self._processor.vocab_size()
        return size

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without ``<s>`` and ``</s>``.

        Raises:
            ValueError: the text has lone surrogates, as an argument in another encoding than UTF-8 has.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"not Unicode text: {brief(text)}") from None
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that stands behind other text: no space is put before its first word.

        A digit stands in for what comes before, since digits are tokens of their own (in a foreign model that
        merges them, the space stays).
        """
        ids = self.encode("0" + text)
        for before in (1, 2):
            if "".join(self.pieces(ids[:before])) in ("0", "▁0"):
                return ids[before:]
        return self.encode(text)

    def encode_document(self, text: str) -> list[int]:
        """Return the token ids of a text between ``<s>`` and ``</s>``."""
        return [BOS, *self.encode(text), EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, skipping ``<s>``, ``</s>`` and ``<pad>``.

        Any sequence of ids is safe: ``<unk>`` reads ``⁇`` and bytes that are not UTF-8 read U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        text: str = self._processor.decode([token for token in self._checked(ids) if token not in (BOS, EOS, PAD)])
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary entry of each id, special ones included; a leading ``▁`` is a space.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return [self._processor.id_to_piece(token) for token in self._checked(ids)]

    def __reduce__(self) -> tuple[Callable[[bytes], Tokenizer], tuple[bytes]]:
        """Pickle as model bytes, so that worker processes and cache fingerprints see those alone."""
        return Tokenizer.from_bytes, (self.to_bytes(),)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return tokens


def _listed(ids: dict[str, int]) -> str:
    return ", ".join(f"{name} {token}" for name, token in ids.items())


def _coverage(texts: list[str], most: int) -> float:
    """Share of the text that its ``most`` commonest characters make up; the others become bytes."""
    counts = Counter(chain.from_iterable(texts))
    if len(counts) <= most:
        return 1.0
    return max(_LEAST_COVERAGE, sum(count for _, count in counts.most_common(most)) / counts.total())


def _training_error(vocab_size: int, message: str) -> str:
    if too_large := re.search(r"<=\s*(\d+)\.?\s*$", message):
        return f"vocabulary size {vocab_size} is too large for this text: the largest that works is {too_large[1]}"
    if too_small := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return f"vocabulary size {vocab_size} is too small for this text: the smallest that works is {too_small[1]}"
    return f"SentencePiece cannot train a vocabulary of {vocab_size} on this text: {message.strip()}"

"""A SentencePiece tokenizer with fixed special ids, a token for each digit, and bytes for what it has never seen.

Byte-pair encoding as in SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226), or a token for each character; a
tokenizer is its model bytes.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from scorelm.errors import InputError, read_bounded
from scorelm.text.tokenizer import Special, check_ids, check_unicode, encode_behind_a_sign, write_whole

_SPECIAL = Special(bos=0, eos=1, pad=2, unk=3)
_DIGITS = "0123456789"
_SPACE_SIGN = "▁"  # how SentencePiece writes a space; in a text it would be taken for one
_RESERVED = {ord(_SPACE_SIGN): " ", 0x2585: " "}  # lines with the latter are left out of training otherwise
_DROPPED = {"\0", "\x1f"}  # SentencePiece learns no token for them
_BYTES = 256
_LONGEST_LINE = 1 << 30  # bytes; SentencePiece drops longer lines, and this is the largest limit it takes
_LEAST_COVERAGE = 0.98  # the smallest that SentencePiece takes
_ERRORS_ONLY = 2
_MOST_BYTES = 1 << 24  # of a model file: three times the largest in use


class SentencePieceTokenizer:
    """A `Tokenizer` whose special ids are ``<s>`` = 0, ``</s>`` = 1, ``<pad>`` = 2 and ``<unk>`` = 3.

    Text is not normalised: ``decode(encode(text)) == text``, leading, trailing and repeated spaces and line breaks
    included. The exceptions are characters outside the vocabulary of a model without byte fallback, which come back as
    ``⁇``, and whatever a model that was trained elsewhere normalises.
    """

    special = _SPECIAL
    """Ids of the special tokens."""
    file_name = "tokenizer.model"
    """What the file is called in a directory."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        """Wrap a loaded SentencePiece model; `train`, `load` and `from_bytes` call this.

        Raises:
            InputError: the model has other special ids, or its vocabulary is not UTF-8.
        """
        found = Special(*(getattr(processor, f"{name}_id")() for name in Special._fields))
        if found != _SPECIAL:
            raise InputError(
                f"its special ids are {_describe(found)} (-1 means none), but {_describe(_SPECIAL)} are required: "
                "train a new tokenizer with these ids"
            )
        try:
            processor.id_to_piece(list(range(processor.vocab_size())))
            processor.decode(list(range(processor.vocab_size())))
        except UnicodeDecodeError:
            raise InputError("its vocabulary is not UTF-8") from None
        self._processor = processor
        spelled = [int(processor.piece_to_id(f"<0x{byte:02X}>")) for byte in _SPACE_SIGN.encode()]
        self._space_sign = [_SPECIAL.unk] if _SPECIAL.unk in spelled else spelled

    @classmethod
    def train(
        cls, lines: Iterable[str], vocab_size: int | Literal["characters"], *, byte_fallback: bool = True
    ) -> SentencePieceTokenizer:
        """Train byte-pair encoding on lines of text, in memory; the same lines give the same tokenizer.

        Args:
            lines: the text; blank lines are skipped.
            vocab_size: number of token ids, special ones, digits and bytes included; ``characters`` makes a token of
                each character of the text but U+0000, U+001F, U+2581 and U+2585 instead, and of nothing else.
            byte_fallback: whether to spell what has no token in bytes, except where tokens are characters. The rarest
                characters are then left to bytes where the alphabet would fill more than half of the vocabulary;
                otherwise every character gets a token.

        Raises:
            InputError: there is no text, it is not Unicode, or it cannot support this vocabulary size (the message
                names the nearest that works).
        """
        texts = [check_unicode(line).translate(_RESERVED) for line in lines if line.strip()]
        if not texts:
            raise InputError("there is no text to train a tokenizer on")
        if vocab_size == "characters":
            texts = ["".join(sorted(set(chain.from_iterable(texts)) - _DROPPED))]
            settings = _characters(texts[0])
        else:
            settings = _pieces(texts, vocab_size, byte_fallback)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,  # an indentation is a token or two, not one a space
                max_sentence_length=_LONGEST_LINE,
                num_threads=1,
                minloglevel=_ERRORS_ONLY,
                **settings,
                **{f"{name}_id": token for name, token in _SPECIAL._asdict().items()},
            )
        except RuntimeError as error:
            raise InputError(_training_error(settings["vocab_size"], str(error))) from None
        return cls.from_bytes(model.getvalue())

    @classmethod
    def from_bytes(cls, proto: bytes) -> SentencePieceTokenizer:
        """Read a tokenizer from the bytes of a SentencePiece model.

        Raises:
            InputError: the bytes are not a SentencePiece model, or its special ids are not the required ones.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(proto) and processor.LoadFromSerializedProto(proto)
        except (RuntimeError, UnicodeDecodeError):  # the latter where its error message quotes damaged bytes
            loaded = False
        if not loaded:
            raise InputError("not a SentencePiece model, or a damaged one")
        return cls(processor)

    @classmethod
    def load(cls, path: str | Path) -> SentencePieceTokenizer:
        """Read a tokenizer from a SentencePiece ``.model`` file.

        Raises:
            InputError: the file cannot be read, is damaged, or has other special ids; names the file.
        """
        try:
            return cls.from_bytes(read_bounded(Path(path), _MOST_BYTES))
        except OSError as error:
            raise InputError(f"cannot read tokenizer {path}: {error.strerror}") from None
        except InputError as error:
            raise InputError(f"cannot use tokenizer {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the SentencePiece model to a file, all of it or nothing.

        Raises:
            InputError: the file cannot be written.
        """
        write_whole(path, self.to_bytes())

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
            InputError: the text has lone surrogates, as a command-line argument that is not UTF-8 has.
        """
        first, *later = check_unicode(text).split(_SPACE_SIGN)
        ids: list[int] = self._processor.encode(first)
        for part in later:
            ids += [*self._space_sign, *self.encode_inside(part)]
        return ids

    def encode_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that follows other text: no space is put before its first word.

        The text is encoded behind a digit, which is then taken off again, since digits are tokens of their own. A
        model trained elsewhere may merge a digit with what follows: then other signs are tried, and if it merges them
        all, the space stays.
        """
        return encode_behind_a_sign(self, text)

    def encode_document(self, text: str) -> list[int]:
        """Return the token ids of a text between ``<s>`` and ``</s>``."""
        return [self.special.bos, *self.encode(text), self.special.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, skipping ``<s>``, ``</s>`` and ``<pad>``.

        Any sequence of ids is safe: ``<unk>`` reads ``⁇`` and bytes that are not UTF-8 read U+FFFD.

        Raises:
            InputError: an id outside the vocabulary.
        """
        silent = (self.special.bos, self.special.eos, self.special.pad)
        text: str = self._processor.decode([token for token in check_ids(ids, self.vocab_size) if token not in silent])
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary entry of each id, special ones included; a leading ``▁`` is a space.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return [self._processor.id_to_piece(token) for token in check_ids(ids, self.vocab_size)]

    def __reduce__(self) -> tuple[Callable[[bytes], SentencePieceTokenizer], tuple[bytes]]:
        """Pickle as model bytes, so that worker processes and cache fingerprints see nothing else."""
        return SentencePieceTokenizer.from_bytes, (self.to_bytes(),)


def _describe(ids: Special) -> str:
    return ", ".join(f"{name} {token}" for name, token in ids._asdict().items())


def _characters(alphabet: str) -> dict[str, Any]:
    """SentencePiece's settings for tokens that are characters."""
    size = len(_SPECIAL) + len(alphabet)
    return {"model_type": "char", "vocab_size": size, "character_coverage": 1.0, "add_dummy_prefix": False}


def _pieces(texts: list[str], vocab_size: int, byte_fallback: bool) -> dict[str, Any]:
    """SentencePiece's settings for byte-pair encoding.

    Raises:
        InputError: a vocabulary that what is reserved fills.
    """
    reserved = len(_SPECIAL) + len(_DIGITS) + (_BYTES if byte_fallback else 0)
    if vocab_size <= reserved:
        raise InputError(
            f"vocabulary size {vocab_size} is too small: {reserved} tokens are reserved for special tokens, digits"
            f"{' and bytes' if byte_fallback else ''}"
        )
    return {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": byte_fallback,
        "character_coverage": _coverage(texts, (vocab_size - reserved) // 2) if byte_fallback else 1.0,
        "user_defined_symbols": list(_DIGITS),
    }


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

"""A tokenizer of Hugging Face's library: a ``tokenizer.json`` of the GPT-2, BERT or Llama family.

That is byte-level byte-pair encoding, WordPiece, or byte-pair encoding or a unigram model over SentencePiece's ``▁``.
What a token adds to a text is found for each token by itself, as bytes, so that all families spell alike.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from scorelm.errors import InputError, brief, read_bounded
from scorelm.text.tokenizer import Special, check_ids, check_unicode, encode_behind_a_sign, write_whole

_NAMES = {
    "bos": ("<s>", "[CLS]", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]"),
    "eos": ("</s>", "[SEP]", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
}
"""What special tokens are called; the first name is that of a token that is added where a file has none."""
_DECODERS = {"ByteLevel", "WordPiece", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_UNKNOWN = " ⁇ "  # as SentencePiece shows it
_MOST_BYTES = 1 << 26  # of a file: twice the largest in use
_MOST_TOKENS = 1 << 20
_MOST_STEPS = 64  # that a file takes a text through
_MOST_GROWTH = 64  # how many times as long they may make it


class HuggingFaceTokenizer:
    """A `Tokenizer` from a ``tokenizer.json``.

    Special tokens are those of the file, and those that it has not come behind its vocabulary. ``<s>`` and ``</s>`` are
    always two, since a text is never continued with the one and always ended by the other; a token that a file uses
    for both, such as ``<|endoftext|>``, ends texts. The name of a special token in a text is text. What the file does
    to a text before it looks tokens up stays as it is: BERT's takes away capitals and accents.
    """

    file_name = "tokenizer.json"
    """What the file is called in a directory."""
    special: Special
    """Ids of the special tokens."""

    def __init__(self, contents: bytes) -> None:
        """Read a tokenizer from the contents of its file, which are the whole tokenizer.

        Raises:
            InputError: they are damaged, or no tokenizer of one of the families.
        """
        self._contents = contents
        file, decoders = _parse(contents)
        with _refusing("not a tokenizer.json, or a damaged one"):
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(file))
            self._inner.encode_special_tokens = True  # so that they are text
            vocabulary = self._inner.get_vocab(with_added_tokens=True)
            added = {token.content for token in self._inner.get_added_tokens_decoder().values()}
        names = sorted(vocabulary, key=lambda name: vocabulary[name])
        if len(names) > _MOST_TOKENS or [vocabulary[name] for name in names] != list(range(len(names))):
            raise InputError(f"its tokens are not numbered from 0 on without gaps, or more than {_MOST_TOKENS:,}")
        with _refusing("it cannot decode its own tokens"):
            self._spelled = _spell(self._inner, names, added, decoders)
        unknown = _unknown(file["model"], vocabulary)
        self.special, self._names = _find_special(names, unknown)
        self._spelled += [b""] * (len(self._names) - len(names))
        self._spelled[self.special.unk] = _UNKNOWN.encode()
        self._instead: dict[int, list[int]] = {}
        self._leads = self._puts_space_first()
        self._instead = self._spell_special(unknown)

    @classmethod
    def load(cls, path: str | Path) -> HuggingFaceTokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            InputError: the file cannot be read, is damaged, or is no tokenizer of one of the families; names the file.
        """
        try:
            return cls(read_bounded(Path(path), _MOST_BYTES))
        except OSError as error:
            raise InputError(f"cannot read tokenizer {path}: {error.strerror}") from None
        except InputError as error:
            raise InputError(f"cannot use tokenizer {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the file that the tokenizer was read from, all of it or nothing.

        Raises:
            InputError: the file cannot be written.
        """
        write_whole(path, self._contents)

    def to_bytes(self) -> bytes:
        """Return the contents of the file, which are the whole tokenizer."""
        return self._contents

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._names)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without ``<s>`` and ``</s>``.

        Raises:
            InputError: the text is not Unicode.
        """
        with _refusing("this tokenizer is damaged, or too slow for this text"):
            ids: list[int] = self._inner.encode(check_unicode(text), add_special_tokens=False).ids
        if self._instead.keys() & ids:
            return [part for token in ids for part in self._instead.get(token, [token])]
        return ids

    def encode_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that follows other text; see `encode_behind_a_sign`."""
        return encode_behind_a_sign(self, text) if self._leads else self.encode(text)

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
        spelled = [self._spelled[token] for token in check_ids(ids, self.vocab_size) if token not in silent]
        text = b"".join(spelled).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._leads else text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return what each id adds to a text, or the name of a special one; see `Tokenizer.pieces`.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return [
            self._names[token] if token in self.special else _show(self._spelled[token])
            for token in check_ids(ids, self.vocab_size)
        ]

    def __reduce__(self) -> tuple[Callable[[bytes], HuggingFaceTokenizer], tuple[bytes]]:
        """Pickle as the contents of the file, so that worker processes and cache fingerprints see nothing else."""
        return HuggingFaceTokenizer, (self._contents,)

    def _puts_space_first(self) -> bool:
        """Whether a text's first word gets a space, which decoding has to take off again."""
        for sign in "a0e1.的":
            ids = self.encode(sign)
            if ids and self.special.unk not in ids:
                return self._spelled[ids[0]].startswith(b" ")
        return False

    def _spell_special(self, unknown: int | None) -> dict[int, list[int]]:
        """What stands for special tokens that a text has come to, since the vocabulary holds their names as text."""
        found = {} if unknown in (None, self.special.unk) else {unknown: [self.special.unk]}
        for token in {*self.special[:3]} - found.keys():
            name = self._names[token]
            found[token] = [*self.encode_inside(name[0]), *self.encode_inside(name[1:])]
        return found


def _parse(contents: bytes) -> tuple[dict[str, Any], set[str]]:
    """A file without what makes or cuts rows and what is drawn at random, and the steps that it decodes by.

    Raises:
        InputError: they are damaged, or of another family.
    """
    try:
        file = dict(json.loads(contents.decode("utf-8")))
        model = dict(file["model"])
        steps = [list(_steps(file.get(part))) for part in ("normalizer", "pre_tokenizer", "decoder")]
        growth = math.prod(max(1, len(str(step.get("content", "")))) for step in steps[0] + steps[2])
        kinds = {str(step["type"]) for step in steps[2]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"not a tokenizer.json, or a damaged one: {brief(repr(error))}") from None
    if growth > _MOST_GROWTH or sum(map(len, steps)) > _MOST_STEPS:
        raise InputError("what it does to a text is too much: many steps, or replacements that make it far longer")
    if not kinds or kinds - _DECODERS:
        raise InputError(
            f"its decoder is {brief(', '.join(sorted(kinds)) or 'none')}, but only tokenizers of the GPT-2, BERT and "
            "Llama families can be used: byte-level BPE, WordPiece, and BPE or unigram models that write spaces as ▁"
        )
    left_out = dict.fromkeys(("truncation", "padding", "post_processor"))
    return file | left_out | {"model": model | {"dropout": None}}, kinds


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of a tokenizer, those of sequences in it one by one."""
    if part is None:
        return
    inner = [part[name] for name in ("normalizers", "pretokenizers", "decoders") if name in part]
    if not inner:
        yield dict(part)
    for step in inner[0] if inner else ():
        yield from _steps(step)


def _spell(inner: tokenizers.Tokenizer, names: list[str], added: set[str], decoders: set[str]) -> list[bytes]:
    """What each token adds to a text, as bytes."""
    if "ByteLevel" in decoders:
        signs = _signs_of_bytes()
        return [
            bytes(signs[sign] for sign in name) if name not in added and signs.keys() >= set(name) else name.encode()
            for name in names
        ]
    decoder = inner.decoder
    assert decoder is not None
    spelled = [decoder.decode(["a", name]).removeprefix("a").encode() for name in names]
    if "ByteFallback" in decoders:
        for token, name in enumerate(names):
            if found := _BYTE.fullmatch(name):
                spelled[token] = bytes.fromhex(found[1])
    return spelled


def _signs_of_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Those that are printable in Latin-1 stand for themselves, and the others are numbered from U+0100 on (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


def _unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """The id that a model gives to what it cannot spell, if it has one."""
    name = model.get("unk_token")
    found = model.get("unk_id", None if name is None else vocabulary.get(str(name)))
    return found if found in vocabulary.values() else None


def _find_special(names: list[str], unknown: int | None) -> tuple[Special, list[str]]:
    """The special tokens of a vocabulary, and the vocabulary with those that it had not."""
    ids, found = {name: token for token, name in enumerate(names)}, dict[str, int]()
    for role, known in _NAMES.items():
        token = next((ids[name] for name in known if name in ids), None)
        if role == "unk" and unknown is not None and unknown not in found.values():
            token = unknown
        if token is None:
            token, names = len(names), [*names, known[0]]
        found[role] = token
    return Special(**found), names


def _show(spelled: bytes) -> str:
    """Text with ``▁`` for spaces, and in hexadecimal what is part of a character, or is ``▁`` itself."""
    shown = spelled.decode("utf-8", errors="surrogateescape").replace("▁", "<0xE2><0x96><0x81>").replace(" ", "▁")
    return "".join(f"<0x{ord(sign) - 0xDC00:02X}>" if 0xDC80 <= ord(sign) <= 0xDCFF else sign for sign in shown)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn what the library raises, a panic among it, into one line."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {brief(' '.join(str(error).split()))}") from None

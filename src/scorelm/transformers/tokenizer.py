"""The tokenizer of a model as transformers knows tokenizers."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from scorelm.config.text import NormalStep
from scorelm.errors import InputError
from scorelm.text.normalization import normalizing
from scorelm.text.tokenizer import FILES, Tokenizer, load_tokenizer


class ScoreLMTokenizer(PreTrainedTokenizer):
    """A tokenizer of scorelm in transformers: the same ids, and the same text of them.

    A text gets ``<s>`` before it, and rows of unequal length are filled up on the left, as generation wants them. The
    name of a special token in a text is text.

    Args:
        vocab_file: the file of a SentencePiece tokenizer.
        tokenizer_file: that of one of Hugging Face's library.
        normalize: what is done to a text first; see `scorelm.text.normalization`.
        **options: as transformers has them.

    Raises:
        InputError: no file, or one that cannot be used.
    """

    vocab_files_names = {"vocab_file": FILES[0], "tokenizer_file": FILES[1]}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        normalize: Sequence[NormalStep] = (),
        **options: Any,
    ) -> None:
        place = vocab_file or tokenizer_file
        if place is None:
            raise InputError(f"there is no {' or '.join(FILES)}")
        self.inner = normalizing(load_tokenizer(Path(place)), normalize)
        self.names = name_tokens(self.inner)
        self.ids = {name: token for token, name in enumerate(self.names)}
        special = {f"{role}_token": self.names[token] for role, token in self.inner.special._asdict().items()}
        own = {"split_special_tokens": True, "special_tokens_pattern": "bos", "normalize": list(normalize)}
        super().__init__(**special | own | options)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.names)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id; two that read alike are told apart by a sign behind the second."""
        return self.ids | self._added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the file that the tokenizer was read from."""
        name = self.inner.file_name
        place = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        self.inner.save(place)
        return (str(place),)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, special ones left out."""
        return self.inner.decode(map(self._convert_token_to_id, tokens))

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self.names[token] for token in self.inner.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.inner.special.unk)

    def _convert_id_to_token(self, index: int) -> str:
        return self.names[index]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> str:
        """The text of ids, with the names of ``<s>``, ``</s>`` and ``<pad>`` or without them."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        special = set(self.inner.special) - {self.inner.special.unk}
        if skip_special_tokens:
            text = self.inner.decode(ids)
        else:
            runs = groupby(ids, special.__contains__)
            text = "".join(
                "".join(map(self._convert_id_to_token, run)) if names else self.inner.decode(run) for names, run in runs
            )
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text


def name_tokens(tokenizer: Tokenizer) -> list[str]:
    """A name for each token, no two the same: what it adds to a text, with ``#`` behind it where that name is taken."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    names, taken = list(pieces), set[str]()
    for token in sorted(range(len(pieces)), key=lambda token: token not in tokenizer.special):
        while names[token] in taken or not names[token]:
            names[token] += "#"
        taken.add(names[token])
    return names

"""``scorelm tokenizer``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from scorelm.cli.printing import tell
from scorelm.cli.verb import Verb
from scorelm.config.text import TextOptions, VocabSize
from scorelm.errors import InputError, exists, writing


class TokenizerVerb(Verb):
    """Options of ``scorelm tokenizer``.

    Writes tokenizer.model, a SentencePiece tokenizer, for scorelm train --tokenizer. Training makes a tokenizer by
    itself where it is given none: make one here if several models are to share it.
    """

    less_memory: ClassVar[str] = "train the tokenizer on less text"

    out: Annotated[Path, arg(aliases=("-mdir",))]
    """Directory to write tokenizer.model to."""
    text: Annotated[TextOptions, arg(name="")] = TextOptions()
    vocab_size: VocabSize = 2048
    """Number of tokens, the special ones included; or characters, for a token for each character of the text and no
    others."""
    byte_fallback: bool = True
    """Spell unknown characters in bytes, so that any text can be written back as it was; not with characters."""
    overwrite: bool = False
    """Replace the tokenizer.model that --out has."""

    def run(self) -> int:
        """Train the tokenizer on all of the text, and write it."""
        from scorelm.text.corpus import load_corpus
        from scorelm.text.sentencepiece import SentencePieceTokenizer
        from scorelm.text.source import Reading

        target = self.out / "tokenizer.model"
        check_place(target, self.overwrite)
        corpus = load_corpus(self.text.source, Reading.of(self.text), holdout=0)
        tell("\n".join(corpus.notes))
        texts = (text for batch in corpus.train.iter(1000) for text in batch["text"])
        tokenizer = SentencePieceTokenizer.train(texts, self.vocab_size, byte_fallback=self.byte_fallback)
        with writing(target):
            self.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(target)
        tell(f"{target}: {tokenizer.vocab_size:,} tokens")
        return 0


def check_place(target: Path, overwrite: bool) -> None:
    """Refuse a place that cannot be written to, or one that is taken, before the text is read.

    Raises:
        InputError: says which.
    """
    if exists(target) and not overwrite:
        raise InputError(f"{target} is there already: add --overwrite to replace it, or choose another --out")
    nearest = next(p for p in target.parents if exists(p))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise InputError(f"cannot write {target}: {nearest} is no directory that can be written to")

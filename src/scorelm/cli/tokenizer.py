"""``scorelm tokenizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import PositiveInt
from tyro.conf import arg

from scorelm.cli.printing import tell
from scorelm.cli.verb import Verb
from scorelm.errors import writing


class TokenizerVerb(Verb):
    """Options of ``scorelm tokenizer``.

    Writes tokenizer.model, a SentencePiece tokenizer, for scorelm train --tokenizer. Training makes a tokenizer by
    itself where it is given none: make one here if several models are to share it.
    """

    less_memory: ClassVar[str] = "train the tokenizer on less text"

    out: Annotated[Path, arg(aliases=("-mdir",))]
    """Directory to write tokenizer.model to."""
    data: Annotated[str, arg(aliases=("-d",))] = "kjv"
    """Text: kjv (embedded), a .txt, .jsonl, .csv or .parquet file, a directory of them, or a Hugging Face name."""
    field: str = "text"
    """Column that holds the text, in files with columns."""
    vocab_size: PositiveInt = 2048
    """Number of tokens, the special ones included."""
    byte_fallback: bool = True
    """Spell unknown characters in bytes, so that any text can be written back as it was."""

    def run(self) -> int:
        """Train the tokenizer on all of the text, and write it."""
        from scorelm.text.corpus import load_corpus
        from scorelm.text.sentencepiece import SentencePieceTokenizer

        target = self.out / "tokenizer.model"
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus(self.data, field=self.field, holdout=0)
        texts = (text for batch in corpus.train.iter(1000) for text in batch["text"])
        tokenizer = SentencePieceTokenizer.train(texts, self.vocab_size, byte_fallback=self.byte_fallback)
        with writing(target):
            tokenizer.save(target)
        tell(f"{target}: {tokenizer.vocab_size:,} tokens")
        return 0

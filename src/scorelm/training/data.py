"""What a run learns from: a corpus, tokenised with its own or a given tokenizer, as packed batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorelm.config.recipe import DataConfig, Recipe
from scorelm.errors import InputError
from scorelm.parallel import ALONE, Ranks
from scorelm.text.corpus import Corpus, length_histogram, load_corpus, tokenise
from scorelm.text.packing import packed_rows
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.text.source import Reading
from scorelm.text.tokenizer import Tokenizer
from scorelm.training.runlog import Say


@dataclass
class Shard:
    """One of the equal streams that a global batch is made of, and which of its rows this rank computes."""

    index: int
    batches: Any
    """Endless iterator of packed batches, with `get_state` and `set_state`."""
    rows: slice
    owned: bool
    """Whether this rank keeps the stream's state: one does for each."""


@dataclass
class TrainingData:
    """Tokenised text, its tokenizer, a fingerprint of both, and one of the text."""

    tokenizer: Tokenizer
    documents: Corpus
    fingerprint: str
    text_fingerprint: str

    def shards(self, recipe: Recipe, ranks: Ranks) -> list[Shard]:
        """The shards of the data that a rank reads.

        A global batch is the rows of all shards one after the other, whichever rank computes them: rank r of w takes
        rows ``r n / w`` to ``(r + 1) n / w`` of n. So a run is the same on any number of ranks, and no two shards share
        a document in an epoch.

        Raises:
            InputError: rows that cannot be shared out.
        """
        data, training, count = recipe.data, recipe.training, recipe.training.shards or 1
        if training.rows % count:
            raise InputError(f"{training.rows} rows a batch cannot be shared out over {count} shards")
        if training.rows < ranks.world:
            raise InputError(f"{training.rows} rows a batch are too few for {ranks.world} ranks")
        own, each, found = ranks.part(training.rows), training.rows // count, []
        for index in range(own.start // each, -(-own.stop // each)):
            packed = packed_rows(
                self.documents.train, max_length=data.max_length, rows=each, seed=training.seed,
                rank=index, world=count, pad=self.tokenizer.special.pad,
            )  # fmt: skip
            start = index * each
            rows = slice(max(own.start - start, 0), min(own.stop - start, each))
            found.append(Shard(index, iter(packed), rows, rows.start == 0))
        return found

    def heldout_batches(self, recipe: Recipe) -> Any:
        """One pass over the held-out text in packed batches; empty where nothing is held out."""
        if not len(self.documents.heldout):
            return iter(())
        packed = packed_rows(
            self.documents.heldout, max_length=recipe.data.max_length, rows=recipe.training.rows,
            seed=0, epochs=1, pad=self.tokenizer.special.pad,
        )  # fmt: skip
        return iter(packed)

    @cached_property
    def _counts(self) -> np.ndarray:
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        for chunk in self.documents.train.data.column("ids").chunks:
            counts += np.bincount(chunk.flatten().to_numpy(), minlength=len(counts))
        return counts

    def token_counts(self) -> Tensor:
        """How often every token occurs in the training documents, [V]."""
        return torch.from_numpy(self._counts)

    def lengths(self, recipe: Recipe) -> list[int]:
        """Histogram of training documents' lengths, [max_length + 1]."""
        counts: list[int] = length_histogram(self.documents.train, recipe.data.max_length).tolist()
        return counts


def prepare(config: DataConfig, out: Path, resume: bool, say: Say, ranks: Ranks = ALONE) -> TrainingData:
    """Load, split and tokenise the text; the tokenizer is kept in the run directory.

    Args:
        config: where the text is.
        out: the run directory, which exists.
        resume: use the tokenizer that the run directory has.
        say: told what takes time.
        ranks: the main one does the work, the others read what it has left in the cache.

    Raises:
        InputError: text or tokenizer that cannot be used.
        DiskError: the tokenizer could not be written.
    """
    kept = out / "tokenizer.model"
    with ranks.main_first():
        given = kept if resume or not ranks.main else config.tokenizer
        tokenizer = None if given is None else SentencePieceTokenizer.load(given)
        say(f"reading {config.source}")
        corpus = load_corpus(config.source, Reading.of(config), holdout=config.holdout)
        say("\n".join(corpus.notes))
        if tokenizer is None:
            say(f"training a tokenizer of {config.vocab_size:,} tokens on {len(corpus.train):,} examples")
            texts = (text for batch in corpus.train.iter(1000) for text in batch["text"])
            tokenizer = SentencePieceTokenizer.train(texts, config.vocab_size, byte_fallback=config.byte_fallback)
        documents = tokenise(corpus, tokenizer, max_length=config.max_length)
        for note in documents.notes:
            say(note)
        if ranks.main and not resume:
            tokenizer.save(kept)
    return TrainingData(tokenizer, documents, documents.fingerprint, corpus.fingerprint)

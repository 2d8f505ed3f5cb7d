"""What a run learns from: a corpus, tokenised with its own or a given tokenizer, as packed batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from scorelm.config.recipe import Recipe
from scorelm.config.text import DataConfig
from scorelm.errors import InputError
from scorelm.parallel import ALONE, Ranks
from scorelm.text.corpus import Corpus, length_histogram, load_corpus, tokenise
from scorelm.text.normalization import in_words, normalize, normalizing
from scorelm.text.packing import packed_rows
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.text.source import Reading
from scorelm.text.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from scorelm.training.runlog import Say

if TYPE_CHECKING:
    from scorelm.text.streaming import Stream

WIDTH_MULTIPLE = 64
"""The width of rows that follows from the documents is a multiple of this."""
COUNTED, CELLS = 2**22, 2**23
"""Most tokens whose neighbours are counted, and most counts for each place beside a token."""


class Ahead:
    """An iterator of batches, the next of which a thread packs meanwhile.

    Its state is that of the batches that were taken, so that a run resumes with the next one.

    Args:
        batches: an iterator with `get_state` and `set_state`.
    """

    def __init__(self, batches: Any) -> None:
        self._batches, self._state = batches, batches.get_state()
        self._thread = ThreadPoolExecutor(1, "packing")
        self._next: Future[tuple[dict[str, np.ndarray], Any]] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch, self._state = (self._next or self._thread.submit(self._pack)).result()
        self._next = self._thread.submit(self._pack)
        return batch

    def _pack(self) -> tuple[dict[str, np.ndarray], Any]:
        return next(self._batches), self._batches.get_state()

    def get_state(self) -> Any:
        """Where to go on after the batches that were taken."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Go on from there."""
        if self._next is not None:
            self._next.exception()
        self._next, self._state = None, state
        self._batches.set_state(state)


@dataclass
class Shard:
    """One of the equal streams that a global batch is made of, and which of its rows this rank computes."""

    index: int
    batches: Ahead
    """Endless packed batches."""
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
    stream: Stream | None = None
    """What is trained on, where that is read meanwhile; the documents are then those of its beginning."""

    def shards(self, recipe: Recipe, ranks: Ranks) -> list[Shard]:
        """The shards of the data that a rank reads.

        A global batch is the rows of all shards one after the other, whichever rank computes them: rank r of w takes
        rows ``r n / w`` to ``(r + 1) n / w`` of n. So a run is the same on any number of ranks, and no two shards share
        a document in an epoch.

        Raises:
            InputError: rows that cannot be shared out.
        """
        training, count = recipe.training, recipe.training.shards or 1
        if training.rows % count:
            raise InputError(f"{training.rows} rows a batch cannot be shared out over {count} shards")
        if training.rows < ranks.world:
            raise InputError(f"{training.rows} rows a batch are too few for {ranks.world} ranks")
        each, width = self.row_shape(recipe, training.rows // count)
        own = ranks.part(each * count)
        indices = range(own.start // each, -(-own.stop // each))
        pack: Callable[..., Any]
        if self.stream is None:
            pack = partial(packed_rows, self.documents.train, pad=self.tokenizer.special.pad)
        else:
            pack = self.stream.packed_rows
        found = []
        for index in indices:
            start = index * each
            rows = slice(max(own.start - start, 0), min(own.stop - start, each))
            packed = pack(max_length=width, rows=each, seed=training.seed, rank=index, world=count)
            found.append(Shard(index, Ahead(iter(packed)), rows, rows.start == 0))
        return found

    def row_shape(self, recipe: Recipe, rows: int) -> tuple[int, int]:
        """How many rows, and how wide, stand for `rows` of ``max_length`` positions.

        Attention costs the square of a row's length, however short the documents in it are. So where the longest
        document takes half of a row or less, rows are as wide as it, in a multiple of 64, and more of them. How long
        the documents of a stream are is not known.
        """
        length, (train, heldout) = recipe.data.max_length, (self.documents.train, self.documents.heldout)
        if self.stream is not None:
            return rows, length
        counts = length_histogram(train, length) + length_histogram(heldout, length)
        width = -(-int(counts.nonzero()[0].max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        return (round(rows * length / width), width) if 2 * width <= length else (rows, length)

    def heldout_batches(self, recipe: Recipe) -> Any:
        """One pass over the held-out text in packed batches; empty where nothing is held out."""
        if not len(self.documents.heldout):
            return iter(())
        rows, width = self.row_shape(recipe, recipe.training.rows)
        packed = packed_rows(
            self.documents.heldout, max_length=width, rows=rows, seed=0, epochs=1, pad=self.tokenizer.special.pad
        )
        return iter(packed)

    @cached_property
    def _counts(self) -> np.ndarray:
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        for chunk in self.documents.train.data.column("ids").chunks:
            counts += np.bincount(chunk.flatten().to_numpy(), minlength=len(counts))
        return counts

    @property
    def tokens(self) -> int:
        """Of all training documents: those of an epoch."""
        return int(self._counts.sum())

    @cached_property
    def heldout_lengths(self) -> np.ndarray:
        """Tokens in every held-out document."""
        return np.array([len(ids) for ids in self.documents.heldout["ids"]], dtype=np.int64)

    def token_counts(self) -> Tensor:
        """How often every token occurs in the training documents, [V]."""
        return torch.from_numpy(self._counts)

    def neighbour_counts(self) -> Tensor:
        """How often a token has each of the C most frequent ones one place after it, before it, and two: [4, V, C].

        Counted are training documents, and of a text of more than `COUNTED` tokens about so many, evenly spread.
        """
        size, share = self.tokenizer.vocab_size, min(1.0, COUNTED / self.tokens)
        frequent = np.argsort(-self._counts, kind="stable")[: max(1, CELLS // size)]
        number = np.full(size, -1)
        number[frequent] = np.arange(len(frequent))
        parts, begins = [], []
        for chunk in self.documents.train.data.column("ids").chunks:
            every, first = chunk.flatten().to_numpy(), chunk.offsets.to_numpy()[:-1]
            parts.append(every[: math.ceil(share * len(every))])
            begins.append(np.isin(np.arange(len(parts[-1])), first - first[:1]))
        ids, document = np.concatenate(parts).astype(np.int64), np.concatenate(begins).cumsum()
        found = []
        for distance in (1, 2):
            inside = document[:-distance] == document[distance:]
            before, after = ids[:-distance][inside], ids[distance:][inside]
            for token, beside in ((before, number[after]), (after, number[before])):
                cells = (token * len(frequent) + beside)[beside >= 0]
                counts = np.bincount(cells, minlength=size * len(frequent))
                found.append(torch.from_numpy(counts.reshape(size, -1)).float())
        return torch.stack(found)

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
    with ranks.main_first():
        given = find_tokenizer(out) if resume or not ranks.main else config.tokenizer
        tokenizer = None if given is None else normalizing(load_tokenizer(given), config.normalize)
        say(f"reading {config.source}")
        corpus = load_corpus(config.source, Reading.of(config), holdout=config.holdout)
        say("\n".join(corpus.notes))
        if config.normalize:
            say(f"texts are read {in_words(config.normalize)}, in training and whenever the model is given one")
        if tokenizer is None:
            size = config.vocab_size
            tokens = size if isinstance(size, str) else f"{size:,} tokens"
            say(f"training a tokenizer of {tokens} on {len(corpus.train):,} examples")
            texts = (normalize(t, config.normalize) for batch in corpus.train.iter(1000) for t in batch["text"])
            made = SentencePieceTokenizer.train(texts, config.vocab_size, byte_fallback=config.byte_fallback)
            tokenizer = normalizing(made, config.normalize)
        documents = tokenise(corpus, tokenizer, max_length=config.max_length)
        for note in documents.notes:
            say(note)
        if ranks.main and not resume:
            tokenizer.save(out / tokenizer.file_name)
        data = TrainingData(tokenizer, documents, documents.fingerprint, corpus.fingerprint)
        if config.streaming:
            from scorelm.text.streaming import open_stream

            data.stream = open_stream(config, tokenizer)
    return data

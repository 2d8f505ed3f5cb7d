"""Which texts ``score`` and ``eval`` measure."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt
from tyro.conf import arg

from scorelm.config import Options
from scorelm.config.recipe import DataConfig
from scorelm.errors import InputError

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM


class Texts(Options):
    """Which texts to measure."""

    data: Annotated[str | None, arg(aliases=("-d",))] = None
    """Text: kjv (embedded), a .txt, .jsonl, .csv or .parquet file, a directory of them, or a Hugging Face name; by
    default what the model was trained on."""
    field: str = "text"
    """Column that holds the text, in files with columns."""
    holdout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Measure only this share of the examples: those that training with the same share holds out. By default 0.02 of
    the text that the model was trained on, and all of any other text, which is what 0 means."""
    limit: PositiveInt | None = None
    """Measure the first N examples only; by default all."""


def trained_on(lm: ScoreLM, which: Texts) -> bool:
    """Whether the texts are those that the model was trained on."""
    return which.data in (None, lm.provenance.data)


def share_held_out(lm: ScoreLM, which: Texts) -> float:
    """The share of the examples that is measured; 0 for all of them."""
    if which.holdout is not None:
        return which.holdout
    return DataConfig().holdout if trained_on(lm, which) else 0.0


def load_texts(lm: ScoreLM, which: Texts) -> tuple[list[str], str]:
    """The texts, and what they are in words.

    Raises:
        InputError: no such text, or none is left.
    """
    from scorelm.text.corpus import load_corpus

    source = which.data or lm.provenance.data
    if not source:
        raise InputError("the model does not say what it was trained on: give --data")
    share = share_held_out(lm, which)
    corpus = load_corpus(source, field=which.field, holdout=share)
    side = corpus.heldout if share else corpus.train
    texts = [example["text"] for example in islice(side, which.limit)]
    kind = "held-out " if share else ""
    if not texts:
        raise InputError(f"{source} has no {kind}text to measure: give another --holdout or --data")
    return texts, f"{len(texts):,} {kind}examples of {source}"


def training_texts(lm: ScoreLM, which: Texts) -> list[str] | None:
    """The text that the model was trained on, where it is what is measured; None elsewhere."""
    from scorelm.text.corpus import load_corpus

    if not trained_on(lm, which):
        return None
    corpus = load_corpus(lm.provenance.data, field=which.field, holdout=share_held_out(lm, which))
    return [example["text"] for example in corpus.train]

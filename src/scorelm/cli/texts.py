"""Which texts ``score`` and ``eval`` measure, and whether the model has seen them: as a fact, or not said."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field, PositiveInt
from tyro.conf import UseAppendAction, arg

from scorelm.config import Options
from scorelm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from scorelm.model.directory import Provenance
    from scorelm.text.corpus import Corpus


class Texts(Options):
    """Which texts to measure."""

    data: Annotated[str | None, arg(aliases=("-d",))] = None
    """Text: kjv (embedded), a file, a directory of files, or the name of a Hugging Face dataset; by default what the
    model was trained on."""
    field: str | None = None
    """Column that holds the text, in files with columns; by default the one that the model was trained on."""
    csv_separator: str | None = None
    """Character between the columns of a .csv file, or tab; by default as in training."""
    split: str | None = None
    """What is one example, as in scorelm train; by default as in training."""
    hub_split: str | None = None
    """Split of a Hugging Face dataset, as in scorelm train; by default that of training, and train of another one."""
    hub_config: str | None = None
    """Configuration of a Hugging Face dataset; by default that of training, and of another one its own default."""
    holdout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Measure this share of the examples only, chosen as in training; 0 is all of them. By default the share that
    training held out, of the text that the model was trained on, and all of any other text."""
    limit: PositiveInt | None = None
    """Measure the first N examples only; by default all."""
    text: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Measure this text instead of a file; give it several times for several texts."""


class Measured(NamedTuple):
    """The texts that are measured, and what is known of them."""

    texts: list[str]
    what: str
    """In words."""
    held_out: bool | None
    """True: training never saw them. False: it saw some or all of them. None: they are another text."""
    training: Dataset | None = None
    """The side of the same text that the model was trained on; None for another text."""


class Found(NamedTuple):
    """A text, and what it is to the model."""

    corpus: Corpus
    name: str
    share: float
    """How much of it is held out in `corpus`."""
    training: Dataset | None = None
    """What the model was trained on, if that is this text."""


def load_texts(made: Provenance, which: Texts) -> Measured:
    """The texts to measure, and whether the model has seen them.

    Args:
        made: how the model came about.
        which: the options.

    Raises:
        InputError: no such text, none is left, or what was not held out is to be called so.
    """
    from scorelm.text.normalization import in_words, normalize

    read = f", read {in_words(made.normalize)}" if made.normalize else ""
    if which.text:
        if others := [name for name, value in which if name != "text" and value is not None]:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in others)
            raise InputError(f"give either --text or {flags}, not both")
        texts = [normalize(text, made.normalize) for text in which.text]
        return Measured(texts, f"{len(texts):,} given text{'s' * (len(texts) != 1)}{read}", None)
    found = find_text(made, which)
    side = found.corpus.heldout if found.share else found.corpus.train
    texts = [normalize(text, made.normalize) for text in side[: which.limit]["text"]]
    if not texts:
        raise InputError(f"{found.name} has no held-out text to measure: give another --holdout or --data")
    part = f"{len(texts):,}" if len(texts) == len(side) else f"the first {len(texts):,}"
    examples = f"example{'s' * (len(texts) != 1)}"
    if found.training is None:
        share = f" (a share of {found.share:g})" if found.share else ""
        known = ", which is not what the model was trained on" if made.fingerprint else ""
        return Measured(texts, f"{part} {examples} of {found.name}{share}{known}{read}", None)
    if found.share:
        what = f"{part} held-out {examples} of {found.name}, none seen in training{read}"
        return Measured(texts, what, True, found.training)
    whole = len(found.training) == len(side)
    seen = "trained on" if whole else f"{len(found.training):,} of all {len(side):,} trained on"
    what = f"{'all ' * part[0].isdigit()}{part} {examples} of {found.name}: {seen}{read}"
    return Measured(texts, what, False, found.training)


def find_text(made: Provenance, which: Texts) -> Found:
    """The text that is asked for; what the model was trained on is known by its fingerprint, wherever it is now."""
    from scorelm.text.corpus import find_corpus, fingerprint_of, load_corpus
    from scorelm.text.source import Reading

    source, held_out = made.data if which.data is None else which.data, made.holdout or 0.0
    trained = Reading(**{one.name: getattr(made, one.name) for one in fields(Reading)})
    given = {name: getattr(which, name) for name in ("field", "split", "csv_separator", "hub_split", "hub_config")}
    start = trained if source == made.data else replace(trained, hub_split=None, hub_config=None, streaming=False)
    reading = replace(start, **{name: value for name, value in given.items() if value is not None})
    if which.data is None and not made.data:
        raise InputError("the model does not say what it was trained on: give --data")
    usual = which.data is None and reading == trained and made.fingerprint
    try:
        fingerprint = fingerprint_of(source, reading)
    except InputError:
        if not usual:
            raise
        fingerprint = ""
    if made.fingerprint and fingerprint == made.fingerprint:
        share = allowed(source, held_out, which.holdout)
        whole = load_corpus(source, reading, holdout=held_out)
        asked = whole if share == held_out else load_corpus(source, reading, holdout=share)
        return Found(asked, source, share, whole.train)
    if not usual:
        share = which.holdout or 0.0
        return Found(load_corpus(source, reading, holdout=share), source, share)
    share = allowed(source, held_out, which.holdout)
    before, kept = (find_corpus(source, made.fingerprint, part) for part in (held_out, share))
    if before is not None and kept is not None:
        return Found(kept, f"{source} (as it was in training)", share, before.train)
    gone = "has changed since" if fingerprint else "is not here"
    raise InputError(f"the model was trained on {source}, which {gone}: give --data")


def allowed(source: str, held_out: float, wanted: float | None) -> float:
    """The share to measure of the text that the model was trained on.

    Raises:
        InputError: more than was held out.
    """
    if wanted is not None and wanted > held_out:
        part = f"a share of {held_out:g}" if held_out else "nothing"
        raise InputError(
            f"{source} is what the model was trained on, and {part} of it was held out: --holdout can't be {wanted:g}"
        )
    return held_out if wanted is None else wanted

"""The verbs that measure a model: ``score``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from scorelm.verbs.generate import DEFAULT_MODEL, Model, open_model

if TYPE_CHECKING:
    from scorelm.model.scorelm import ScoreLM

HOLDOUT = 0.02
"""Share of a text that training holds out unless told otherwise."""


@dataclass(frozen=True)
class Texts:
    """Which texts to measure."""

    data: Annotated[str | None, arg(name="data", aliases=("-d",))] = None
    """Text: kjv, a .txt/.jsonl/.csv/.parquet file, a directory, or a Hugging Face name; by default what the model was
    trained on."""
    field: str = "text"
    """Column that holds the text, in files with columns."""
    holdout: float | None = None
    """Take only this share of the examples, those that training held out; by default 0.02 of the text that the model
    was trained on, and all of any other."""
    limit: int | None = None
    """Take the first so many examples alone."""


@dataclass(frozen=True)
class Score:
    """Price text: nats per token and bits per character, exact or a bound along a path."""

    model: Model = DEFAULT_MODEL
    """Model directory or hub name."""
    texts: Annotated[Texts, arg(name="")] = Texts()
    path: str | None = None
    """uniform (the default), ramp:SLOPE or blocks:SIZE: a bound in the limit of small steps; ordered (left to right),
    reverse or random: exact; with --steps any path that generation has."""
    steps: int | None = None
    """Price the sampler that takes so many evaluations; 64 on the adaptive paths if not given."""
    draws: int = 16
    """Points of the integral, or of a random order, for each text."""
    seed: int = 0
    """Seed of the noise."""
    plot: Path | None = None
    """Draw where along the noise levels the nats are: a .png or .svg file (needs the viz extra)."""
    json: bool = False
    """Print JSON: path, exact, nats_per_token, bits_per_char, stderr_nats_per_token, tokens, nfe, terms."""


def load_texts(lm: ScoreLM, which: Texts) -> tuple[list[str], str]:
    """The texts, and what they are in words.

    Raises:
        ValueError: no such text, or none is left.
    """
    from scorelm.text.corpus import load_corpus

    source = which.data or lm.provenance.data
    if not source:
        raise ValueError("the model does not say what it was trained on: give --data")
    if which.limit is not None and which.limit < 1:
        raise ValueError(f"the limit must be 1 or more, got {which.limit}")
    share = which.holdout if which.holdout is not None else HOLDOUT if source == lm.provenance.data else 0.0
    corpus = load_corpus(source, field=which.field, holdout=share)
    side = corpus.heldout if share else corpus.train
    texts = [example["text"] for example in islice(side, which.limit)]
    if not texts:
        raise ValueError(f"{source} has no {'held-out ' if share else ''}text to measure")
    return texts, f"{len(texts):,} {'held-out ' if share else ''}examples of {source}"


def score(options: Score) -> int:
    """Price and print."""
    from scorelm.evaluation.price import price
    from scorelm.viz.plots import check_plot, plot_integrand
    from scorelm.viz.progress import progress

    lm = open_model(options.model)
    check_plot(options.plot)
    texts, what = load_texts(lm, options.texts)
    with progress(f"pricing {what}") as watch:
        found = price(
            lm, texts, options.path, steps=options.steps, draws=options.draws, seed=options.seed, watch=watch
        )  # fmt: skip
    if options.plot is not None:
        plot_integrand(found, lm.denoiser.embedding.norm, options.plot)
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
        return 0
    kind = "exact" if found.exact else "bound"
    print(
        f"{found.path} ({kind}): {found.nats_per_token:.3f} +- {found.stderr_nats_per_token:.3f} nats/token, "
        f"{found.bits_per_char:.3f} bits/character"
    )
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in found.terms.items()))
    print(f"  {found.tokens:,} tokens, {found.nfe:,.1f} evaluations a text", file=sys.stderr)
    return 0

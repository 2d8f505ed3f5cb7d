"""The verbs that measure a model: ``score`` and ``eval``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from scorelm.config import named
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


@dataclass(frozen=True)
class Eval:
    """Measure a model: likelihoods, judged samples beside real text, quality against effort; one report."""

    model: Model = DEFAULT_MODEL
    """Model directory or hub name."""
    texts: Annotated[Texts, arg(name="")] = Texts()
    judge: str | None = None
    """Model that perplexity and MAUVE are taken under: an autoregressive scorelm model (train one with another seed on
    another share of the text), or any causal language model of Hugging Face transformers, by directory or hub name."""
    n: Annotated[int, named("n", "-n")] = 128
    """Texts in each set."""
    steps: int = 64
    """Most evaluations of the model for a text, where effort is not what varies."""
    seed: int = 0
    """Seed of the samples."""
    report: Path | None = None
    """Write a self-contained page to this .html file, and the figures beside it as .json."""
    json: bool = False
    """Print all figures as JSON."""


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
    from scorelm.training.distributed import launched
    from scorelm.viz.plots import check_plot, plot_integrand
    from scorelm.viz.progress import progress

    lm = open_model(options.model)
    check_plot(options.plot)
    texts, what = load_texts(lm, options.texts)
    with launched() as ranks, progress(f"pricing {what}", ranks.main) as watch:
        found = price(
            lm, texts, options.path, steps=options.steps, draws=options.draws, seed=options.seed, watch=watch,
            ranks=ranks,
        )  # fmt: skip
    if not ranks.main:
        return 0
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


def evaluate(options: Eval) -> int:
    """Measure, write the report and print the tables."""
    from rich.console import Console

    from scorelm.evaluation import report as measured
    from scorelm.evaluation.judge import load_judge
    from scorelm.viz.report import check_report, save_report

    lm = open_model(options.model)
    check_report(options.report)
    judge = load_judge(options.judge) if options.judge is not None else None
    texts, what = load_texts(lm, options.texts)
    training = training_texts(lm, options.texts)
    console = Console(stderr=True)
    console.print(f"{what}; {'no judge' if judge is None else 'judge: ' + judge.name}", highlight=False)
    with console.status("measuring") as status:
        found = measured.evaluate(
            lm, texts, training, judge, n=options.n, steps=options.steps, seed=options.seed, watch=status.update
        )
    if options.report is not None:
        save_report(found, options.report)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for line in found["prices"]:
        steps = f" in {line['steps']} steps" if line["steps"] else ""
        print(
            f"{line['path'] + steps:<24} {line['nats_per_token']:.3f} +- {line['stderr_nats_per_token']:.3f} nats/token"
            f"  {line['bits_per_char']:.3f} bits/character  {'exact' if line['exact'] else 'bound'}"
        )
    shown = ("perplexity", "mauve", "entropy", "distinct_2", "self_bleu", "repetition_4", "copied")
    columns = [name for name in shown if name in found["table"][0]]
    print("\n" + " " * 34 + "".join(f"{name:>13}" for name in columns))
    for line in found["table"]:
        print(f"{line['name']:<34}" + "".join(f"{line[name]:>13.3f}" for name in columns))
    if options.report is not None:
        print(f"\nreport: {options.report}", file=sys.stderr)
    return 0


def training_texts(lm: ScoreLM, which: Texts) -> list[str] | None:
    """The text that the model was trained on, where it is what is measured; None elsewhere."""
    from scorelm.text.corpus import load_corpus

    if which.data not in (None, lm.provenance.data):
        return None
    share = HOLDOUT if which.holdout is None else which.holdout
    corpus = load_corpus(which.data or lm.provenance.data, field=which.field, holdout=share)
    return [example["text"] for example in corpus.train]

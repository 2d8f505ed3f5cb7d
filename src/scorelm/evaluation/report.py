"""Everything that is measured of a model, as one JSON-ready dictionary: prices, samples, quality against effort.

Generated text is judged beside real held-out text and two degenerate generators, which show what each figure misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scorelm.config.generation import Precision
from scorelm.errors import InputError
from scorelm.evaluation.diversity import diversity, mauve
from scorelm.evaluation.judge import Judge, decoded, perplexity, perplexity_interval
from scorelm.evaluation.price import price
from scorelm.lm import ScoreLM
from scorelm.text.templates import draw_length

BATCH = 32
"""Texts that are generated together."""
SHOWN, SHOWN_TEMPERATURE = 8, 0.8
"""Texts of each path that a report shows, and their temperature."""
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Written:
    """Generated texts and what they took."""

    texts: list[str]
    nfe: float
    """Mean evaluations of the model for a text."""
    seconds: float
    """For a text, in batches of `BATCH`."""


def written(lm: ScoreLM, n: int, *, seed: int, **options: Any) -> Written:
    """Generate `n` texts, row i with the seed ``seed + i``; see `ScoreLM.generate` for the options."""
    started, samples = time.perf_counter(), []
    for start in range(0, n, BATCH):
        samples += lm.generate(n=min(BATCH, n - start), seed=seed + start, **options)
    seconds = (time.perf_counter() - started) / n
    nfe = float(np.mean([sample.nfe for sample in samples]))
    return Written([decoded(sample.ids, lm.tokenizer).strip() for sample in samples], nfe, seconds)


def unigram_texts(lm: ScoreLM, training: Sequence[str], n: int, seed: int) -> list[str]:
    """Texts of independent tokens with the training text's frequencies and lengths: varied, and without sense."""
    rng = np.random.default_rng(seed)
    counts = np.zeros(lm.tokenizer.vocab_size)
    for text in training:
        np.add.at(counts, lm.tokenizer.encode(text), 1)
    lengths = [draw_length(lm.lengths, 3, rng) - 2 for _ in range(n)]
    return [lm.tokenizer.decode(rng.choice(len(counts), size=k, p=counts / counts.sum()).tolist()) for k in lengths]


class Examiner:
    """Judges sets of texts by one judge, one set of real text and one training text.

    Args:
        judge: for perplexity and the features of MAUVE; None leaves them out.
        reference: real held-out texts that others are compared with.
        training: what the model was trained on, to find copies of; None leaves them out.
    """

    def __init__(self, judge: Judge | None, reference: Sequence[str], training: Sequence[str] | None) -> None:
        self.judge, self.reference, self.training = judge, reference, training
        self.features = judge.features(reference) if judge is not None else None

    def figures(self, texts: Sequence[str]) -> dict[str, float]:
        """Perplexity with its interval, MAUVE and diversity of a set of texts."""
        found: dict[str, float] = {}
        if self.judge is not None and self.features is not None:
            scores = self.judge.score(texts)
            low, high = perplexity_interval(scores)
            found = {"perplexity": perplexity(scores), "perplexity_low": low, "perplexity_high": high}
            found["mauve"] = mauve(self.judge.features(texts), self.features)
        return found | diversity(texts, self.reference, self.training)

    def point(self, texts: Sequence[str]) -> dict[str, float]:
        """The few figures of a point in a curve."""
        full = self.figures(texts)
        return {k: full[k] for k in ("perplexity", "perplexity_low", "perplexity_high", "entropy") if k in full}


def can_spell(lm: ScoreLM, text: str) -> bool:
    """Whether the model's tokenizer has tokens for all of a text, so that the model could write it."""
    return lm.tokenizer.special.unk not in lm.tokenizer.encode(text)


def prices(lm: ScoreLM, texts: Sequence[str], watch: Callable[[str], object]) -> list[dict[str, Any]]:
    """What the texts cost along the paths and orders that the model knows."""
    found = []
    for path, steps in lm.objective.shown_prices:
        watch(f"price of {path}" + (f" in {steps} steps" if steps else ""))
        found.append(price(lm, texts, path, steps=steps).to_json() | {"steps": steps})
    return found


def table(lm: ScoreLM, examiner: Examiner, real: Sequence[str], n: int, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's text beside real text and the two degenerate generators; `how` it is generated."""
    own = written(lm, n, **how)
    first = examiner.training[0] if examiner.training else real[0]
    sets = {
        f"model ({lm.objective.default_path}, {own.nfe:.0f} evaluations)": own.texts,
        "real text": list(real),
        "unigram sampler": unigram_texts(lm, examiner.training or real, n, how["seed"]),
        "one real line repeated": [first] * n,
    }
    return [{"name": name, "texts": len(texts)} | examiner.figures(texts) for name, texts in sets.items()]


def frontier(lm: ScoreLM, examiner: Examiner, n: int, how: dict[str, Any]) -> list[dict[str, Any]]:
    """Quality against variety over temperature."""
    found = []
    for temperature in TEMPERATURES:
        made = written(lm, n, **how, temperature=temperature)
        found.append({"temperature": temperature} | examiner.point(made.texts))
    return found


def effort(
    lm: ScoreLM, examiner: Examiner, n: int, how: dict[str, Any], watch: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Quality against evaluations, for each path that the model knows."""
    found = []
    for path in lm.objective.shown_paths:
        for steps in lm.objective.shown_budgets:
            watch(f"{path} in {steps} steps")
            made = written(lm, n, **how | {"path": path, "steps": steps})
            cost = {"path": path, "steps": steps, "nfe": made.nfe, "seconds": made.seconds}
            found.append(cost | examiner.point(made.texts))
    return found


def evaluate(
    lm: ScoreLM,
    heldout: Sequence[str],
    training: Sequence[str] | None,
    judge: Judge | None,
    *,
    n: int = 128,
    steps: int = 64,
    seed: int = 0,
    precision: Precision = "auto",
    watch: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        lm: the model.
        heldout: real texts that it was not trained on, at least 4; one half is the reference, the other is judged.
        training: what it was trained on; None where it is not at hand.
        judge: for perplexity and MAUVE; None for neither.
        n: texts in each set, real ones too where there are as many.
        steps: evaluations of the model in the tables and the frontier.
        seed: of the samples.
        precision: of the samples; prices are always computed in float32.
        watch: told what is being measured.

    Texts that the model's tokenizer cannot spell have no price; ``settings["unspelled"]`` counts them.

    Raises:
        InputError: too few texts.
    """
    if len(heldout) < 4 or n < 2:
        raise InputError(f"at least 4 held-out texts and 2 samples are needed, got {len(heldout)} and {n}")
    real, reference = heldout[0::2][:n], heldout[1::2][:n]
    examiner = Examiner(judge, reference, training)
    report: dict[str, Any] = {
        "model": {"objective": lm.objective.name, "parameters": lm.parameters_count, **lm.provenance.model_dump()},
        "judge": judge.name if judge is not None else None,
        "settings": {
            "texts": n,
            "steps": steps,
            "seed": seed,
            "real": len(real),
            "sample_temperature": SHOWN_TEMPERATURE,
            "unspelled": sum(not can_spell(lm, text) for text in heldout),
        },
        "prices": prices(lm, [text for text in heldout if can_spell(lm, text)], watch),
    }
    watch("samples beside real text")
    how: dict[str, Any] = {"seed": seed, "steps": steps, "precision": precision}
    report["table"] = table(lm, examiner, real, n, how)
    watch("temperatures")
    report["frontier"] = frontier(lm, examiner, n, how)
    report["effort"] = effort(lm, examiner, n, how, watch)
    report["samples"] = [
        {"path": path, "texts": written(lm, SHOWN, **how, path=path, temperature=SHOWN_TEMPERATURE).texts}
        for path in lm.objective.sampled_paths
    ]
    return report

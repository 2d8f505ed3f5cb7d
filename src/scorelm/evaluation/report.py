"""Everything that is measured of a model, as one JSON-ready dictionary: prices, samples, quality against effort.

Generated text is judged beside real held-out text and two degenerate generators, which show what each figure misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scorelm.config.generation import Continuation, Precision
from scorelm.errors import InputError
from scorelm.evaluation.diversity import diversity, mauve
from scorelm.evaluation.judge import AutoregressiveJudge, Judge, perplexity, perplexity_interval
from scorelm.evaluation.price import price
from scorelm.lm import ScoreLM
from scorelm.text.templates import draw_length

BATCH = 32
"""Texts that are generated together."""
SHOWN = 8
"""Texts of each path that a report shows."""
USUAL = Continuation()
"""How texts are written whose numbers say no other."""
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
BOUND = 32
"""Evaluations of the model that a price without steps takes for a text, roughly."""


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
    return Written([sample.text for sample in samples], nfe, seconds)


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
        self.judged = self.cut = self.unspelled = 0

    def figures(self, texts: Sequence[str]) -> dict[str, float]:
        """Perplexity with its interval, MAUVE and diversity of a set of texts."""
        found: dict[str, float] = {}
        if self.judge is not None and self.features is not None:
            scores = self.judge.score(texts)
            self.judged, self.cut = self.judged + len(texts), self.cut + scores.cut
            self.unspelled += scores.unspelled
            low, high = perplexity_interval(scores)
            found = {"perplexity": perplexity(scores), "perplexity_low": low, "perplexity_high": high}
            found["mauve"] = mauve(self.judge.features(texts), self.features)
        return found | diversity(texts, self.reference, self.training)

    def point(self, texts: Sequence[str]) -> dict[str, float]:
        """The few figures of a point in a curve."""
        full = self.figures(texts)
        return {k: full[k] for k in ("perplexity", "perplexity_low", "perplexity_high", "entropy") if k in full}

    def notes(self, lm: ScoreLM) -> list[str]:
        """What has to be known of the judge to read its figures, a sentence each."""
        if self.judge is None:
            return []
        found = [kinship(lm, self.judge)]
        if self.cut:
            found.append(
                f"{self.cut} of {self.judged} texts were cut at the judge's context of {self.judge.context} tokens"
            )
        if self.unspelled:
            found.append(
                f"{self.unspelled} of {self.judged} texts have characters that the judge cannot spell, "
                "which make them look too likely"
            )
        return [note for note in found if note]


def kinship(lm: ScoreLM, judge: Judge) -> str | None:
    """What makes a judge of a model's text partial, in words; None where nothing is known to."""
    if not isinstance(judge, AutoregressiveJudge):
        return None
    if lm.objective is judge.lm.objective and same_weights(lm, judge.lm):
        return "the judge is the model itself"
    return "the judge was trained on the same text as the model" if learned_alike(lm, judge.lm) else None


def same_weights(one: ScoreLM, other: ScoreLM) -> bool:
    """Whether two models are one, wherever they were read from."""
    own, others = one.denoiser.state_dict(), other.denoiser.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[name].cpu(), others[name].cpu()) for name in own)


def learned_alike(one: ScoreLM, other: ScoreLM) -> bool:
    """Whether two models say that they were trained on the same text, by its fingerprint or by its name."""
    own, others = one.provenance, other.provenance
    return own.fingerprint == others.fingerprint != "" or own.data == others.data != ""


def can_spell(lm: ScoreLM, text: str) -> bool:
    """Whether the model's tokenizer has tokens for all of a text, so that the model could write it."""
    return lm.tokenizer.special.unk not in lm.tokenizer.encode(text)


class Stages:
    """The stages of an evaluation, one after the other, and how far it is.

    Args:
        total: the work of all stages: evaluations of the model for a text, roughly.
        watch: told the share of the work that is done and what is being measured.
    """

    def __init__(self, total: int, watch: Callable[[float, str], object]) -> None:
        self.total, self.watch = total, watch
        self.done, self.work, self.doing = 0, 0, ""

    @classmethod
    def of(cls, lm: ScoreLM, priced: int, n: int, steps: int, watch: Callable[[float, str], object]) -> Stages:
        """All stages of `evaluate` where so many texts are priced."""
        what = lm.objective
        prices = priced * sum(budget or BOUND for _, budget in what.shown_prices)
        tables = n * ((1 + len(TEMPERATURES)) * steps + len(what.shown_paths) * sum(what.shown_budgets))
        return cls(prices + tables + SHOWN * steps * len(what.sampled_paths), watch)

    def begin(self, doing: str, work: int) -> None:
        """Go on to the next stage."""
        self.done, self.work, self.doing = self.done + self.work, work, doing
        self.tell(0.0)

    def tell(self, share: float) -> None:
        """Say which share of the stage is done."""
        self.watch((self.done + share * self.work) / self.total, self.doing)


def prices(lm: ScoreLM, texts: Sequence[str], stages: Stages) -> list[dict[str, Any]]:
    """What the texts cost along the paths and orders that the model knows."""
    found = []
    for path, steps in lm.objective.shown_prices:
        stages.begin(f"price of {path}" + (f" in {steps} steps" if steps else ""), len(texts) * (steps or BOUND))
        found.append(price(lm, texts, path, steps=steps, watch=stages.tell).to_json() | {"steps": steps})
    return found


def table(lm: ScoreLM, examiner: Examiner, real: Sequence[str], n: int, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's text beside real text and the two degenerate generators; `how` it is generated."""
    own = written(lm, n, **how)
    first = examiner.training[0] if examiner.training else real[0]
    usual = f"temperature {USUAL.temperature:g}, top-p {USUAL.top_p:g}"
    sets = {
        f"model ({lm.objective.default_path}, {usual}, {own.nfe:.0f} evaluations)": own.texts,
        "real text": list(real),
        "unigram sampler": unigram_texts(lm, examiner.training or real, n, how["seed"]),
        "one real line repeated": [first] * n,
    }
    return [{"name": name, "texts": len(texts)} | examiner.figures(texts) for name, texts in sets.items()]


def frontier(lm: ScoreLM, examiner: Examiner, n: int, how: dict[str, Any], stages: Stages) -> list[dict[str, Any]]:
    """Quality against variety over temperature."""
    found = []
    for temperature in TEMPERATURES:
        stages.begin(f"temperature {temperature}", n * how["steps"])
        made = written(lm, n, **how, temperature=temperature, top_p=1)
        found.append({"temperature": temperature} | examiner.point(made.texts))
    return found


def effort(lm: ScoreLM, examiner: Examiner, n: int, how: dict[str, Any], stages: Stages) -> list[dict[str, Any]]:
    """Quality against evaluations, for each path that the model knows."""
    found = []
    for path in lm.objective.shown_paths:
        for steps in lm.objective.shown_budgets:
            stages.begin(f"{path} in {steps} steps", n * steps)
            made = written(lm, n, **how | {"path": path, "steps": steps})
            cost = {"path": path, "steps": steps, "nfe": made.nfe, "seconds": made.seconds}
            found.append(cost | examiner.point(made.texts))
    return found


def samples(lm: ScoreLM, how: dict[str, Any], stages: Stages) -> list[dict[str, Any]]:
    """Texts to be read, of each path that a report shows."""
    found = []
    for path in lm.objective.sampled_paths:
        stages.begin(f"samples of {path}", SHOWN * how["steps"])
        made = written(lm, SHOWN, **how, path=path)
        found.append({"path": path, "texts": made.texts})
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
    watch: Callable[[float, str], object] = lambda share, doing: None,
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
        watch: told the share of the work that is done and what is being measured.

    Texts that the model's tokenizer cannot spell have no price; ``settings["unspelled"]`` counts them. ``notes`` says,
    a sentence each, what has to be known to read the figures.

    Raises:
        InputError: too few texts.
    """
    if len(heldout) < 4 or n < 2:
        raise InputError(f"at least 4 held-out texts and 2 samples are needed, got {len(heldout)} and {n}")
    real, reference = heldout[0::2][:n], heldout[1::2][:n]
    examiner = Examiner(judge, reference, training)
    spelled = [text for text in heldout if can_spell(lm, text)]
    stages = Stages.of(lm, len(spelled), n, steps, watch)
    how: dict[str, Any] = {"seed": seed, "steps": steps, "precision": precision}
    report: dict[str, Any] = {
        "model": {"objective": lm.objective.name, "parameters": lm.parameters_count, **lm.provenance.model_dump()},
        "judge": judge.name if judge is not None else None,
        "settings": {
            "texts": n,
            "steps": steps,
            "seed": seed,
            "real": len(real),
            "sample_temperature": USUAL.temperature,
            "sample_top_p": USUAL.top_p,
            "unspelled": len(heldout) - len(spelled),
        },
        "prices": prices(lm, spelled, stages),
    }
    stages.begin("samples beside real text", n * steps)
    report["table"] = table(lm, examiner, real, n, how)
    report["frontier"] = frontier(lm, examiner, n, how, stages)
    report["effort"] = effort(lm, examiner, n, how, stages)
    report["samples"] = samples(lm, how, stages)
    stages.tell(1.0)
    report["notes"] = examiner.notes(lm) + price_notes(report)
    return report


def price_notes(report: dict[str, Any]) -> list[str]:
    """What has to be known of the held-out texts to read their prices, a sentence each."""
    found, lost = [], report["prices"][0]["unknown_characters"]
    if left_out := report["settings"]["unspelled"]:
        found.append(f"held-out texts without a price, since the model's tokenizer cannot spell them: {left_out}")
    if lost:
        found.append(
            f"no bits per character: {lost} characters of the held-out texts do not come back from the tokenizer"
        )
    return found

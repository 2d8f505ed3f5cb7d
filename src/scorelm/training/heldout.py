"""What held-out text costs while a run goes on: the figures that a run is judged by, and that choose what is kept."""

from __future__ import annotations

import numpy as np

from scorelm.config.recipe import Recipe
from scorelm.errors import InputError
from scorelm.evaluation.price import price, read_path
from scorelm.evaluation.rows import CutTexts
from scorelm.lm import ScoreLM
from scorelm.objectives import OBJECTIVES
from scorelm.training.data import TrainingData
from scorelm.training.progress import Watch, point
from scorelm.training.step import HELDOUT_BATCHES

SHARE = 0.03
"""Most of a run's work, and in a run of minutes of its time, that goes into prices."""
TOKENS = 1_000, 25_000
"""Fewest and most tokens of held-out text that are priced at a time: fewer say nothing, more say little more."""
TIMES = 3, 20, 100
"""How often in a run prices are taken: at least, as long as few tokens would be priced otherwise, and at most."""
STEPS, DRAWS = 16, 2
"""Evaluations of a path that is walked, such as `bounded`, and points of each average over noise levels or orders."""
TRAINING_WORK = 7
"""Forward passes that a token takes in training: two streams, forward and backward, and half of a first pass."""
PATIENT = 3
"""Times in a row without a better price before it is said that there may be none to come."""


def plan(watch: Watch, recipe: Recipe, data: TrainingData, total: float) -> None:
    """Decide how much is priced and how often, so that it takes a small share of the run.

    Where there is little to spend, the same few texts are priced twenty times rather than many of them rarely.

    Args:
        watch: takes the decision.
        recipe: the run.
        data: the text.
        total: tokens that will be trained on.
    """
    least, most = TOKENS
    rarely, often, always = TIMES
    training = recipe.training
    chosen_among = HELDOUT_BATCHES * (len(training.ema) + 1) * training.rows * recipe.data.max_length
    spend = SHARE * total * TRAINING_WORK
    each = sum(work(name) for name in OBJECTIVES[training.objective].watched)
    tokens = min(max(spend / often / each, least), most, int(data.heldout_lengths.sum()))
    times = spend / (tokens * each + chosen_among) if tokens else 0
    watch.times = int(min(times, always)) if times >= rarely else 0
    watch.tokens = int(tokens)


def work(name: str) -> float:
    """Forward passes that the price of a token takes along a path or order."""
    if is_walked(name):
        return 1.5 * STEPS  # generation's own work is half as much again
    return {"ordered": 1, "random": 2 * DRAWS}.get(name, 2 * (DRAWS + 1))


def is_walked(name: str) -> bool:
    """Whether a price takes the steps of generation, rather than being a bound in their limit or that of an order."""
    path = read_path(name)
    return path is not None and path.slope is None


def times_of(watch: Watch, minutes: float | None) -> int:
    """How often prices are taken: in a run of minutes less often than planned where it takes more than its share."""
    planned = watch.times or 0
    if not minutes or not watch.took:
        return planned
    return min(planned, max(TIMES[0], int(SHARE * 60 * minutes / watch.took)))


def choose_rows(data: TrainingData, max_length: int, tokens: int) -> CutTexts:
    """Rows evenly spread over the held-out text, with about so many tokens together; long documents are cut."""
    lengths, special = data.heldout_lengths, data.tokenizer.special
    windows = np.maximum(-(-lengths // max_length), 1)
    first, total = np.cumsum([0, *windows[:-1]]), int(windows.sum())
    count = max(1, min(total, round(total * tokens / max(1, int(lengths.sum())))))
    rows = []
    for window in np.linspace(0, total - 1, count).astype(int):
        document = int(np.searchsorted(first, window, side="right")) - 1
        start = int(window - first[document]) * max_length
        ids = data.documents.heldout[document]["ids"][start : start + max_length]
        rows.append([token for token in ids if token != special.unk])
    return CutTexts(rows, list(range(count)), [0] * count, [0] * count)


def price_heldout(lm: ScoreLM, rows: CutTexts, precision: str) -> dict[str, float]:
    """Nats per token of held-out rows on the paths that are watched, and the largest standard error."""
    found, errors = {}, []
    for path in lm.objective.watched:
        steps = STEPS if is_walked(path) else None
        priced = price(lm, rows, path, precision=precision, steps=steps, draws=DRAWS)
        found[path] = priced.nats_per_token
        errors.append(priced.stderr_nats_per_token)
    return found | {"stderr": max(errors)}


def decide(prices: dict[str, float], recipe: Recipe) -> float:
    """The figure that says which model is kept."""
    objective, select = OBJECTIVES[recipe.training.objective], recipe.training.select
    if select == "mean":
        return sum(prices[path] for path in objective.watched) / len(objective.watched)
    return prices[objective.watched_path if select == "default" else select]


def check_select(recipe: Recipe) -> None:
    """Refuse to choose by a price that such a model has not.

    Raises:
        InputError: it has none.
    """
    training = recipe.training
    watched = OBJECTIVES[training.objective].watched
    if training.select not in ("default", "mean", *watched):
        raise InputError(
            f"--select {training.select}: the {training.objective} objective is priced on {' and '.join(watched)}"
        )


def verdict(watch: Watch, epoch: float | None) -> str:
    """How the run goes, in a line."""
    figures = ", ".join(f"{path} {nats:.3f}" for path, nats in watch.prices.items() if path != "stderr")
    error = f" (±{watch.prices['stderr']:.3f})" if watch.prices["stderr"] else ""  # of one text nobody knows
    line = f"{point(epoch, watch.step)}: held-out nats/token {figures}{error}"
    best = point(watch.best_epoch, watch.best_step)
    if watch.since == 0:
        return f"{line}; the best so far"
    if watch.since < PATIENT:
        return f"{line}; the best was at {best}"
    return f"{line}; best at {best}, worse since: stop, or raise --dropout"

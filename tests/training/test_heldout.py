"""What is priced of held-out text while a run goes on, which model is kept, and when a run ends by itself."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scorelm import ScoreLM, price
from scorelm.config.recipe import Recipe, TrainingConfig
from scorelm.errors import InputError
from scorelm.evaluation.price import ORDERS
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.paths import PATHS
from scorelm.training import heldout, loop, train, trainer
from scorelm.training.data import TrainingData, prepare
from scorelm.training.heldout import check_select, choose_rows, decide, is_walked, plan, times_of, verdict, work
from scorelm.training.loop import can_plan, forecast
from scorelm.training.progress import Cooling, Progress, Watch


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices of a few tokens, so often that tiny runs have them."""
    monkeypatch.setattr(heldout, "TOKENS", (40, 80))
    monkeypatch.setattr(heldout, "TIMES", (3, 5, 8))
    monkeypatch.setattr(heldout, "SHARE", 100.0)


@pytest.fixture(scope="module")
def recipe(tools: Any, text: Path) -> Recipe:
    return tools.recipe(text, {"data": {"holdout": 0.1}, "model": {"layers": 1}}, steps=40, save_every=9, keep=30)


@pytest.fixture(scope="module")
def data(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return prepare(recipe.data, tmp_path_factory.mktemp("data"), False, lambda text: None)


def looks(tools: Any, out: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of held-out prices, in order."""
    return [line["heldout"] for line in tools.log(out) if line["heldout"]]


# --- how much and how often -------------------------------------------------------------------------------------------


def test_paths_without_a_line_are_walked_and_orders_are_not() -> None:
    assert [name for name in (*PATHS, *ORDERS) if not is_walked(name)] == ["uniform", "ramp", "blocks", *ORDERS]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("total", [1e4, 1e6, 1e7, 1e9, 1e11])
def test_prices_take_no_more_than_their_share_of_the_work(objective: str, total: float) -> None:
    class Text:
        heldout_lengths = np.full(500, 40)

    recipe, watch = Recipe(training=TrainingConfig(objective=objective)), Watch()
    plan(watch, recipe, Text(), total)  # type: ignore[arg-type]
    passes = sum(work(path) for path in OBJECTIVES[objective].watched)
    batch = recipe.training.rows * recipe.data.max_length
    each = watch.tokens * passes + heldout.HELDOUT_BATCHES * (len(recipe.training.ema) + 1) * batch
    assert watch.times * each <= 0.03 * total * heldout.TRAINING_WORK
    if total < 1e5:
        assert watch.times == 0
    elif total > 1e10:
        assert (watch.times, watch.tokens) == (100, 20_000)
    else:
        assert 1_000 <= watch.tokens <= 20_000 and 3 <= watch.times <= 100


def test_a_forecast_is_of_the_pace_after_the_first_steps() -> None:
    """Ten minutes, of which compiling took six: 40 tokens a second in the four that are left."""
    config, steps = TrainingConfig(minutes=10), TrainingConfig(steps=100)
    marks = [Progress(step=k, tokens=100 * k - 700, seconds=340 + 2.5 * k) for k in (1, 2, 4, 8, 16)]
    assert can_plan(marks[-1], marks, config)
    assert forecast(marks[-1], marks, config) == pytest.approx(900 + 40 * 220)
    assert forecast(Progress(step=16, tokens=900, seconds=700), marks, config) == 900
    assert not can_plan(Progress(step=9, tokens=9, seconds=200), marks[:4], config)
    slow = [Progress(step=k, tokens=10 * k, seconds=50 * k) for k in (1, 2, 4)]  # twelve steps in all
    assert can_plan(Progress(step=6, tokens=60, seconds=300), slow, config)
    assert forecast(Progress(step=6, tokens=60, seconds=300), slow, config) == pytest.approx(120)
    only = Progress(step=1, tokens=10, seconds=599)
    assert not can_plan(only, [only], config) and can_plan(replace(only, seconds=600), [only], config)
    assert not can_plan(Progress(step=1, tokens=10), [], steps) and can_plan(Progress(step=4, tokens=40), [], steps)
    assert forecast(Progress(step=4, tokens=40), [], steps) == 1000


def test_a_first_step_that_compiles_does_not_keep_a_run_from_being_priced(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes most of this run; what is planned for are the tokens that were trained on in the end."""
    step, planned = trainer.Trainer.step, []

    def slow_at_first(self: trainer.Trainer) -> None:
        time.sleep(2.0 if self.progress.step == 0 else 0.0)
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", slow_at_first)
    monkeypatch.setattr(
        loop, "plan", lambda watch, recipe, data, total: planned.append(total) or plan(watch, recipe, data, total)
    )
    budget = recipe.training.model_copy(update={"steps": None, "minutes": 0.06})
    train(recipe.model_copy(update={"training": budget}), tmp_path / "run")
    tokens = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["tokens"]
    assert len(planned) == 1 and tokens / 3 < planned[0] < 3 * tokens


@pytest.mark.parametrize(
    ("planned", "took", "minutes", "times"),
    [(20, 9.9, 50, 9), (20, 9.9, 500, 20), (20, 0.1, 50, 20), (20, 1e3, 50, 3), (2, 1e3, 50, 2), (0, 1.0, 50, 0),
     (20, 0.0, 50, 20), (20, 9.9, None, 20), (None, 0.0, 50, 0)],
)  # fmt: skip
def test_prices_that_take_long_are_taken_less_often(
    planned: int | None, took: float, minutes: float | None, times: int
) -> None:
    """Nine of ten seconds each are nearly 3% of 50 minutes; there are always three, where as many were planned."""
    assert times_of(Watch(times=planned, took=took), minutes) == times


def test_a_run_of_minutes_takes_the_time_of_its_prices(
    recipe: Recipe, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, taken = trainer.Trainer.look, []

    def slow(self: trainer.Trainer) -> None:
        taken.append(self.progress.watch.took)
        time.sleep(0.3)
        look(self)

    monkeypatch.setattr(trainer.Trainer, "look", slow)
    monkeypatch.setattr(loop, "times_of", lambda watch, minutes: times_of(watch, minutes / 6000))
    budget = recipe.training.model_copy(update={"steps": None, "minutes": 0.06, "patience": None})
    train(recipe.model_copy(update={"training": budget}), tmp_path / "run")
    assert 1 <= len(taken) <= 4  # of the eight that were planned
    assert taken[0] == 0 and all(took >= 0.3 for took in taken[1:])


def test_prices_are_due_at_even_shares_and_at_the_end_also_after_a_longer_budget() -> None:
    progress, config = Progress(watch=Watch(times=4, tokens=10)), TrainingConfig(steps=40)
    due = []
    for step in range(1, 41):
        progress.step = step
        if progress.watch_due(config, 4):
            due.append(step)
            progress.watch.step = step
    assert due == [10, 20, 30, 40]
    longer, due = TrainingConfig(steps=80), []
    for step in range(41, 81):
        progress.step = step
        if progress.watch_due(longer, 4):
            due.append(step)
            progress.watch.step = step
    assert due == [60, 80]
    assert not Progress(step=40, watch=Watch(times=0)).watch_due(config, 0)


def test_the_rows_are_spread_over_the_held_out_text(data: TrainingData) -> None:
    documents = [list(ids) for ids in data.documents.heldout["ids"]]
    windows = [ids[start : start + 6] for ids in documents for start in range(0, len(ids), 6)]
    assert choose_rows(data, 6, 10**6).ids == windows
    tokens = sum(map(len, documents))
    few = choose_rows(data, 32, tokens // 4)
    assert len(few.ids) == pytest.approx(len(documents) / 4, abs=1)
    assert few.ids[0] == documents[0] and few.ids[-1] == documents[-1]
    assert sum(map(len, choose_rows(data, 5, 200).ids)) == pytest.approx(200, rel=0.2)


def test_the_figure_that_decides() -> None:
    prices = {"ordered": 1.0, "random": 2.0, "uniform": 3.0, "bounded": 6.0, "stderr": 9.0}
    for select, expected in (("mean", 3.0), ("default", 6.0), ("random", 2.0)):
        assert decide(prices, Recipe(training=TrainingConfig(select=select))) == expected
    autoregressive = Recipe(training=TrainingConfig(objective="autoregressive", select="default"))
    assert decide({"ordered": 1.5, "stderr": 9.0}, autoregressive) == 1.5
    with pytest.raises(InputError, match="--select ordered: the masked objective is priced on random and bounded"):
        check_select(Recipe(training=TrainingConfig(objective="masked", select="ordered")))


def test_what_is_said_of_a_run() -> None:
    watch, says = Watch(), []
    for epoch, price_now in enumerate([3.0, 2.5, 2.6, 2.7, 2.8], 1):
        watch.note({"ordered": price_now, "stderr": 0.02}, price_now, Progress(step=10 * epoch), float(epoch))
        says.append(verdict(watch, float(epoch)).partition("; ")[2])
    assert says == [
        "the best so far", "the best so far", "the best was at epoch 2.0", "the best was at epoch 2.0",
        "best at epoch 2.0, worse since: stop, or raise --dropout",
    ]  # fmt: skip
    assert verdict(watch, 5.0).startswith("epoch 5.0: held-out nats/token ordered 2.800 (±0.020)")
    assert (watch.best, watch.best_step) == (2.5, 20) and watch.keeps(20) and not watch.keeps(50)
    for odd in (math.nan, math.inf):
        watch, first = Watch(), Watch()
        watch.note({"ordered": 2.0}, 2.0, Progress(step=1), 1.0)
        for one in (watch, first):
            one.note({"ordered": odd}, odd, Progress(step=2), 2.0)
        assert (watch.best, watch.best_step, watch.since, first.best) == (2.0, 1, 1, None)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_best_model_is_kept_with_its_prices_and_resuming_changes_nothing(
    tools: Any, recipe: Recipe, data: TrainingData, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = iter([5.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0] * 2)
    monkeypatch.setattr(trainer, "decide", lambda *_: next(chosen))
    whole = tmp_path / "whole"
    said = tools.train(recipe, whole)
    found = looks(tools, whole)
    assert len(found) == 8 and found[-1]["step"] == 40
    assert sum("held-out nats/token" in line for line in said) == 8
    made = ScoreLM.from_pretrained(whole).provenance
    assert made.steps == found[1]["step"]
    assert {"step": made.steps, **made.prices} == found[1]
    lm, rows = ScoreLM.from_pretrained(whole), choose_rows(data, recipe.data.max_length, 80)
    for path in ("ordered", "random", "uniform"):
        again = price(lm, rows, path, draws=heldout.DRAWS, precision=recipe.training.precision)
        assert again.nats_per_token == pytest.approx(made.prices[path], abs=1e-6)

    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    checkpoints = sorted((resumed / "checkpoints").iterdir())
    later = [path for path in checkpoints if int(path.name.removeprefix("step-")) > found[0]["step"]]
    for path in later:
        shutil.rmtree(path)
    shutil.rmtree(resumed / "model")
    chosen = iter([3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    tools.train(recipe, resumed, resume=True)
    tools.assert_same(whole, resumed)
    assert looks(tools, resumed) == found
    state = json.loads((whole / "checkpoints" / "step-00000040" / "state.json").read_text())
    assert state["watch"]["best_step"] == made.steps
    assert any("is finished" in line for line in tools.train(tools.with_steps(recipe, None), whole, resume=True))

    killed = Path(shutil.copytree(whole, tmp_path / "killed"))  # after the best checkpoint, before its model
    for path in (killed / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > made.steps:
            shutil.rmtree(path)
    shutil.rmtree(killed / "model")
    chosen = iter([4.0] * 6)
    tools.train(recipe, killed, resume=True)
    tools.assert_same(whole, killed)


@pytest.mark.thorough
def test_a_run_that_stops_improving_goes_back_to_its_best_weights_and_ends(
    tools: Any, recipe: Recipe, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = iter([6.0, 5.0, 4.0, 3.0, 4.0, 4.0, 2.5, 2.0])
    monkeypatch.setattr(trainer, "decide", lambda *_: next(chosen))
    training = recipe.training.model_copy(update={"steps": 400, "decay": 0.25, "patience": 2, "keep": 2})
    recipe, out = recipe.model_copy(update={"training": training}), tmp_path / "run"
    said = tools.train(recipe, out)
    steps = [look["step"] for look in looks(tools, out)]
    assert steps[:6] == [50, 100, 150, 200, 250, 300]
    assert steps[6:] == [310, 320]  # 20 steps of cooling, a tenth of the 200 that the best weights took
    assert any("going back to epoch" in line for line in said)
    rates = [line["lr"] for line in tools.log(out) if line["step"] > 300]
    assert rates == pytest.approx([recipe.training.lr * (1 - k / 20) for k in range(20)])
    assert ScoreLM.from_pretrained(out).provenance.steps == 320
    assert tools.checkpoints(out)[-1] == 320

    cooling = Cooling(300, 20, 0.75)
    assert [Progress(step=step, cooling=cooling).share(training) for step in (300, 310, 320)] == [0.75, 0.875, 1.0]
    assert any("is finished" in line for line in tools.train(tools.with_steps(recipe, None), out, resume=True))
    shutil.rmtree(out / "model")  # as after a kill before it was written
    assert tools.train(tools.with_steps(recipe, None), out, resume=True)[-1] and tools.log(out)[-1]["step"] == 320
    assert ScoreLM.from_pretrained(out).provenance.steps == 320
    chosen = iter([1.0] * 9)
    longer = recipe.model_copy(update={"training": training.model_copy(update={"steps": 324})})
    tools.train(longer, out, resume=True)
    assert tools.log(out)[-1]["step"] == 324


@pytest.mark.parametrize(("patience", "said"), [(7, False), (8, True)])
def test_patience_that_cannot_act_is_said(
    tools: Any, recipe: Recipe, tmp_path: Path, often: None, patience: int, said: bool
) -> None:
    training = recipe.training.model_copy(update={"patience": patience})
    lines = tools.train(recipe.model_copy(update={"training": training}), tmp_path / "run")
    assert ("held-out text is priced 8 times, so --patience 8 can't end the run" in lines) == said


def test_cooling_begins_at_the_best_weights(
    tools: Any, recipe: Recipe, data: TrainingData, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, before = iter([3.0, 4.0, 5.0]), dict[int, torch.Tensor]()
    monkeypatch.setattr(trainer, "decide", lambda *_: next(chosen, 6.0))
    step = trainer.Trainer.step

    def watched(run: trainer.Trainer) -> None:
        before[run.progress.step] = run.learner.denoiser.prior.detach().clone()
        step(run)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    training = recipe.training.model_copy(update={"patience": 1, "keep": 1})
    train(recipe.model_copy(update={"training": training}), tmp_path / "run", say=lambda text: None)
    assert list(before)[-1] == 10  # the best at 5, worse at 10, and one step of cooling from there
    assert torch.equal(before[10], before[5]) and not torch.equal(before[9], before[5])

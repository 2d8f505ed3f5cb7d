"""Run directories: one run at a time, nothing removed that is not its own, nothing left where nothing was trained."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scorelm import ScoreLM
from scorelm.config.recipe import KEPT, Recipe, TrainingConfig, kept_on_resume
from scorelm.config.toml import load_recipe
from scorelm.errors import InputError
from scorelm.training import train
from scorelm.training.checkpoint import list_checkpoints, write_model
from scorelm.training.run_directory import hold
from scorelm.training.runlog import RunLog
from scorelm.training.trainer import Trainer


class Broken(Exception):
    """What ends a run in the middle of a step."""


@pytest.fixture(scope="module")
def recipe(tools: Any, text: Path) -> Recipe:
    return tools.recipe(text, {"model": {"layers": 1}}, steps=6, save_every=2, samples=2, ema=[0.5])


@pytest.fixture(scope="module")
def finished(tools: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    tools.train(recipe, out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run that has come to its end."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def break_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let this many more steps be made, by any run."""
    real = Trainer.step

    def arm(steps: int) -> None:
        left = [steps]

        def step(trainer: Trainer) -> None:
            if left[0] == 0:
                raise Broken
            left[0] -= 1
            real(trainer)

        monkeypatch.setattr(Trainer, "step", step)

    return arm


def contents(out: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with what it holds and when that was written."""
    return {str(p.relative_to(out)): (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}


def changed(recipe: Recipe, **training: Any) -> Recipe:
    """The recipe without an end of its own, and with other options of training."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": None} | training)})


MINE = ("notes.txt", "model/notes.txt", "checkpoints/notes.txt", "checkpoints/step-00000006/notes.txt",
        "checkpoints/step-00000004-copy/state.json", "tensorboard/notes.txt")  # fmt: skip


def put_own_files(out: Path) -> None:
    for name in MINE:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")


def assert_own_files_are_there(out: Path) -> None:
    assert [name for name in MINE if not (out / name).is_file() or (out / name).read_text() != "mine"] == []


# What is there stays


def test_a_run_is_replaced_only_if_told_and_what_is_not_its_own_stays(tools: Any, recipe: Recipe, out: Path) -> None:
    put_own_files(out)
    before = contents(out)
    with pytest.raises(InputError, match=r"already holds a run: go on .*--resume, add --overwrite"):
        train(recipe, out)
    assert contents(out) == before
    said = tools.train(tools.with_steps(recipe, 2), out, overwrite=True)
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000002"] and len(tools.log(out)) == 2
    assert (out / "samples.txt").read_text().count("step ") == 2
    assert_own_files_are_there(out)
    assert any("what is not its own stays: checkpoints/notes.txt" in line and "1 more" in line for line in said)


def test_a_replacement_that_fails_loses_nothing(
    tools: Any, recipe: Recipe, out: Path, break_after: Callable[[int], None]
) -> None:
    before = contents(out)
    with pytest.raises(InputError, match="shards"):
        train(changed(recipe, shards=3), out, overwrite=True, say=lambda text: None)
    break_after(0)
    with pytest.raises(Broken):
        train(recipe, out, overwrite=True, say=lambda text: None)
    assert contents(out) == before


def test_files_of_a_run_without_a_checkpoint_are_not_replaced_either(
    tools: Any, recipe: Recipe, tmp_path: Path, finished: Path
) -> None:
    (tmp_path / "recipe.toml").write_text("# mine\n")
    with pytest.raises(InputError, match=r"holds files that a run writes \(recipe.toml\).*--overwrite"):
        train(recipe, tmp_path)
    assert (tmp_path / "recipe.toml").read_text() == "# mine\n"
    (tmp_path / "recipe.toml").rename(tmp_path / "model")
    with pytest.raises(InputError, match=r"cannot write .*model: not a directory"):
        train(recipe, tmp_path)


def test_a_tokenizer_that_is_given_may_be_the_run_s_own(
    tools: Any, recipe: Recipe, tmp_path: Path, finished: Path
) -> None:
    own = Path(shutil.copy(finished / "tokenizer.model", tmp_path / "tokenizer.model"))
    with pytest.raises(InputError, match=r"files that a run writes \(tokenizer.model\)"):
        train(recipe, tmp_path)
    data = recipe.data.model_copy(update={"tokenizer": own})
    tools.train(tools.with_steps(recipe.model_copy(update={"data": data}), 1), tmp_path)
    assert own.read_bytes() == (finished / "tokenizer.model").read_bytes()


def test_training_on_keeps_files_of_the_user(tools: Any, recipe: Recipe, out: Path) -> None:
    """In the model, which is written anew, and in a checkpoint, which is then kept."""
    put_own_files(out)
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000004", "step-00000006"]
    tools.train(tools.with_steps(recipe, 12), out, resume=True)
    assert_own_files_are_there(out)
    kept = [p.name for p in list_checkpoints(out / "checkpoints")]
    assert kept == ["step-00000006", "step-00000010", "step-00000012"]
    assert ScoreLM.from_pretrained(out).provenance.steps == 12


def test_a_model_whose_replacement_was_killed_keeps_files_of_the_user(make_lm: Any, tmp_path: Path) -> None:
    lm, model, old = make_lm(), tmp_path / "model", tmp_path / ".model-old"
    for killed_before in ("the new one is there", "the old one is removed"):
        write_model(lm, model)
        (model / "notes.txt").write_text(killed_before)
        (model / "config.json").write_text("of the old one")
        model.rename(old)
        if killed_before == "the old one is removed":
            lm.save_pretrained(model)
        write_model(lm, model)
        assert (model / "notes.txt").read_text() == killed_before and not old.exists()
        assert "of the old one" not in (model / "config.json").read_text()


def test_only_later_lines_and_a_torn_one_are_dropped_from_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"note": "warmer"}\nseen\n{"step": 3}\n{"step": 2}\n{"step": 2, "lo')
    with RunLog(tmp_path, 2, Recipe(), say=print) as log:
        log.open()
    assert path.read_text() == '{"step": 1}\n{"note": "warmer"}\nseen\n{"step": 2}\n'


# One run at a time


def test_a_second_run_is_refused_and_says_who_holds_the_directory(tools: Any, recipe: Recipe, out: Path) -> None:
    with hold(out, print):
        before = contents(out)
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=rf"^{out} is in use: process {os.getpid()} on ") as refused:
                train(recipe, out, **how)
            assert "\n" not in str(refused.value) and contents(out) == before
    (out / ".lock").write_text("process 1 on mars")  # as a kill leaves it
    tools.train(tools.with_steps(recipe, 7), out, resume=True)
    assert not (out / ".lock").exists()


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with hold(tmp_path / "run", said.append):
        assert said == [
            f"nothing keeps a second run out of {tmp_path / 'run'}, whose file system has no locks: "
            "Function not implemented"
        ]


def test_where_nothing_was_trained_nothing_is_left(
    tools: Any, recipe: Recipe, tmp_path: Path, break_after: Callable[[int], None]
) -> None:
    (tmp_path / "there").mkdir()
    break_after(0)
    for out in (tmp_path / "a" / "b" / "c", tmp_path / "there" / "run", tmp_path / "there"):
        with pytest.raises(Broken):
            train(recipe, out, say=lambda text: None)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


# Going on


def test_resuming_a_finished_run_changes_nothing_and_says_what_to_add(tools: Any, recipe: Recipe, out: Path) -> None:
    before = contents(out)
    said = tools.train(changed(recipe, lr=1e-4), out, resume=True)
    assert contents(out) == before
    assert said == [
        f"the run in {out} is finished, after 6 steps: nothing is changed. To train on, add --minutes 10 (that many "
        "more) or --steps 12 (in all)"
    ]


def test_every_option_of_training_is_kept_or_can_change(recipe: Recipe) -> None:
    assert set(KEPT) < set(TrainingConfig.model_fields)
    for name in TrainingConfig.model_fields:
        other = recipe.model_copy(update={"training": recipe.training.model_copy(update={name: "other"})})
        assert kept_on_resume(recipe, other) == ([f"--{name.replace('_', '-')}"] if name in KEPT else []), name


def test_given_options_are_recorded_once_a_step_was_made_with_them(
    recipe: Recipe, out: Path, break_after: Callable[[int], None]
) -> None:
    before = contents(out)
    given = changed(recipe, steps=20, lr=0.5)
    for steps, recorded in ((0, (6, recipe.training.lr)), (1, (20, 0.5))):
        break_after(steps)
        with pytest.raises(Broken):
            train(given, out, resume=True, say=lambda text: None)
        found = load_recipe(str(out / "recipe.toml")).training
        assert (found.steps, found.lr) == recorded
        assert steps or contents(out) == before


@pytest.mark.thorough
def test_minutes_are_added_to_those_of_the_run_and_steps_are_of_the_whole_run(
    tools: Any, recipe: Recipe, out: Path
) -> None:
    seconds = tools.log(out)[-1]["seconds"]
    tools.train(changed(recipe, minutes=0.001), out, resume=True)
    found = load_recipe(str(out / "recipe.toml")).training
    assert found.steps is None and found.minutes == pytest.approx(seconds / 60 + 0.001)
    last = tools.log(out)[-1]
    assert last["seconds"] >= seconds + 0.06 and last["step"] > 6
    tools.train(changed(recipe, steps=last["step"] + 2), out, resume=True)
    assert tools.log(out)[-1]["step"] == last["step"] + 2


@pytest.mark.thorough
def test_processes_that_torchrun_starts_again_do_not_add_the_minutes_again(
    tools: Any, recipe: Recipe, out: Path, break_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(count: int, steps: int, **how: Any) -> float | None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        break_after(steps)
        with pytest.raises(Broken):
            train(changed(recipe, minutes=5), out, resume=True, say=lambda text: None)
        return load_recipe(str(out / "recipe.toml")).training.minutes

    end = tools.log(out)[-1]["seconds"] / 60 + 5
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert start(0, 0) is None
    assert start(1, 3) == pytest.approx(end, rel=1e-9)  # the first one had not come to train
    assert tools.checkpoints(out)[-1] == 8
    assert start(2, 0) == start(3, 3) == pytest.approx(end, rel=1e-9)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert start(0, 1) > end + 1e-5
    assert start(1, 1) > end + 1e-5


def test_a_launch_that_was_refused_does_not_go_on_with_the_run_when_it_is_started_again(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with pytest.raises(InputError, match="already holds a run"):
            train(recipe, out)


@pytest.mark.thorough
def test_a_launch_begins_anew_where_it_has_no_checkpoint_yet(
    tools: Any, recipe: Recipe, finished: Path, tmp_path: Path, break_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    break_after(1)
    with pytest.raises(Broken):
        train(recipe, out, say=lambda text: None)
    assert not list_checkpoints(out / "checkpoints") and (out / "recipe.toml").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    break_after(-1)
    tools.train(recipe, out)
    tools.assert_same(out, finished)
    assert not (out / ".lock").exists()


# Files


@pytest.mark.thorough
def test_checkpoints_come_by_time_too_and_change_nothing(
    tools: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which a step takes 20 seconds: the first after half a minute, then every two."""
    passed, step, clock = [0], Trainer.step, time.perf_counter

    def slow_step(trainer: Trainer) -> None:
        step(trainer)
        passed[0] += 20

    monkeypatch.setattr(Trainer, "step", slow_step)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    by_time, by_steps = (changed(recipe, steps=16, keep=9, save_every=n) for n in (100, 8))
    tools.train(by_time, tmp_path / "time")
    assert tools.checkpoints(tmp_path / "time") == [2, 8, 14, 16]
    assert TrainingConfig().save_minutes == 2
    tools.train(changed(by_steps, steps=16, save_minutes=1e9), tmp_path / "steps")
    assert tools.checkpoints(tmp_path / "steps") == [2, 8, 16]
    tools.assert_same(tmp_path / "time", tmp_path / "steps")


def test_files_have_the_rights_that_the_umask_leaves(tools: Any, recipe: Recipe, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tools.train(changed(recipe, steps=2, track=("tensorboard",)), tmp_path / "run")
    finally:
        os.umask(before)
    found = {p: p.stat().st_mode & 0o777 for p in [tmp_path / "run", *(tmp_path / "run").rglob("*")]}
    assert [path for path, mode in found.items() if mode != (0o750 if path.is_dir() else 0o640)] == []
    assert {"model.safetensors", "tokenizer.model", "metrics.jsonl", ".metadata"} <= {path.name for path in found}

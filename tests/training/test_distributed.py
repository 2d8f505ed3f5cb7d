"""Training over ranks, in real processes with gloo: the same run on any number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scorelm.config.recipe import Recipe
from scorelm.config.toml import to_toml
from scorelm.errors import InputError
from scorelm.parallel import Ranks
from scorelm.text.packing import packed_rows
from scorelm.training.data import TrainingData, prepare
from scorelm.training.run import with_shards
from scorelm.training.run_directory import hold

pytestmark = pytest.mark.thorough  # processes

slow, thorough = pytest.mark.slow, pytest.mark.thorough
OPTIONS = {
    "rows": 8, "steps": 6, "save_every": 4, "keep": 9, "accumulation": 2, "shards": 2, "precision": "float32",
}  # fmt: skip


class World:
    """One recipe on different numbers of ranks, each run made when it is first asked for."""

    def __init__(self, make_runs: Callable[..., Any], directory: Path) -> None:
        self.make_runs, self.directory = make_runs, directory

    def run(self, out: Path, ranks: int, *flags: str, **training: Any) -> Path:
        """A run on so many ranks, or the rest of one."""
        code, errors = self.make_runs(**OPTIONS | training)(out, *flags, world=ranks)
        assert code == 0 and "Warning" not in errors, errors
        return out

    def whole(self, ranks: int, parallel: str = "ddp") -> Path:
        """A run that nothing disturbs."""
        out = self.directory / f"{parallel}-{ranks}"
        return out if out.exists() else self.run(out, ranks, parallel=parallel)


@pytest.fixture(scope="module")
def world(make_runs: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(make_runs, tmp_path_factory.mktemp("world"))


def assert_close(tools: Any, one: Path, other: Path) -> None:
    """Equal to rounding: gradients are summed in another order."""
    assert tools.losses(other) == pytest.approx(tools.losses(one), rel=1e-5)
    ours, theirs = tools.weights(one), tools.weights(other)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, "ddp"), pytest.param(2, "fsdp", marks=thorough), pytest.param(4, "ddp", marks=slow)]
)
def test_a_run_is_the_same_on_any_number_of_ranks(tools: Any, world: World, ranks: int, parallel: str) -> None:
    """Held-out losses and the schedule's fit as well."""
    one, other = world.whole(1), world.whole(ranks, parallel)
    assert_close(tools, one, other)
    for key in ("tokens", "packing_efficiency", "accuracy", "parameter_norm", "embedding_anisotropy"):
        assert tools.log(other)[-1][key] == pytest.approx(tools.log(one)[-1][key], rel=1e-3, abs=1e-4)
    found = [json.loads((out / "model" / "config.json").read_text()) for out in (one, other)]
    assert found[0]["lengths"] == found[1]["lengths"]
    assert found[1]["schedule"]["mu"] == pytest.approx(found[0]["schedule"]["mu"], rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fixed_places_on_two_ranks_are_exact_ones_on_one(
    tools: Any, world: World, tmp_path: Path, parallel: str
) -> None:
    assert_close(tools, world.whole(1), world.run(tmp_path / "run", 2, places="fixed", parallel=parallel))


def interrupted(run: Path, out: Path) -> Path:
    """A run as it was after its first checkpoint."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    first, *later = sorted((out / "checkpoints").iterdir())
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    assert first.name == "step-00000004"
    return out


@thorough
@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [("ddp", 2), ("fsdp", 2), ("fsdp", 3), pytest.param("ddp", 1, marks=slow), pytest.param("ddp", 3, marks=slow)],
)
def test_a_run_goes_on_with_other_ranks(tools: Any, world: World, tmp_path: Path, parallel: str, ranks: int) -> None:
    """From a checkpoint of two ranks, on two bit for bit, and on another number to rounding."""
    whole = world.whole(2, parallel)
    out = world.run(interrupted(whole, tmp_path / "run"), ranks)
    (tools.assert_same if ranks == 2 else lambda one, other: assert_close(tools, one, other))(out, whole)


@thorough
@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=slow)])
def test_checkpoints_written_meanwhile_are_the_same(tools: Any, world: World, tmp_path: Path, parallel: str) -> None:
    """Two ranks write their first checkpoint in threads, and the run goes on from it bit for bit."""
    whole = world.whole(2, parallel)
    run = world.run(tmp_path / "run", 2, async_save=True, parallel=parallel)
    assert tools.losses(run) == tools.losses(whole)
    out = world.run(interrupted(run, tmp_path / "interrupted"), 2)
    tools.assert_same(out, whole)


@thorough
def test_a_sharded_checkpoint_goes_on_as_copies(tools: Any, world: World, tmp_path: Path) -> None:
    out = world.run(interrupted(world.whole(2, "fsdp"), tmp_path / "run"), 1, "--parallel", "ddp")
    assert tools.losses(out) == pytest.approx(tools.losses(world.whole(1)), rel=1e-5)


@thorough
@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=slow)])
def test_muon_is_the_same_on_two_ranks_and_goes_on_bit_for_bit(
    tools: Any, world: World, tmp_path: Path, parallel: str
) -> None:
    """To the rounding of its bfloat16 iterations, which see whole matrices even where a rank holds half of each."""
    one = world.run(tmp_path / "one", 1, optimizer="muon")
    two = world.run(tmp_path / "two", 2, optimizer="muon", parallel=parallel)
    assert tools.losses(two) == pytest.approx(tools.losses(one), rel=1e-3)
    tools.assert_same(world.run(interrupted(two, tmp_path / "again"), 2), two)


@pytest.fixture(scope="module")
def data(tools: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return prepare(tools.recipe(text).data, tmp_path_factory.mktemp("data"), False, lambda text: None)


@pytest.fixture
def recipe(tools: Any, text: Path) -> Callable[[int], Recipe]:
    return lambda shards: tools.recipe(text, rows=8, shards=shards)


def test_too_many_ranks_or_shards_are_refused(data: TrainingData, recipe: Callable[[int], Recipe]) -> None:
    for shards, world, says in ((3, 1, "3 shards"), (1, 9, "9 ranks")):
        with pytest.raises(InputError, match=says):
            data.shards(recipe(shards), Ranks(0, world))


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_ranks_take_every_row_of_the_global_batch_once(
    data: TrainingData, recipe: Callable[[int], Recipe], shards: int
) -> None:
    whole = None
    for world in (1, 2, 3, 4, 5, 8):
        parts, owned = [], []
        for rank in range(world):
            for shard in data.shards(recipe(shards), Ranks(rank, world)):
                parts.append(next(shard.batches)["ids"][shard.rows])
                owned += [shard.index] * shard.owned
        rows = np.concatenate(parts)
        assert sorted(owned) == list(range(shards))
        whole = rows if whole is None else whole
        assert np.array_equal(rows, whole)


def test_an_epoch_gives_every_document_to_one_shard(data: TrainingData) -> None:
    """The first documents of each shard, as many as it has in an epoch, are all documents once."""
    documents, limit, found = [tuple(ids) for ids in data.documents.train["ids"]], 24, []
    for rank in range(4):
        rows = packed_rows(
            data.documents.train, max_length=limit, rows=2, seed=0, rank=rank, world=4, epochs=1,
            pad=data.tokenizer.special.pad,
        )  # fmt: skip
        for batch in rows:
            for ids, segment in zip(batch["ids"], batch["segment"], strict=True):
                found += [tuple(ids[segment == k].tolist()) for k in range(1, segment.max() + 1)]
    short = sorted(d for d in documents if len(d) <= limit)
    assert 0 < len(short) < len(documents)
    assert sorted(f for f in found if f in set(short)) == short
    assert len(found) == sum(-(-len(d) // limit) for d in documents)
    assert Counter(chain.from_iterable(found)) == Counter(chain.from_iterable(documents))


@thorough
def test_samples_and_prices_are_shared_out_over_ranks(forks: Any, world: World) -> None:
    """Rows have their own seeds, so that two ranks print what one does."""
    model = str(world.whole(1) / "model")
    for verb in (["sample", model, "-n", "5", "--steps", "6", "--best-of", "2", "--json"], ["score", model, "--json"]):
        one, two = (json.loads(forks.output(*verb, world=ranks)) for ranks in (1, 2))
        if verb[0] == "sample":
            assert two == one and len(one) == 5
        else:
            assert two["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-6)
            assert {k: two[k] for k in ("tokens", "nfe", "exact")} == {k: one[k] for k in ("tokens", "nfe", "exact")}


@thorough
def test_ranks_that_are_started_again_go_on_from_the_last_checkpoint(
    tools: Any, forks: Any, world: World, tmp_path: Path
) -> None:
    """As torchrun does it after a rank has died: with the same words, and in its environment the number of starts."""
    out, runs = tmp_path / "run", world.make_runs(**OPTIONS)
    words, launch = runs.words(out), {"TORCHELASTIC_RUN_ID": "one"}
    assert forks(*words, world=2, environment=launch, kill_after=(6, 0.0))[0] == -signal.SIGKILL
    assert tools.checkpoints(out) == [4]
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    code, errors = forks(*words, world=2, environment=launch | again)
    assert code == 0, errors
    tools.assert_same(out, world.whole(2))
    code, errors = forks(*words, world=2, environment=again | {"TORCHELASTIC_RUN_ID": "another"})
    assert code == 2 and "already holds a run" in errors


@thorough
def test_ranks_refuse_a_run_that_another_process_holds(tools: Any, forks: Any, world: World, tmp_path: Path) -> None:
    with hold(tmp_path / "run", print):
        code, errors = forks(*world.make_runs(**OPTIONS).words(tmp_path / "run"), world=2)
    assert code == 2 and f"process {os.getpid()} on " in errors and "Traceback" not in errors


@thorough
def test_ranks_save_at_the_same_time(tools: Any, world: World, tmp_path: Path) -> None:
    """By the clock of the main rank, here after every step, which changes nothing else."""
    out = world.run(tmp_path / "run", 2, save_minutes=1e-9)
    assert tools.checkpoints(out) == [1, 2, 3, 4, 5, 6]
    tools.assert_same(out, world.whole(2))


@slow
def test_a_rank_that_is_killed_is_started_again_by_torchrun(
    tools: Any, text: Path, world: World, tmp_path: Path
) -> None:
    """The run ends as if nothing had happened."""
    out, recipe = tmp_path / "run", tmp_path / "recipe.toml"
    recipe.write_text(to_toml(tools.recipe(text, **OPTIONS)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "scorelm", "train", "--recipe", str(recipe), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen([*launcher, "--max-restarts", "1", *words], env=environment, stderr=subprocess.PIPE)
    for _ in range(1200):
        if any((out / "checkpoints").glob("step-*")):
            break
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    tools.assert_same(out, world.whole(2))


@pytest.mark.parametrize(
    ("rows", "world", "given", "shards"), [(64, 1, None, 1), (64, 3, None, 1), (64, 4, None, 4), (64, 4, 2, 2)]
)
def test_there_is_a_shard_for_each_rank_if_they_share_rows_evenly(
    recipe: Any, rows: int, world: int, given: int | None, shards: int
) -> None:
    training = recipe(1).training.model_copy(update={"rows": rows, "shards": given})
    assert with_shards(recipe(1).model_copy(update={"training": training}), world).training.shards == shards

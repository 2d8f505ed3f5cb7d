"""Training over ranks, in real processes under torchrun with gloo: the same run on any number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scorelm.config.recipe import Recipe
from scorelm.training.data import TrainingData, prepare
from scorelm.parallel import Ranks

FLAGS = [
    *("--model.dim", "32", "--model.layers", "2", "--model.embedding-dim", "8", "--vocab-size", "300"),
    *("--max-length", "32", "--rows", "8", "--log-every", "1", "--warmup", "3", "--ema", "0.9", "0.5"),
    *("--device", "cpu", "--precision", "float32", "--steps", "9", "--save-every", "4", "--keep", "9"),
    *("--accumulation", "2", "--sample-every", "0"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    rng = np.random.default_rng(0)
    words = ["Ruth", "Saul", "sees", "eats", "figs", "oil", "and", "the", "old", "corn"]
    lines = {" ".join(rng.choice(words, size=rng.integers(3, 12))) + "." for _ in range(700)}
    path.write_text("\n".join(sorted(lines)), encoding="utf-8")
    return path


def scorelm(ranks: int, *words: str) -> str:
    """What a command prints, in one process or under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(launcher if ranks > 1 else [sys.executable]), "-m", "scorelm", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe on 1 and 2 ranks, on 4, and on 2 with shared-out weights."""
    directory = tmp_path_factory.mktemp("runs")
    for name, ranks, more in (("1", 1, ()), ("2", 2, ()), ("4", 4, ()), ("fsdp", 2, ("--parallel", "fsdp"))):
        scorelm(ranks, "train", "--data", str(text), "--out", str(directory / name), *FLAGS, "--shards", "2", *more)
    return directory


@pytest.mark.parametrize("name", ["2", "4", "fsdp"])
def test_a_run_is_the_same_on_any_number_of_ranks(runs: Path, name: str) -> None:
    """To rounding: gradients are summed in another order. Held-out losses and the schedule's fit as well."""
    assert losses(runs / name) == pytest.approx(losses(runs / "1"), rel=1e-5)
    one, other = weights(runs / "1"), weights(runs / name)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-4)
    for key in ("tokens", "packing_efficiency", "accuracy", "parameter_norm", "embedding_anisotropy"):
        lines = [json.loads((runs / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("1", name)]
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-3, abs=1e-4)
    found = [json.loads((runs / n / "model" / "config.json").read_text()) for n in ("1", name)]
    assert found[0]["lengths"] == found[1]["lengths"]
    assert found[1]["schedule"]["mu"] == pytest.approx(found[0]["schedule"]["mu"], rel=1e-4)


def interrupted(run: Path, out: Path) -> Path:
    """A run as it was after its first checkpoint."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    first, *later = sorted((out / "checkpoints").iterdir())
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    assert first.name == "step-00000004"
    return out


@pytest.mark.parametrize(("name", "ranks"), [("2", 2), ("2", 1), ("2", 3), ("fsdp", 2), ("fsdp", 3)])
def test_a_run_goes_on_with_other_ranks(runs: Path, tmp_path: Path, name: str, ranks: int) -> None:
    """From a checkpoint of two ranks, on two bit for bit, and on another number to rounding."""
    out = interrupted(runs / name, tmp_path / "run")
    scorelm(ranks, "train", "--out", str(out), "--resume")
    exact = ranks == 2
    assert losses(out) == (losses(runs / name) if exact else pytest.approx(losses(runs / name), rel=1e-5))
    for key, value in weights(runs / name).items():
        if exact:
            assert torch.equal(weights(out)[key], value), key
        else:
            torch.testing.assert_close(weights(out)[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_checkpoints_written_meanwhile_are_the_same(text: Path, runs: Path, tmp_path: Path, parallel: str) -> None:
    """Two ranks write their first checkpoint in threads, and the run goes on from it bit for bit."""
    whole, flags = runs / {"ddp": "2", "fsdp": "fsdp"}[parallel], [*FLAGS, "--shards", "2", "--parallel", parallel]
    scorelm(2, "train", "--data", str(text), "--out", str(tmp_path / "run"), *flags, "--async-save")
    assert losses(tmp_path / "run") == losses(whole)
    out = interrupted(tmp_path / "run", tmp_path / "interrupted")
    scorelm(2, "train", "--out", str(out), "--resume", "--async-save")
    assert losses(out) == losses(whole)
    assert all(torch.equal(weights(out)[key], value) for key, value in weights(whole).items())


def test_a_shared_out_checkpoint_goes_on_as_copies(runs: Path, tmp_path: Path) -> None:
    out = interrupted(runs / "fsdp", tmp_path / "run")
    scorelm(1, "train", "--out", str(out), "--resume", "--parallel", "ddp")
    assert losses(out) == pytest.approx(losses(runs / "1"), rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_is_the_same_on_two_ranks_and_goes_on_bit_for_bit(text: Path, tmp_path: Path, parallel: str) -> None:
    """To the rounding of its bfloat16 iterations, which see whole matrices even where a rank holds half of each."""
    flags = ("--data", str(text), *FLAGS, "--shards", "2", "--optimizer", "muon")
    scorelm(1, "train", "--out", str(tmp_path / "one"), *flags)
    scorelm(2, "train", "--out", str(tmp_path / "two"), *flags, "--parallel", parallel)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    out = interrupted(tmp_path / "two", tmp_path / "again")
    scorelm(2, "train", "--out", str(out), "--resume")
    assert losses(out) == losses(tmp_path / "two")
    assert all(torch.equal(weights(out)[key], value) for key, value in weights(tmp_path / "two").items())


def test_too_many_ranks_or_shards_are_refused(data: TrainingData) -> None:
    for shards, world, says in ((3, 1, "3 shards"), (1, 9, "9 ranks")):
        with pytest.raises(ValueError, match=says):
            data.shards(recipe(shards), Ranks(0, world))


@pytest.fixture(scope="module")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    config = recipe(1).data.model_copy(update={"source": str(text)})
    return prepare(config, tmp_path_factory.mktemp("data"), False, lambda text: None)


def recipe(shards: int) -> Recipe:
    return Recipe.model_validate(
        {"data": {"vocab_size": 300, "max_length": 32}, "training": {"rows": 8, "shards": shards}}
    )


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_ranks_take_every_row_of_the_global_batch_once(data: TrainingData, shards: int) -> None:
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
    from scorelm.text.packing import packed_rows

    documents = [tuple(ids) for ids in data.documents.train["ids"]]
    found = []
    for rank in range(4):
        rows = packed_rows(data.documents.train, max_length=32, rows=2, seed=0, rank=rank, world=4, epochs=1)
        for batch in rows:
            for ids, segment in zip(batch["ids"], batch["segment"], strict=True):
                found += [tuple(ids[segment == k].tolist()) for k in range(1, segment.max() + 1)]
    short = sorted(d for d in documents if len(d) <= 32)
    assert sorted(f for f in found if f in set(short)) == short and len(found) == len(documents)


def test_samples_and_prices_are_shared_out_over_ranks(runs: Path) -> None:
    """Rows have their own seeds, so that two ranks print what one does."""
    model = str(runs / "1")
    for verb in (["sample", model, "-n", "5", "--steps", "6", "--best-of", "2", "--json"], ["score", model, "--json"]):
        one, two = (json.loads(scorelm(ranks, *verb)) for ranks in (1, 2))
        if verb[0] == "sample":
            assert two == one and len(one) == 5
        else:
            assert two["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-6)
            assert {k: two[k] for k in ("tokens", "nfe", "exact")} == {k: one[k] for k in ("tokens", "nfe", "exact")}


def test_a_rank_that_is_killed_is_started_again_from_the_last_checkpoint(
    text: Path, runs: Path, tmp_path: Path
) -> None:
    """By torchrun's own --max-restarts; the run ends as if nothing had happened."""
    out, flags = tmp_path / "run", [*FLAGS, "--shards", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "scorelm", "train", "--data", str(text), "--out", str(out), *flags]
    process = subprocess.Popen([*launcher, "--max-restarts", "1", *words], env=ENVIRONMENT, stderr=subprocess.PIPE)
    for _ in range(1200):
        if any((out / "checkpoints").glob("step-*")):
            break
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert losses(out) == losses(runs / "2")
    for key, value in weights(runs / "2").items():
        assert torch.equal(weights(out)[key], value), key

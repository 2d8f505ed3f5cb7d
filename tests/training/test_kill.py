"""SIGKILL in many moments of one run: no checkpoint is lost or damaged, and the weights are those of a whole run."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA, STATE, MANIFEST = (
    rf"\.writing-\d+/{re.escape(name)}" for name in ("__0_0.distcp", "state.json", "checksums.json")
)
INSIDE = [
    [("os.mkdir", r"\.writing-", 1)],
    [("open", DATA, 1)],
    [("open", DATA, 1), ("torch.save", "", 20)],
    [("fsync", DATA, 1)],
    [("os.rename", r"\.metadata\.tmp", 1)],
    [("open", STATE + " w", 1)],
    [("fsync", STATE, 1)],
    [("open", MANIFEST + " w", 1)],
    [("fsync", MANIFEST, 1)],
    [("os.rename", r"\.writing-\d+ .*/step-", 1)],
    [("fsync", r"/checkpoints$", 1)],
    [("os.rename", r"/step-\d+ .*/\.writing-step-", 1)],
    [("shutil.rmtree", r"\.writing-step-", 1), ("os.remove", "", 2)],
    [("open", r"\.model-writing/", 2)],
    [("os.rename", r"/model .*/\.model-old", 1)],
    [("os.rename", r"/\.model-writing .*/model", 1)],
    [("fsync", r"recipe\.toml\.writing", 1)],
]
"""Moments while a checkpoint, the model or the recipe is written, as `forks.at` takes them."""


def survive(faults: list[dict[str, Any]], runs: Any, tools: Any, out: Path, *flags: str) -> None:
    """Kill a run in each of the moments; no checkpoint that was written before may be lost."""
    before: list[int] = []
    for fault in faults:
        code, errors = runs(out, *flags, **fault)
        assert code == -9, (fault, code, errors)
        after = tools.checkpoints(out)
        assert after[-1:] >= before[-1:] and len(after) >= min(len(before), 2), (fault, before, after)
        before = after


@pytest.mark.thorough
@pytest.mark.parametrize("inside", [INSIDE[:4:2], pytest.param(INSIDE[:12:2], marks=pytest.mark.slow)])
def test_kills_while_a_thread_writes_lose_nothing(runs: Any, tools: Any, tmp_path: Path, inside: list[Any]) -> None:
    """With --async-save, on a disk so slow that steps go on meanwhile."""
    out = tmp_path / "killed"
    survive([{"kill": moment, "slow_disk": 0.05} for moment in inside], runs, tools, out, "--async-save")
    assert runs(out, "--async-save", slow_disk=0.05)[0] == 0
    tools.assert_same(out, runs.whole)
    assert tools.checkpoints(out) == [runs.steps - runs.every, runs.steps]


def survive_all(faults: list[dict[str, Any]], runs: Any, tools: Any, out: Path) -> None:
    """Survive the faults and then a kill between the last checkpoint and its model; end as a whole run does."""
    last = [("os.rename", rf"/step-0*{runs.steps}", 1), ("open", r"\.model-writing/", 1)]
    survive([*faults, {"kill": last}], runs, tools, out)
    assert tools.checkpoints(out)[-1] == runs.steps
    model = Path("model", "model.safetensors")
    assert (out / model).read_bytes() != (runs.whole / model).read_bytes()
    assert runs(out)[0] == 0
    tools.assert_same(out, runs.whole)
    assert tools.checkpoints(out) == [runs.steps - runs.every, runs.steps]


@pytest.mark.thorough
def test_kills_lose_nothing(runs: Any, tools: Any, tmp_path: Path) -> None:
    faults = [*({"kill": INSIDE[k]} for k in (2, 9, 11, 15)), {"kill_after": (4, 0.02)}]
    survive_all(faults, runs, tools, tmp_path / "killed")


@pytest.mark.slow
def test_thirty_kills_lose_nothing(make_runs: Callable[..., Any], tools: Any, tmp_path: Path) -> None:
    """17 inside the writing, 12 at random, and the last one."""
    draw = random.Random(0)
    outside = [{"kill_after": (draw.randint(1, 4), draw.uniform(0, 0.08))} for _ in range(12)]
    faults = [*({"kill": moment} for moment in INSIDE), *outside]
    draw.shuffle(faults)
    survive_all(faults, make_runs(steps=75, save_every=3), tools, tmp_path / "killed")

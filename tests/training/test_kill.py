"""SIGKILL in many moments of one run: no checkpoint is lost or damaged, and the weights are those of a whole run."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

DATA, STATE, MANIFEST = (
    rf"\.writing-\d+/{re.escape(name)}" for name in ("__0_0.distcp", "state.json", "checksums.json")
)
INSIDE = [
    [("os.mkdir", r"\.writing-", 1)],
    [("open", DATA, 1)],
    [("open", DATA, 1), ("torch.save", "", 40)],
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


def moments() -> list[dict[str, Any]]:
    """29 faults: 17 inside the writing, and 12 at random."""
    draw = random.Random(0)
    outside = [{"kill_after": (draw.randint(1, 4), draw.uniform(0, 0.08))} for _ in range(12)]
    mixed = [*({"kill": moment} for moment in INSIDE), *outside]
    draw.shuffle(mixed)
    return mixed


def survive(faults: list[dict[str, Any]], runs: Any, tools: Any, out: Path, *flags: str) -> None:
    """Kill a run in each of the moments; no checkpoint that was written before may be lost."""
    before: list[int] = []
    for fault in faults:
        code, errors = runs(out, *flags, **fault)
        assert code == -9, (fault, code, errors)
        after = tools.checkpoints(out)
        assert after[-1:] >= before[-1:] and len(after) >= min(len(before), 2), (fault, before, after)
        before = after


@pytest.mark.parametrize("inside", [INSIDE[:4:2], pytest.param(INSIDE[:12:2], marks=pytest.mark.slow)])
def test_kills_while_a_thread_writes_lose_nothing(
    whole: Path, runs: Any, tools: Any, tmp_path: Path, inside: list[Any]
) -> None:
    """With --async-save, on a disk so slow that steps go on meanwhile."""
    out = tmp_path / "killed"
    survive([{"kill": moment, "slow_disk": 0.05} for moment in inside], runs, tools, out, "--async-save")
    assert runs(out, "--async-save", slow_disk=0.05)[0] == 0
    tools.assert_same(out, whole)
    assert tools.checkpoints(out) == [runs.STEPS - runs.EVERY, runs.STEPS]


@pytest.mark.parametrize("count", [8, pytest.param(29, marks=pytest.mark.slow)])
def test_kills_lose_nothing(whole: Path, runs: Any, tools: Any, tmp_path: Path, count: int) -> None:
    """In so many moments, and then between the last checkpoint and its model."""
    out, last = tmp_path / "killed", [("os.rename", rf"/step-0*{runs.STEPS}", 1), ("open", r"\.model-writing/", 1)]
    survive([*moments()[:count], {"kill": last}], runs, tools, out)
    assert tools.checkpoints(out)[-1] == runs.STEPS
    assert (out / "model" / "model.safetensors").read_bytes() != (whole / "model" / "model.safetensors").read_bytes()
    assert runs(out)[0] == 0
    tools.assert_same(out, whole)
    assert tools.checkpoints(out) == [runs.STEPS - runs.EVERY, runs.STEPS]

"""SIGKILL in thirty moments of one run: no checkpoint is lost or damaged, and the weights are those of a whole run."""

import random
import re
from pathlib import Path
from typing import Any

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
    """Thirty faults: 17 inside the writing, 12 at random, and one between the last checkpoint and its model."""
    draw = random.Random(0)
    outside = [{"kill_after": (draw.randint(1, 4), draw.uniform(0, 0.08))} for _ in range(12)]
    mixed = [*({"kill": moment} for moment in INSIDE), *outside]
    draw.shuffle(mixed)
    return mixed


def test_kills_while_a_thread_writes_lose_nothing(whole: Path, runs: Any, tools: Any, tmp_path: Path) -> None:
    """Half of the moments inside, with --async-save, on a disk so slow that steps go on meanwhile."""
    out, before = tmp_path / "killed", list[int]()
    for moment in INSIDE[:12:2]:
        code, errors = runs(out, "--async-save", kill=moment, slow_disk=0.05)
        assert code == -9, (moment, code, errors)
        after = tools.checkpoints(out)
        assert after[-1:] >= before[-1:], (moment, before, after)
        before = after
    assert 0 < before[-1] < tools.STEPS
    assert runs(out, "--async-save", slow_disk=0.05)[0] == 0
    assert tools.weights(out) == tools.weights(whole)
    assert tools.checkpoints(out) == [tools.STEPS - tools.EVERY, tools.STEPS]


def test_thirty_kills_lose_nothing(whole: Path, runs: Any, tools: Any, tmp_path: Path) -> None:
    out, last = tmp_path / "killed", [("os.rename", rf"/step-0*{tools.STEPS}", 1), ("open", r"\.model-writing/", 1)]
    faults = [*moments(), {"kill": last}]
    assert len(faults) == 30
    before: list[int] = []
    for fault in faults:
        code, errors = runs(out, **fault)
        assert code == -9, (fault, code, errors)
        after = tools.checkpoints(out)
        assert after[-1:] >= before[-1:] and len(after) >= min(len(before), 2), (fault, before, after)
        before = after
    assert before[-1] == tools.STEPS
    assert tools.weights(out) != tools.weights(whole)
    tools.real(out, "--resume")
    assert tools.weights(out) == tools.weights(whole)
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-2:] == ["step-00000072", "step-00000075"]
    assert [line.split(', "acc')[0] for line in (out / "metrics.jsonl").read_text().splitlines()] == [
        line.split(', "acc')[0] for line in (whole / "metrics.jsonl").read_text().splitlines()
    ]

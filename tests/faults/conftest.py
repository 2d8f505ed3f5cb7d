"""A corpus, a whole run of it, and a process that forks runs with faults."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

STEPS, EVERY = 75, 3
FLAGS = [
    *("--model.dim", "32", "--model.layers", "2", "--model.embedding-dim", "8", "--vocab-size", "300"),
    *("--max-length", "32", "--rows", "4", "--log-every", "1", "--warmup", "3", "--sample-every", "0"),
    *("--ema", "0.9", "0.5", "--device", "cpu", "--steps", str(STEPS), "--save-every", str(EVERY)),
]


class Runs:
    """Starts training runs, with faults, as children of one process that has imported everything."""

    def __init__(self, text: Path) -> None:
        self.text = text
        command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.errors = text.with_name("errors")

    def begin(self, out: Path, *flags: str, errors: Path | None = None, **fault: Any) -> None:
        """Start a run, or resume it if there is one."""
        self.errors.unlink(missing_ok=True)
        arguments = ["train", "--out", str(out)]
        arguments += ["--resume"] if any(out.glob("checkpoints/step-*")) else ["--data", str(self.text), *FLAGS]
        job = {"arguments": [*arguments, *flags], "errors": str(errors or self.errors), "fault": fault}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())

    def end(self, patience: float = 120) -> int:
        """The run's exit code; one that hangs is killed."""
        watch = threading.Timer(patience, os.kill, (self.pid, signal.SIGKILL))
        watch.start()
        try:
            return int(self.server.stdout.readline())
        finally:
            watch.cancel()

    def __call__(self, out: Path, *flags: str, **fault: Any) -> tuple[int, str]:
        """A run's exit code and what it said on stderr."""
        self.begin(out, *flags, **fault)
        return self.end(), self.errors.read_text()


def is_sound(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are those of its manifest, bit for bit."""
    written = json.loads((checkpoint / "checksums.json").read_text())["files"]
    found = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.name != "checksums.json"}
    return {k: [len(v), blake2b(v, digest_size=32).hexdigest()] for k, v in found.items()} == {
        k: [v["size"], v["blake2b"]] for k, v in written.items()
    }


def checkpoints(out: Path) -> list[int]:
    """The steps of a run's checkpoints, all of which have to be sound."""
    found = sorted((out / "checkpoints").glob("step-*"))
    for path in found:
        assert is_sound(path), path
    return [int(p.name.removeprefix("step-")) for p in found]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    names, verbs, things = ["Ruth", "Saul", "Amos", "Leah"], ["sees", "eats", "sells"], ["figs", "oil", "corn"]
    lines = [f"{a} {v} {t} and {b} {w}." for a in names for v in verbs for t in things for b in names for w in verbs]
    text = tmp_path_factory.mktemp("text") / "lines.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    made = Runs(text)
    yield made
    made.server.stdin.close()
    made.server.wait()


@pytest.fixture(scope="package")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    real(out, "--data", str(runs.text), *FLAGS)
    return out


def real(out: Path, *flags: str) -> None:
    """Run or resume in a process of its own, to the end."""
    command = [sys.executable, "-m", "scorelm", "train", "--out", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.fixture(scope="package")
def tools() -> Any:
    """The functions above, for the tests."""
    return sys.modules[__name__]

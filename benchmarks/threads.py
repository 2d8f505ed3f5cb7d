"""What OpenMP's waiting threads cost, on an idle machine and beside a busy process: training and generation.

    python benchmarks/threads.py

Each figure is from processes of their own, since the policy is read once; policies take turns, round after round, with
the machine idle and then with one process that keeps a core busy. Writes results/threads.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

OUT = Path(__file__).with_name("results") / "threads.json"
POLICIES = {
    "as OpenMP has it": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
ROUNDS, SECONDS = 2, 4.0
WORK = f"""
import tempfile, time
from pathlib import Path
from scorelm.cli.process import keep_freed_memory
keep_freed_memory()
from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.training.data import prepare
from scorelm.training.trainer import Trainer
recipe = Recipe(model=ModelConfig(dim=256), training=TrainingConfig(steps=10**6, precision="float32", device="cpu"))
trainer = Trainer(recipe, prepare(recipe.data, Path(tempfile.mkdtemp()), False, lambda text: None))
def rate(work):
    work()
    work()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < {SECONDS}:
        work()
        count += 1
    return count / (time.perf_counter() - started)
trained = rate(trainer.step)
lm = trainer.model()
written = rate(lambda: lm.generate(n=1, path="uniform", steps=8, length=40))
print(trained, written)
"""


def measure(policy: dict[str, str]) -> tuple[float, float]:
    """Training steps and generated texts a second, in a process with these settings."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", WORK], env=inherited | policy, capture_output=True, text=True, check=True
    )
    trained, written = map(float, done.stdout.split())
    return trained, written


def main() -> None:
    """All policies, idle and busy, in turn."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"idle": {}, "busy": {}}
    for _ in range(ROUNDS):
        for state, kept in found.items():
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if state == "busy" else None
            try:
                for name, policy in POLICIES.items():
                    kept.setdefault(name, []).append(measure(policy))
                    print(state, name, "{:.2f} steps/s {:.2f} texts/s".format(*kept[name][-1]), flush=True)
            finally:
                if busy is not None:
                    busy.kill()
                    busy.wait()
    table = {
        state: {
            name: [round(median(values), 3) for values in zip(*rounds, strict=True)] for name, rounds in kept.items()
        }
        for state, kept in found.items()
    }
    OUT.write_text(
        json.dumps({"unit": "training steps/s and texts/s, medians", "rounds": ROUNDS, **table}, indent=1) + "\n"
    )
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()

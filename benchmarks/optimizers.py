"""Muon for the layers' matrices against AdamW for all weights: steps and seconds to a given held-out loss.

    .venv/bin/python benchmarks/optimizers.py           # writes benchmarks/results/optimizers.json, prints a table

Runs of one seed (width 128, 4 layers, verses of the embedded corpus, the log schedule, so that all are judged at the
same noise) take turns of 20 steps, so that their times compare. The rate stays constant after its warm-up: a run's loss
is that of its best weight average at the time. The loss to reach is AdamW's at its default rate after the last step,
and times are in units of that arm's; mean and half of a 95% interval over seeds. An arm is named by AdamW's rate: Muon
steps the layers at 3 times it (`MUON_LR`), with as much more decay.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from runs import Kept, recipe, spread
from scorelm.cli import process
from scorelm.device import pick_dtype
from scorelm.training.data import prepare
from scorelm.training.trainer import Trainer

ARMS = {
    f"{optimizer} {lr:g}": {"training__optimizer": optimizer, "training__lr": lr}
    for optimizer, rates in {"adamw": (2e-3,), "muon": (2e-3, 4e-3)}.items()
    for lr in rates
}
BOUND_BY, TURN = "adamw 0.002", 20


def trainer(seed: int, **options: Any) -> Trainer:
    """A run that has not begun."""
    out = Path(tempfile.mkdtemp())
    made = recipe(model__dim=128, noise__schedule="log", training__seed=seed, training__decay=0.0, **options)
    return Trainer(made, prepare(made.data, out, resume=False, say=lambda _: None))


def curves(seed: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Held-out loss of every arm's best average, and its training time, after every turn."""
    runs = {arm: trainer(seed, **options) for arm, options in ARMS.items()}
    spent = dict.fromkeys(runs, 0.0)
    found: dict[str, dict[str, list[float]]] = {arm: {"loss": [], "seconds": []} for arm in runs}
    for done in range(TURN, steps + 1, TURN):
        for arm, run in runs.items():
            started = time.perf_counter()
            while run.progress.step < done:
                run.step()
            spent[arm] += time.perf_counter() - started
            run.measure_heldout()
            found[arm]["loss"].append(min(run.progress.heldout.values()))
            found[arm]["seconds"].append(spent[arm])
        line = ", ".join(f"{arm} {curve['loss'][-1]:.3f}" for arm, curve in found.items())
        print(f"seed {seed}, step {done}: {line}", flush=True)
    return found


def reached(curve: dict[str, list[float]], bound: float) -> tuple[float, float] | None:
    """Steps and seconds until the loss was `bound`, by linear interpolation after the first turn; None if never."""
    loss = curve["loss"]
    if loss[0] <= bound:
        return TURN, curve["seconds"][0]
    for k in range(1, len(loss)):
        if loss[k] <= bound < loss[k - 1]:
            part = k - 1 + (loss[k - 1] - bound) / (loss[k - 1] - loss[k])
            before, after = curve["seconds"][k - 1 : k + 1]
            return TURN * (part + 1), before + (part - k + 1) * (after - before)
    return None


def shown(found: dict[str, float], digits: int) -> str:
    """A mean with its interval, which a single seed has not."""
    interval = f" ± {found['half']:.{digits}f}" if found["seeds"] > 1 else ""
    return f"{found['mean']:.{digits}f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    process.prepare()
    kept, steps = Kept("optimizers.json"), arguments.steps
    if kept.get("steps", lambda: steps) != steps:
        parser.error(f"{kept.path} was made with {kept.values['steps']} steps: move it away first")
    kept.get("precision", lambda: str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch."))
    found = [kept.get(f"seed {seed}", lambda seed=seed: curves(seed, steps)) for seed in arguments.seeds]
    print(f"\n{'':<14}{'loss, nats':>16}{'steps to it':>16}{'time to it':>18}{'time of a step':>16}")
    bounds = [curve[BOUND_BY] for curve in found]
    for arm in ARMS:
        loss = spread([curve[arm]["loss"][-1] for curve in found])
        there = [reached(curve[arm], by["loss"][-1]) for curve, by in zip(found, bounds, strict=True)]
        pace = spread([curve[arm]["seconds"][-1] / by["seconds"][-1] for curve, by in zip(found, bounds, strict=True)])
        cells = ["not reached", ""]
        if None not in there:
            pairs = [(k, s / by["seconds"][-1]) for (k, s), by in zip(there, bounds, strict=True)]
            steps_there, time_there = (spread(list(part)) for part in zip(*pairs, strict=True))
            cells = [shown(steps_there, 0), shown(time_there, 2)]
        print(f"{arm:<14}{shown(loss, 3):>16}{cells[0]:>16}{cells[1]:>18}{pace['mean']:>16.2f}")


if __name__ == "__main__":
    main()

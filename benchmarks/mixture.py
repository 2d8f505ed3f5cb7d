"""One model for every path: mixtures of noise levels and of block sizes against each path's specialist.

    .venv/bin/python benchmarks/mixture.py                             # every arm at every budget, seed 0
    .venv/bin/python benchmarks/mixture.py --budgets 250 --seeds 1 2   # more seeds where they are cheap

The trunk has 4 layers of width 128. A specialist is trained on its own path's levels alone; a generalist's excess on a
path is its price less the specialist's, in nats per token of 100 held-out verses. Writes results/mixture.json
after every figure, so that a stopped run goes on, and prints the table of excesses. Runs are kept under runs/mixture.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from runs import Kept, heldout, recipe, seconds, trained
from scorelm import price
from scorelm.cli import process
from scorelm.config.recipe import Mixture

NONE = dict.fromkeys(Mixture.model_fields, 0.0)
SHARED, ABSORBING = NONE | {"shared": 1.0}, NONE | {"absorbing": 1.0}
HALF = {"shared": 0.6, "independent": 0.0, "spread": 0.05, "ramp": 0.05, "prefix": 0.05, "absorbing": 0.2,
        "ordered": 0.05}  # fmt: skip
SPECIALISTS: dict[str, dict[str, Any]] = {
    "uniform": {"noise__mixture": SHARED, "noise__streams": 1, "noise__given": 0.0},
    "blocks:4": {"noise__mixture": SHARED, "noise__block_sizes": (4,)},
    "random": {"noise__mixture": ABSORBING, "noise__streams": 1, "noise__given": 0.0},
    "ordered": {"noise__mixture": ABSORBING, "noise__block_sizes": (1,)},
}
GENERALISTS: dict[str, dict[str, Any]] = {
    "default": {},
    "half of absorbing": {"noise__mixture": HALF},
    "sizes 1 2 4 8 whole whole": {"noise__block_sizes": (1, 2, 4, 8, 0, 0)},
    "sizes 1 whole": {"noise__block_sizes": (1, 0)},
    "sizes 1 4 whole whole": {"noise__block_sizes": (1, 4, 0, 0)},
}
PATHS = tuple(SPECIALISTS)


def measure(kept: Kept, arm: str, changes: dict[str, Any], paths: tuple[str, ...], steps: int, seed: int) -> None:
    """Train one arm for one budget, and price it on `paths`."""
    name = f"{arm} | {steps} | {seed}"
    out = Path("runs/mixture") / name.replace(" | ", "-").replace(" ", "_").replace(":", "_")
    if all(f"{name} | {column}" in kept.values for column in (*paths, "seconds")):
        return
    lm = trained(recipe(model__dim=128, training__steps=steps, training__seed=seed, training__samples=0,
                        **changes), out)  # fmt: skip
    for path in paths:
        kept.get(f"{name} | {path}", lambda path=path: price(lm, heldout(100), path, draws=8).to_json())
    kept.get(f"{name} | seconds", lambda: seconds(out))


def excess(kept: Kept, arm: str, path: str, steps: int) -> tuple[float, float] | None:
    """Mean price on a path, and its mean excess over the specialist's, over the seeds that both have."""
    own, best = f"{arm} | {steps}", f"{path} specialist | {steps}"
    seeds = [s for s in range(100) if {f"{own} | {s} | {path}", f"{best} | {s} | {path}"} <= kept.values.keys()]
    if not seeds:
        return None
    prices = [kept.values[f"{own} | {s} | {path}"]["nats_per_token"] for s in seeds]
    least = [kept.values[f"{best} | {s} | {path}"]["nats_per_token"] for s in seeds]
    return mean(prices), mean(prices) - mean(least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[250, 750, 1500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(GENERALISTS), default=list(GENERALISTS))
    arguments = parser.parse_args()
    process.prepare()
    kept = Kept("mixture.json")
    for seed in arguments.seeds:
        for steps in arguments.budgets:
            for path, changes in SPECIALISTS.items():
                measure(kept, f"{path} specialist", changes, (path,), steps, seed)
            for arm in arguments.arms:
                measure(kept, arm, GENERALISTS[arm], PATHS, steps, seed)
    for steps in arguments.budgets:
        print(f"\n{steps:<28} steps" + "".join(f"{path:>18}" for path in PATHS) + "       mean excess")
        for arm in GENERALISTS:
            found = [e for path in PATHS if (e := excess(kept, arm, path, steps)) is not None]
            if len(found) < len(PATHS):
                continue
            cells = "".join(f"{p:9.3f} ({e:+.3f})" for p, e in found)
            print(f"{arm:<34}{cells}{mean(e for _, e in found):+18.3f}")


if __name__ == "__main__":
    main()

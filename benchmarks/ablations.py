"""Ablations: one choice of the recipe changed at a time, same steps and seeds, prices of held-out verses.

    .venv/bin/python benchmarks/ablations.py                       # every arm, seeds 0 1 2
    .venv/bin/python benchmarks/ablations.py --arms default 'E 16' --seeds 0

The trunk has 4 layers of width 128. Writes benchmarks/results/ablations.json after every figure, so that a stopped run
goes on. Runs are kept under runs/ablations. `uniform` and `blocks:4` are bounds, `random` is one too, the mean over
orders, and `ordered` is exact, all in nats per token of 100 held-out verses with the length of each included; `seconds`
is the time of the training steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from runs import Kept, heldout, recipe, seconds, trained
from scorelm import price
from scorelm.cli import process
from scorelm.config.recipe import Mixture
from scorelm.model.denoiser import Denoiser
from scorelm.model.prediction import Prediction

NONE = dict.fromkeys(Mixture.model_fields, 0.0)
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "schedule log": {"noise__schedule": "log"},
    "schedule ddlm": {"noise__schedule": "ddlm"},
    "schedule cdcd": {"noise__schedule": "cdcd"},
    "shared levels only": {"noise__mixture": NONE | {"shared": 1.0}},
    "shared levels only, one stream": {"noise__mixture": NONE | {"shared": 1.0}, "noise__streams": 1},
    "half independent": {"noise__mixture": NONE | {"shared": 0.25, "independent": 0.5, "absorbing": 0.25}},
    "half of absorbing": {"noise__mixture": NONE | {"shared": 0.6, "spread": 0.05, "ramp": 0.05, "prefix": 0.05,
                                                    "absorbing": 0.2, "ordered": 0.05}},
    "one stream": {"noise__streams": 1},
    "whole document only": {"noise__block_sizes": (0,)},
    "without output prior": {},
    "E 16": {"model__embedding_dim": 16},
    "E 64": {"model__embedding_dim": 64},
    "E 128": {"model__embedding_dim": 128},
    "no self-conditioning": {"training__self_conditioning": 0.0},
    "likelihood term 0.1": {"training__likelihood_weight": 0.1},
    "likelihood term 1": {"training__likelihood_weight": 1.0},
}  # fmt: skip
PATHS = ("uniform", "blocks:4", "random", "ordered")


@contextmanager
def variant(arm: str) -> Iterator[None]:
    """The denoiser without its output prior, for the arm that asks for it: logits are the context's alone."""
    whole = Denoiser.predict

    def context_alone(self: Denoiser, *inputs: Any, **options: Any) -> Prediction:
        found = whole(self, *inputs, **options)

        def read_out(h_ND: Tensor, *evidence: Tensor) -> tuple[Tensor, Tensor]:
            _, context_free_NV = found.read_out(h_ND, *evidence)
            return self.context(h_ND) + self.prior, context_free_NV

        return replace(found, read_out=read_out)

    with patch.object(Denoiser, "predict", context_alone if arm == "without output prior" else whole):
        yield


def measure(kept: Kept, arm: str, seed: int, steps: int) -> None:
    """Train one arm with one seed, and price it."""
    name = f"{arm} | {seed}"
    if f"{name} | seconds" in kept.values:
        return
    out = Path("runs/ablations") / name.replace(" ", "-").replace("|", "")
    with variant(arm):
        changes = {
            "model__dim": 128, "training__seed": seed, "training__steps": steps, "training__samples": 0
        } | ARMS[arm]  # fmt: skip
        lm = trained(recipe(**changes), out)
        for path in PATHS:
            kept.get(f"{name} | {path}", lambda path=path: price(lm, heldout(100), path, draws=8).to_json())
    kept.get(f"{name} | seconds", lambda: seconds(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    process.prepare()
    kept = Kept("ablations.json")
    steps = arguments.steps
    if kept.get("steps", lambda: steps) != steps:
        parser.error(f"{kept.path} was made with {kept.values['steps']} steps: move it away first")
    for seed in arguments.seeds:
        for arm in arguments.arms:
            measure(kept, arm, seed, steps)
    print(f"\n{'arm':<32}" + "".join(f"{column:>16}" for column in (*PATHS, "seconds")))
    for arm in arguments.arms:
        cells = []
        for column in (*PATHS, "seconds"):
            values = [kept.values[f"{arm} | {seed} | {column}"] for seed in arguments.seeds]
            numbers = [v["nats_per_token"] if isinstance(v, dict) else v for v in values]
            middle, half = sum(numbers) / len(numbers), (max(numbers) - min(numbers)) / 2
            cells.append(f"{middle:9.3f} ±{half:5.3f}" if column != "seconds" else f"{middle:15.0f}")
        print(f"{arm:<32}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()

"""Put a run's model into the package, where `scorelm sample` finds it if no other is named.

    .venv/bin/scorelm train --recipe kjv --out runs/kjv
    .venv/bin/python benchmarks/embedded.py runs/kjv

Writes src/scorelm/assets/model: the weights in bfloat16 (half the size; where they are used they are float32), the
tokenizer, config.json, the card, and the run's recipe. What the rounding costs is printed: prices of held-out verses
before and after it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from runs import heldout
from scorelm import ScoreLM, price
from scorelm.cli import process

ASSETS = Path(__file__).parents[1] / "src/scorelm/assets/model"
MOST_MEGABYTES = 20


def main() -> None:
    process.prepare()
    run = Path(sys.argv[1])
    before = ScoreLM.from_pretrained(run)
    shutil.rmtree(ASSETS, ignore_errors=True)
    before.save_pretrained(ASSETS)
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(ASSETS / "model.safetensors").items()}
    save_file(weights, ASSETS / "model.safetensors")
    (ASSETS / "model.safetensors").chmod(0o644)
    shutil.copy(run / "recipe.toml", ASSETS / "recipe.toml")
    size = sum(path.stat().st_size for path in ASSETS.iterdir()) / 1e6
    assert size <= MOST_MEGABYTES, f"{size:.1f} MB are too many"
    after, texts = ScoreLM.from_pretrained(ASSETS), heldout()
    print(f"{ASSETS}: {size:.1f} MB")
    for path in before.objective.watched:
        steps = {"steps": 16} if path == "bounded" else {}
        found = [price(lm, texts, path, draws=2, precision="auto", **steps).nats_per_token for lm in (before, after)]
        print(f"{path:<8} {found[0]:.4f} nats/token in float32, {found[1]:.4f} in bfloat16")


if __name__ == "__main__":
    main()

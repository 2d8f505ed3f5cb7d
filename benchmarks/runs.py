"""What the benchmarks of quality share: runs that are trained once, results that are kept as they come."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from scorelm import ScoreLM, train
from scorelm.config.recipe import Recipe
from scorelm.config.toml import load_recipe
from scorelm.text.corpus import load_corpus
from scorelm.training import Interrupted

RESULTS = Path(__file__).parent / "results"
HOLDOUT = 0.02


def recipe(base: str = "demo", /, **changes: Any) -> Recipe:
    """A recipe with options changed, each written ``room__option=value`` (``training__steps=300``)."""
    tree = load_recipe(base).model_dump()
    for name, value in changes.items():
        *rooms, option = name.split("__")
        table = tree
        for room in rooms:
            table = table[room]
        table[option] = value
    return Recipe.model_validate(tree)


def trained(options: Recipe, out: Path) -> ScoreLM:
    """The model of a run, trained or trained on if it is not finished; a run that is done is loaded."""
    done = out / "done"
    if not done.exists():
        begun = any((out / "checkpoints").glob("step-*"))
        try:
            train(options, out, resume=begun)
        except Interrupted as stop:
            sys.exit(f"{out}: {stop}; the same command goes on with it")
        done.touch()
    return ScoreLM.from_pretrained(out)


def seconds(out: Path) -> float:
    """Time that a run's training steps took."""
    last = (out / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["seconds"])


def heldout(limit: int | None = None) -> list[str]:
    """Texts of the embedded corpus that no run has seen."""
    return [example["text"] for example in islice(load_corpus("kjv", holdout=HOLDOUT).heldout, limit)]


def training() -> list[str]:
    """Texts of the embedded corpus that runs learn from."""
    return [example["text"] for example in load_corpus("kjv", holdout=HOLDOUT).train]


def spread(values: list[float]) -> dict[str, float]:
    """Mean over seeds, and half of a 95% interval (Student's t)."""
    t = {1: math.nan, 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)]
    half = t * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "half": half, "seeds": len(values)}


class Kept:
    """A JSON file of results by name; what is there already is not computed again."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / name
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of that name, computed and written if it is missing."""
        if name not in self.values:
            self.values[name] = compute()
            self.write()
            print(f"{name}: {json.dumps(self.values[name])[:300]}", flush=True)
        return self.values[name]

    def write(self) -> None:
        """Write the file, whole or not at all."""
        draft = self.path.with_suffix(".writing")
        draft.write_text(json.dumps(self.values, indent=1) + "\n")
        draft.replace(self.path)

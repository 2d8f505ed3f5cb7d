"""Quality: score, masked and autoregressive models of one trunk, each at its best: what held-out text costs them.

    python benchmarks/quality.py "King James Bible" runs/score runs/masked runs/ar

Each RUN is a finished run, with whatever dropout and length was best for its objective; several of one objective are
seeds of it. All have read the same text with the same share held out, in a trunk of the same size. Prices are those of
all held-out examples, on the paths that training prices, and with the surest words first in 16 and 64 steps.

Adds to benchmarks/results/quality.json, under the name that comes first, every price as soon as it is there, and prints
the table. Intervals are 95%: over seeds (Student's t), or over texts where there is one run.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

from runs import Kept, spread
from scorelm import ScoreLM, price
from scorelm.cli import process
from scorelm.cli.texts import Texts, load_texts

BUDGETS = (16, 64)
"""Steps with the surest words first."""


def facts(run: Path, lm: ScoreLM) -> dict[str, Any]:
    """What tells a run from others of its trunk, and what it must have in common with them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    options, made = tomllib.loads((run / "recipe.toml").read_text()), lm.provenance
    best = max((line for line in lines if line["step"] <= made.steps), key=lambda line: line["step"])
    return {
        "objective": lm.objective.name,
        "dropout": options["training"].get("dropout", 0.0),
        "seed": options["training"].get("seed", 0),
        "best at epoch": best["epoch"],
        "of": lines[-1]["epoch"],
        "common": [made.data, made.fingerprint, made.holdout, *lm.config.size, lm.tokenizer.vocab_size],
    }


def ways(lm: ScoreLM) -> list[tuple[str, int | None]]:
    """Paths that are priced, and in how many steps."""
    usual = [(path, None) for path in lm.objective.watched if path != "bounded"]
    return usual + [("bounded", steps) for steps in BUDGETS if "bounded" in lm.objective.watched]


def measure(kept: Kept, name: str, run: Path) -> None:
    """Keep what is known of a run, and what held-out text costs its model."""
    lm = ScoreLM.from_pretrained(run)
    found = facts(run, lm)
    if kept.get(f"{name} | {run}", lambda: found) != found:
        raise SystemExit(f"{kept.path} has the prices of another {run}: take them out of it first")
    texts = load_texts(lm.provenance, Texts()).texts
    for path, steps in ways(lm):
        kept.get(
            f"{name} | {run} | {path}" + (f" in {steps}" if steps else ""),
            lambda path=path, steps=steps: price(lm, texts, path, steps=steps).to_json(),
        )


def show(kept: Kept, name: str) -> None:
    """The runs, and the prices of each objective beside the autoregressive model's."""
    runs: dict[str, dict[str, Any]] = {}
    prices: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for key, value in kept.values.items():
        title, run, *path = key.split(" | ")
        if title == name and path:
            prices[runs[run]["objective"], path[0]].append(value)
        elif title == name:
            runs[run] = value
    assert len({json.dumps(run["common"]) for run in runs.values()}) == 1, "the runs differ in text or trunk"
    print("\n| run | objective | dropout | best at epoch | of |\n|---|---|---|---|---|")
    for title, run in runs.items():
        print(f"| {title} | {run['objective']} | {run['dropout']:g} | {run['best at epoch']:.1f} | {run['of']:.1f} |")
    plain = prices.get(("autoregressive", "ordered"), [])
    least = spread([one["nats_per_token"] for one in plain])["mean"] if plain else None
    print("\n| model | path | evaluations | nats/token | bits/character | behind |\n|---|---|---|---|---|---|")
    for (objective, path), found in prices.items():
        nats, bits = (spread([one[unit] for one in found]) for unit in ("nats_per_token", "bits_per_char"))
        half = nats["half"] if len(found) > 1 else 1.96 * found[0]["stderr_nats_per_token"]
        behind = "" if least is None else f"{nats['mean'] - least:+.3f}"
        nfe = f"{found[0]['nfe']:.0f}" if path.startswith("bounded") else ""
        print(f"| {objective} | {path} | {nfe} | {nats['mean']:.3f} ± {half:.3f} | {bits['mean']:.3f} | {behind} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the text")
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    process.prepare()
    kept = Kept("quality.json")
    for run in given.runs:
        measure(kept, given.name, run)
    show(kept, given.name)


if __name__ == "__main__":
    main()

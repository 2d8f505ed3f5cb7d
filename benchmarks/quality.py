"""Quality: score, autoregressive and masked models of one trunk, on the same tokens and seeds of the embedded corpus.

    .venv/bin/python benchmarks/quality.py             # trains what is missing under runs/quality, then measures
    .venv/bin/python benchmarks/quality.py --steps 500 --seeds 0 1 2

Writes benchmarks/results/quality.json (every figure as soon as it is there, so that a stopped run goes on) and
quality.png. The judge is an autoregressive model with another seed and another split (70% of the verses, none of
those that are priced). Prices are in nats per token and bits per character of held-out verses; a diffusion model's
have the length in them. Perplexity at matched entropy: over temperatures, perplexity under the judge is interpolated
(its log, linearly) at the entropy that real verses have.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runs import RESULTS, Kept, heldout, recipe, seconds, spread, trained, training
from scorelm import price
from scorelm.cli import process
from scorelm.evaluation.judge import load_judge
from scorelm.evaluation.report import Examiner, written
from scorelm.objectives import OBJECTIVES

PRICES = {"score": ("uniform", "ramp:1", "blocks:4", "ordered", "random"), "masked": ("random",),
          "autoregressive": ("ordered",)}  # fmt: skip
BUDGETS = (8, 32, 128)
TEMPERATURES = (0.55, 0.7, 0.85, 1.0)
TEXTS = 64
RUNS = Path("runs/quality")


def ways(objective: str) -> Iterator[tuple[str, int]]:
    """(path, evaluations) that a model generates with."""
    if objective == "autoregressive":
        yield "blocks:1", 1
    for steps in BUDGETS if objective != "autoregressive" else ():
        for path in ("shuffled", "bounded:1", "confidence", "uniform") if objective == "score" else ("shuffled",):
            yield path, steps


def matched(points: list[dict[str, float]], entropy: float) -> float | None:
    """Perplexity at that entropy, interpolated over temperatures; None where they do not reach it."""
    line = sorted((p["entropy"], math.log(p["perplexity"])) for p in points)
    if not line[0][0] <= entropy <= line[-1][0]:
        return None
    return float(math.exp(np.interp(entropy, [h for h, _ in line], [p for _, p in line])))


def measure(kept: Kept, objective: str, seed: int, steps: int, judge_steps: int) -> None:
    """Train one model and keep all that is measured of it."""
    out = RUNS / f"{objective}-{seed}"
    lm = trained(recipe(training__objective=objective, training__seed=seed, training__steps=steps,
                        training__samples=0), out)  # fmt: skip
    kept.get(f"{objective}-{seed} seconds", lambda: seconds(out))
    texts = heldout(200)
    for path in PRICES[objective]:
        kept.get(f"{objective}-{seed} price {path}", lambda path=path: price(lm, texts, path).to_json())
    examiner = judged(judge_steps)
    for path, budget in ways(objective):
        for temperature in TEMPERATURES:

            def point(path: str = path, budget: int = budget, temperature: float = temperature) -> dict[str, float]:
                made = written(
                    lm,
                    TEXTS,
                    seed=1000 * seed,
                    path=path,
                    steps=budget,
                    temperature=temperature,
                    top_p=1,
                    precision="auto",
                )
                figures = examiner.figures(made.texts) if temperature == 1.0 else examiner.point(made.texts)
                return {"nfe": made.nfe, "seconds": made.seconds} | figures

            kept.get(f"{objective}-{seed} {path} {budget} T{temperature:g}", point)


_examiners: dict[int, Examiner] = {}


def judged(steps: int) -> Examiner:
    """The judge, trained once, with half of the held-out verses as reference."""
    if steps not in _examiners:
        options = recipe(
            training__objective="autoregressive", training__seed=1000, training__steps=steps, model__layers=6,
            data__holdout=0.3, training__samples=0,
        )  # fmt: skip
        trained(options, RUNS / "judge")
        texts = heldout()
        _examiners[steps] = Examiner(load_judge(str(RUNS / "judge")), texts[1::2][:TEXTS], training())
    return _examiners[steps]


def summarise(kept: Kept, seeds: list[int]) -> dict[str, Any]:
    """The tables: prices, perplexity at the entropy of real text, MAUVE."""
    found = kept.values
    entropy = found["real"]["entropy"]
    tables: dict[str, Any] = {"prices": {}, "generation": {}, "seconds": {}}
    for objective in OBJECTIVES:
        runs = [f"{objective}-{s}" for s in seeds if f"{objective}-{s} seconds" in found]
        if not runs:
            continue
        tables["seconds"][objective] = spread([found[f"{r} seconds"] for r in runs])
        for path in PRICES[objective]:
            prices = [found[f"{r} price {path}"] for r in runs if f"{r} price {path}" in found]
            if prices:
                tables["prices"][f"{objective} {path}"] = {
                    unit: spread([p[unit] for p in prices]) for unit in ("nats_per_token", "bits_per_char")
                } | {"exact": prices[0]["exact"]}
        for path, budget in ways(objective):
            rows = [[found.get(f"{r} {path} {budget} T{t:g}") for t in TEMPERATURES] for r in runs]
            rows = [row for row in rows if all(row)]
            at = [m for m in (matched(row, entropy) for row in rows) if m is not None]
            if rows:
                last = [row[-1] for row in rows]
                names = ("nfe", "seconds", "perplexity", "entropy", "mauve", "distinct_2", "self_bleu", "copied")
                line = {name: spread([p[name] for p in last]) for name in names}
                if at:
                    line["perplexity_at_real_entropy"] = spread(at)
                tables["generation"][f"{objective} {path} {budget}"] = line
    return tables


def picture(tables: dict[str, Any], real: dict[str, float], target: Path) -> None:
    """Perplexity under the judge, and MAUVE, against evaluations; at temperature 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, line in tables["generation"].items():
        lines.setdefault(name.rpartition(" ")[0], []).append(line)
    for name, line in lines.items():
        for axis, column in ((left, "perplexity"), (right, "mauve")):
            points = [p for p in line if column in p]
            axis.errorbar([p["nfe"]["mean"] for p in points], [p[column]["mean"] for p in points],
                          [p[column]["half"] for p in points], marker="o", capsize=2, label=name)  # fmt: skip
    left.axhline(real["perplexity"], color="0.6", linewidth=1)
    left.set_yscale("log")
    left.set_ylabel("perplexity under the judge at temperature 1 (grey: real text)")
    right.set_ylabel("MAUVE at temperature 1")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("evaluations of the model for a text")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--judge-steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    process.prepare()
    kept = Kept("quality.json")
    steps = arguments.steps
    if kept.get("steps", lambda: steps) != steps:
        parser.error(f"{kept.path} was made with {kept.values['steps']} steps: move it away first")
    kept.get("command", lambda: f"python benchmarks/quality.py --steps {steps} --judge-steps {arguments.judge_steps}")
    kept.get("real", lambda: judged(arguments.judge_steps).figures(heldout()[0::2][:TEXTS]))
    for seed in arguments.seeds:
        for objective in OBJECTIVES:
            measure(kept, objective, seed, steps, arguments.judge_steps)
    kept.values["summary"] = summarise(kept, arguments.seeds)
    kept.write()
    picture(kept.values["summary"], kept.values["real"], RESULTS / "quality.png")


if __name__ == "__main__":
    main()

"""Paths: what every path costs and how its text is, against evaluations, for one model; and the peers' orders.

    scorelm train --steps 3600 --model.layers 6 --out runs/kjv
    scorelm train --steps 1500 --model.layers 6 --objective masked --out runs/masked
    scorelm train --steps 1500 --model.layers 6 --objective autoregressive --data.holdout 0.3 --seed 9 --out runs/judge
    python benchmarks/paths.py runs/kjv runs/masked runs/judge

Writes benchmarks/results/paths.json after every figure, so that a stopped run goes on; then paths-price.png and
paths-quality.png. Prices are the model's own, in nats per token of 60 held-out verses, of exactly the sampler that
takes so many steps; perplexity is that of the judge, which has seen 70% of the verses but none of these, and is to be
read beside the entropy of the words in a text. `bounded` is entropy-bounded unmasking, `surest` MaskGIT's order,
`remask` ReMDM's, `shuffled` masked diffusion's; names that start with `masked` are a masked-diffusion model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runs import RESULTS, Kept, heldout, spread
from scorelm import ScoreLM, price
from scorelm.cli import process
from scorelm.evaluation.judge import load_judge
from scorelm.evaluation.report import Examiner, written
from scorelm.sampling.paths import make_path

BUDGETS = (8, 16, 32, 64, 128, 256)
SCORE = ("uniform", "ramp:1", "blocks:4", "shuffled", "confidence", "entropy", "surest", "bounded", "remask:0.05")
MASKED = ("shuffled", "surest", "bounded", "remask:0.05")
BOUNDS = ("bounded:0.5", "bounded:2", "bounded:8")
LIMITS = ("uniform", "ramp:1", "blocks:4", "random", "blocks:1", "ordered")
TEMPERATURES = (0.7, 0.85, 1.0)
TEXTS, PRICED = 32, 60


def budgets(path: str) -> tuple[int, ...]:
    """Steps to try; a path of jumps needs no more than a text has tokens, unless it takes tokens back."""
    chosen = make_path(path)
    return tuple(steps for steps in BUDGETS if steps <= 64 or chosen.forgets or not chosen.jumps)


def prices(kept: Kept, name: str, lm: ScoreLM) -> None:
    """The price of every path in every number of steps, and in the limit of small ones."""
    texts = heldout(PRICED)
    for path in LIMITS if name == "score" else ("random",):
        kept.get(f"price {name} {path}", lambda path=path: price(lm, texts, path).to_json())
    for path in SCORE if name == "score" else MASKED:
        for steps in budgets(path)[:5] if not make_path(path).forgets else ():
            kept.get(f"price {name} {path} {steps}",
                     lambda path=path, steps=steps: price(lm, texts, path, steps=steps).to_json())  # fmt: skip
    for path in BOUNDS if name == "score" else ():
        kept.get(f"price {name} {path} 256", lambda path=path: price(lm, texts, path, steps=256).to_json())


def quality(kept: Kept, name: str, lm: ScoreLM, examiner: Examiner, seed: int) -> None:
    """Perplexity under the judge and entropy of generated texts; at 16 steps over temperatures too."""
    ways = [(path, steps, 1.0) for path in (SCORE if name == "score" else MASKED) for steps in budgets(path)]
    if name == "score":
        ways += [(path, 256, 1.0) for path in (*BOUNDS, "blocks:1")]
        ways += [(path, 16, t) for path in ("uniform", "confidence", "shuffled", "bounded") for t in TEMPERATURES]
    for path, steps, temperature in ways:

        def point(path: str = path, steps: int = steps, temperature: float = temperature) -> dict[str, float]:
            made = written(
                lm, TEXTS, seed=1000 * seed, path=path, steps=steps, temperature=temperature, top_p=1, precision="auto"
            )
            return {"nfe": made.nfe, "seconds": made.seconds} | examiner.point(made.texts)

        kept.get(f"quality {name} {path} {steps} T{temperature:g} | {seed}", point)


def lines(kept: Kept, kind: str, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Points of a kind by model and path, means over seeds with half of a 95% interval."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, value in kept.values.items():
        words = key.split(" ")
        if words[0] != kind or (kind == "price" and len(words) != 4):
            continue
        name = " ".join(words[1:3])
        if kind == "price":
            found.setdefault(name, []).append({"nfe": value["nfe"], "nats": value["nats_per_token"],
                                               "half": 1.96 * value["stderr_nats_per_token"]})  # fmt: skip
        elif words[4] == "T1" and words[-1] == str(seeds[0]):
            rows = [kept.values.get(f"{key.rpartition(' ')[0]} {seed}") for seed in seeds]
            if all(rows):
                columns = ("nfe", "seconds", "perplexity", "entropy")
                found.setdefault(name, []).append({c: spread([row[c] for row in rows]) for c in columns})
    return found


def style(name: str) -> dict[str, Any]:
    """One colour for a path, dashes for the masked model."""
    model, path = name.split(" ")
    order, single = (*SCORE, *BOUNDS, "blocks:1"), path in (*BOUNDS, "blocks:1")
    drawn = {"color": f"C{order.index(path) % 10}", "linestyle": "--" if model == "masked" else "-", "marker": "o",
             "markersize": 4, "label": path if model == "score" else name}  # fmt: skip
    return drawn | {"linestyle": "none", "marker": "*", "markersize": 7, "label": f"{path} in 256"} if single else drawn


def evaluations(axis: Any) -> None:
    """A logarithmic axis of powers of two."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.spines[["top", "right"]].set_visible(False)


def price_picture(found: dict[str, list[dict[str, Any]]], limits: dict[str, float], target: Path) -> None:
    """Price against evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for name, points in found.items():
        axis.errorbar([p["nfe"] for p in points], [p["nats"] for p in points], **style(name))
    for name, nats in limits.items():
        axis.axhline(nats, color="0.75", linewidth=1, zorder=0)
        axis.annotate(
            name, (1, nats), xycoords=("axes fraction", "data"), fontsize=8, color="0.4", va="bottom", ha="right"
        )
    evaluations(axis)
    axis.set_xlabel("evaluations of the model for a text (grey: limit of small steps, or token by token)")
    axis.set_ylabel("price of held-out text, nats per token")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(target, dpi=130)


def quality_picture(found: dict[str, list[dict[str, Any]]], real: dict[str, float], target: Path) -> None:
    """Perplexity under the judge, and entropy, against evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in found.items():
        nfe = [p["nfe"]["mean"] for p in points]
        perplexity = [p["perplexity"] for p in points]
        left.errorbar(nfe, [p["mean"] for p in perplexity], [p["half"] for p in perplexity], capsize=2, **style(name))
        right.plot(nfe, [p["entropy"]["mean"] for p in points], **style(name))
    for axis, column in ((left, "perplexity"), (right, "entropy")):
        axis.axhline(real[column], color="0.6", linewidth=1)
        evaluations(axis)
        axis.set_xlabel("evaluations of the model for a text")
    left.set_yscale("log")
    left.set_ylabel("perplexity under the judge (grey: real text)")
    right.set_ylabel("entropy of the words in a text, nats (grey: real text)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("score", type=Path)
    parser.add_argument("masked", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    process.prepare()
    kept = Kept("paths.json")
    models = {name: ScoreLM.from_pretrained(getattr(arguments, name)) for name in ("score", "masked")}
    for name, lm in models.items():
        kept.get(f"model {name}", lambda lm=lm: {**lm.config.size._asdict(), **lm.provenance.model_dump()})
        prices(kept, name, lm)
    texts = heldout()
    examiner = Examiner(load_judge(str(arguments.judge)), texts[1::2][:TEXTS], None)
    real = kept.get("real", lambda: examiner.point(texts[0::2][: 3 * TEXTS]))
    for seed in arguments.seeds:
        for name, lm in models.items():
            quality(kept, name, lm, examiner, seed)
    limits = {key.split(" ")[2]: value["nats_per_token"] for key, value in kept.values.items()
              if key.startswith("price score ") and len(key.split(" ")) == 3}  # fmt: skip
    price_picture(lines(kept, "price", arguments.seeds), limits, RESULTS / "paths-price.png")
    quality_picture(lines(kept, "quality", arguments.seeds), real, RESULTS / "paths-quality.png")


if __name__ == "__main__":
    main()

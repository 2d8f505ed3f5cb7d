"""Sampling: every path with every solver at several budgets, for one model: time, evaluations, and how the text is.

    .venv/bin/python benchmarks/sampling.py runs/demo/model    # writes benchmarks/results/sampling.json and .png

Columns: `nats`, the model's own exact left-to-right NLL of what was written, in nats per token (a judge of its own
work, so low values with low `entropy` mean repetition); `entropy`, of the unigram distribution inside a sample, in
nats; `distinct`, different bigrams over all bigrams of the batch (the more text, the fewer); `nfe`, evaluations that
a row took; `seconds` per sequence. `real_text` is 128 held-out texts. Batches of 16, lengths drawn from the model's
histogram.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from runs import RESULTS, heldout
from scorelm import ScoreLM
from scorelm.cli import process
from scorelm.evaluation.likelihood import left_to_right
from scorelm.evaluation.rows import batches
from scorelm.model.prediction import Prediction

PATHS = ("uniform", "ramp:1", "blocks:4", "shuffled", "confidence", "entropy")
SOLVERS = ("posterior", "renoise", "ancestral", "sde", "euler", "heun", "dpmpp_2m")
BUDGETS = (4, 8, 16, 32, 64, 128)
ROWS = 16


@torch.inference_mode()
def own_nll(lm: ScoreLM, rows: list[list[int]]) -> tuple[float, float]:
    """Exact left-to-right NLL in nats per token, `</s>` included, and its standard error over texts."""
    network, sums = lm.loop().network, torch.zeros(len(rows), dtype=torch.float64)
    for batch in batches(rows, lm.device, lm.tokenizer.special):
        sums[batch.index] = left_to_right(lm.objective, network, batch).terms["reconstruction"]
    counts = torch.tensor([len(row) - 1.0 for row in rows], dtype=torch.float64)
    mean = float(sums.sum() / counts.sum())
    error = float((sums - mean * counts).square().sum().sqrt() / counts.sum())
    return mean, error


def quality(lm: ScoreLM, rows: list[list[int]]) -> dict[str, float]:
    """How the text is."""
    nats, error = own_nll(lm, rows)
    entropies = []
    for row in rows:
        counts = Counter(row[1:-1]).values()
        entropies.append(-sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts))
    bigrams = [pair for row in rows for pair in pairwise(row)]
    distinct = len(set(bigrams)) / len(bigrams)
    return {"nats": nats, "nats_stderr": error, "entropy": statistics.mean(entropies), "distinct": distinct}


def measure(lm: ScoreLM, path: str, solver: str, steps: int, length: int | None) -> dict[str, Any]:
    """One batch: quality, evaluations, seconds per sequence, and the share of time outside the denoiser."""
    inside, predict = 0.0, lm.denoiser.predict

    def timed(*inputs: Any) -> Prediction:
        nonlocal inside
        started = time.perf_counter()
        found = predict(*inputs)
        _ = found.logits_NV  # computed when asked for
        inside += time.perf_counter() - started
        return found

    with patch.object(lm.denoiser, "predict", timed):
        started = time.perf_counter()
        samples = lm.generate(n=ROWS, path=path, solver=solver, steps=steps, length=length, temperature=1, top_p=1)
        seconds = time.perf_counter() - started
    nfe = statistics.mean(sample.nfe for sample in samples)
    cost = {"nfe": nfe, "seconds": seconds / ROWS, "overhead": 1 - inside / seconds}
    return {"path": path, "solver": solver, "steps": steps} | cost | quality(lm, [sample.ids for sample in samples])


def picture(results: list[dict[str, Any]], real: dict[str, float], target: Path) -> None:
    """Every run as a point, the default solver of each path as a line, the front of the solvers that keep the law.

    Beside it what the likelihood is worth: the entropy of the words in a text.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    speed, spread = figure.subplots(1, 2, sharey=True)
    for k, path in enumerate(PATHS):
        found = [r for r in results if r["path"] == path]
        for axis, column in ((speed, "nfe"), (spread, "entropy")):
            axis.scatter([r[column] for r in found], [r["nats"] for r in found], s=9, color=f"C{k}", alpha=0.35)
        line = [r for r in found if r["solver"] == "posterior"]
        speed.plot([r["nfe"] for r in line], [r["nats"] for r in line], color=f"C{k}", marker="o", label=path)
        spread.plot([r["entropy"] for r in line], [r["nats"] for r in line], "o", color=f"C{k}")
    front = pareto([r for r in results if r["solver"] in ("posterior", "ancestral")])
    speed.step(*zip(*front, strict=True), where="post", color="black", linewidth=1, label="Pareto front")
    for axis, name in ((speed, "evaluations of the denoiser"), (spread, "entropy of the words in a text, nats")):
        axis.axhline(real["nats"], color="0.6", linewidth=1)
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    spread.axvline(real["entropy"], color="0.6", linewidth=1)
    speed.set_xscale("log", base=2)
    speed.set_ylabel("own NLL, nats per token (grey: real text)")
    speed.set_title("solid: posterior; faint: every other solver; front: posterior and ancestral", fontsize=9)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(target, dpi=130)


def pareto(results: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(evaluations, NLL) of the runs that no run with as few evaluations beats."""
    front: list[tuple[float, float]] = []
    for found in sorted(results, key=lambda r: (r["nfe"], r["nats"])):
        if not front or found["nats"] < front[-1][1]:
            front.append((found["nfe"], found["nats"]))
    return front


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    arguments = parser.parse_args()
    process.prepare()
    lm = ScoreLM.from_pretrained(arguments.model)
    encoded = [ids for ids in map(lm.tokenizer.encode_document, heldout(200)) if len(ids) <= lm.max_length]
    real = quality(lm, encoded[:128])
    results = []
    for path in PATHS:
        for solver in SOLVERS:
            for steps in BUDGETS:
                results.append(measure(lm, path, solver, steps, None))
                line = results[-1]
                print(f"{path:<11} {solver:<10} {steps:>4}  nfe {line['nfe']:6.1f}  {line['seconds']:6.3f} s  "
                      f"nats {line['nats']:.2f} +- {line['nats_stderr']:.2f}  entropy {line['entropy']:.2f}  "
                      f"distinct {line['distinct']:.2f}", flush=True)  # fmt: skip
    report = {
        "command": f"python benchmarks/sampling.py {arguments.model}",
        "model": {**lm.config.size._asdict(), **lm.provenance.model_dump()},
        "real_text": real,
        "results": results,
    }
    (RESULTS / "sampling.json").write_text(json.dumps(report, indent=1) + "\n")
    picture(results, real, RESULTS / "sampling.png")
    print(json.dumps({k: v for k, v in report.items() if k != "results"}, indent=1))


if __name__ == "__main__":
    main()

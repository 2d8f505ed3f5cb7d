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
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorelm import ScoreLM
from scorelm.memory import keep_freed_memory
from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.sampling.generate import Sampler
from scorelm.sampling.options import make_options
from scorelm.text.templates import prompt_template
from scorelm.text.corpus import load_corpus
from scorelm.text.sentencepiece import PAD

PATHS = ("uniform", "ramp:1", "blocks:4", "shuffled", "confidence", "entropy")
SOLVERS = ("posterior", "renoise", "ancestral", "sde", "euler", "heun", "dpmpp_2m")
BUDGETS = (4, 8, 16, 32, 64, 128)
ROWS = 16


@torch.inference_mode()
def own_nll(lm: ScoreLM, rows: list[list[int]]) -> tuple[float, float]:
    """Exact left-to-right NLL in nats per token, `</s>` included, and its standard error over texts."""
    longest = max(map(len, rows))
    ids_BL = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    real_BL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    position_BL = torch.arange(longest).expand_as(ids_BL)

    def twice(t_BL: Tensor) -> Tensor:
        return torch.cat([t_BL, t_BL], 1)

    stream = torch.cat([torch.full_like(ids_BL, CLEAN), torch.full_like(ids_BL, NOISY)], 1)
    layout = Layout(twice(real_BL), twice(position_BL), twice(position_BL), stream)
    noisy_BL = torch.where((position_BL > 0) & (real_BL > 0), math.inf, 0.0)
    sigma = torch.cat([torch.zeros(ids_BL.shape), noisy_BL], 1)
    x = torch.where(sigma[..., None] > 0, 0.0, lm.denoiser.embedding(twice(ids_BL)))
    logits_NV, _, live = lm.denoiser.live(x, sigma, layout)
    nats_N = torch.nn.functional.cross_entropy(logits_NV, twice(ids_BL)[live], reduction="none").double()
    text_N = torch.arange(len(rows))[:, None].expand_as(live)[live]
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, text_N, nats_N)
    counts = torch.bincount(text_N, minlength=len(rows)).double()
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


@torch.inference_mode()
def measure(lm: ScoreLM, path: str, solver: str, steps: int, length: int | None) -> dict[str, Any]:
    """One batch: quality, evaluations, seconds per sequence, and the share of time outside the denoiser."""
    import numpy as np

    how = make_options(path=path, solver=solver, steps=steps)
    templates = [
        prompt_template("", lm.tokenizer, lm.lengths, length, lm.max_length, True, np.random.default_rng(seed))
        for seed in range(ROWS)
    ]
    inside, live = 0.0, lm.denoiser.live

    def timed(*arguments: Any) -> Any:
        nonlocal inside
        started = time.perf_counter()
        result = live(*arguments)
        inside += time.perf_counter() - started
        return result

    lm.denoiser.live = timed  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        *_, last = Sampler(lm.denoiser, lm.schedule, templates, range(ROWS), how).records()
        seconds = time.perf_counter() - started
    finally:
        del lm.denoiser.live
    rows = [ids[:n] for ids, n in zip(last.ids_BL.tolist(), last.length_B.tolist(), strict=True)]
    cost = {"nfe": last.nfe_B.double().mean().item(), "seconds": seconds / ROWS, "overhead": 1 - inside / seconds}
    return {"path": path, "solver": solver, "steps": steps} | cost | quality(lm, rows)


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
    keep_freed_memory()
    lm = ScoreLM.from_pretrained(arguments.model)
    heldout = [text["text"] for text in islice(load_corpus("kjv").heldout, 200)]
    encoded = [ids for ids in map(lm.tokenizer.encode_document, heldout) if len(ids) <= lm.max_length]
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
    target = Path(__file__).parent / "results"
    target.mkdir(exist_ok=True)
    (target / "sampling.json").write_text(json.dumps(report, indent=1) + "\n")
    picture(results, real, target / "sampling.png")
    print(json.dumps({k: v for k, v in report.items() if k != "results"}, indent=1))


if __name__ == "__main__":
    main()

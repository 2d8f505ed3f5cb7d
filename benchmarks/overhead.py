"""Overhead: the share of generation's time that is not the denoiser's, at batch 16, length 64 and 16 steps.

    .venv/bin/python benchmarks/overhead.py             # writes benchmarks/results/overhead.json

A model of the reference size (dim 256, 6 layers, vocabulary 2,048) with random weights, since speed does not depend on
them; float32; medians of 7 batches on each path, with the solver `posterior`.
"""

from __future__ import annotations

import json
import statistics

import torch

from runs import RESULTS, training
from sampling import PATHS, measure
from scorelm import ScoreLM, Tokenizer
from scorelm.cli import process
from scorelm.config.recipe import ModelConfig
from scorelm.noise.schedule import make_schedule


def main() -> None:
    process.prepare()
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(training(), 2048)
    config = ModelConfig(dim=256, layers=6)
    lm = ScoreLM(config, tokenizer, make_schedule("adaptive", config.embedding_dim, 2048), [0] * 64 + [1]).eval()
    for parameter in lm.denoiser.parameters():
        if not parameter.detach().any():  # what starts at zero would leave every path without context
            torch.nn.init.normal_(parameter, std=0.02)
    report = {"command": "python benchmarks/overhead.py", "share_outside_denoiser": {}, "seconds_per_text": {}}
    for path in PATHS:
        runs = [measure(lm, path, "posterior", 16, lm.max_length) for _ in range(8)][1:]
        report["share_outside_denoiser"][path] = statistics.median(run["overhead"] for run in runs)
        report["seconds_per_text"][path] = statistics.median(run["seconds"] for run in runs)
        print(f"{path:<12} {report['share_outside_denoiser'][path]:6.1%}", flush=True)
    (RESULTS / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

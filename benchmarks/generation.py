"""Speed of generation: latency of one text of 64 tokens, throughput of many, against autoregressive peers.

    .venv/bin/python benchmarks/generation.py       # writes benchmarks/results/generation.json, prints a table

Random weights (speed does not depend on them) of dim 256, 6 layers, vocabulary 2,048. `uniform` spends its evaluations
on all positions; `blocks:8` keeps the keys and values of finished blocks, so its evaluations are of 8 positions each.
The peers write token by token with their keys and values kept: this library's autoregressive model in the same trunk,
and `generate` of Hugging Face transformers on a GPT-2 of as many layers and as nearly as many parameters. All in
bfloat16, or in float32 where a model is faster so; interleaved, medians of 5.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from runs import RESULTS, training
from scorelm import ScoreLM, Tokenizer
from scorelm.cli import process
from scorelm.config.recipe import ModelConfig
from scorelm.device import matmul_peak
from scorelm.noise.schedule import make_schedule

LENGTH, BATCHES, EVALUATIONS, BLOCK, ROUNDS = 64, (1, 16, 64), (8, 16, 32, 64), 8, 5
PRECISIONS = ("float32", "bfloat16")


def model(tokenizer: Tokenizer, objective: Any) -> ScoreLM:
    """A model that was not trained, with no weight left at zero."""
    config = ModelConfig(dim=256, layers=6)
    schedule = make_schedule("adaptive", config.embedding_dim, tokenizer.vocab_size)
    lm = ScoreLM(config, tokenizer, schedule, [0] * LENGTH + [1], objective=objective).eval()
    for parameter in lm.denoiser.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)
    return lm


def peer(vocabulary: int) -> Any:
    """A GPT-2 of the same width and depth."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=2 * LENGTH,
        n_embd=256,
        n_layer=6,
        n_head=4,
        bos_token_id=0,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def write(gpt: Any, n: int) -> None:
    """`n` texts of `LENGTH` tokens by a GPT-2, where it is."""
    start = torch.zeros(n, 1, dtype=torch.long, device=gpt.device)
    with torch.inference_mode():
        gpt.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=LENGTH - 1,
            min_new_tokens=LENGTH - 1, pad_token_id=2,
        )  # fmt: skip


def ways(lm: ScoreLM, ar: ScoreLM, gpts: dict[str, Any]) -> dict[str, Callable[[int, str], Any]]:
    """How to write a batch of texts of `LENGTH` tokens, by name."""

    def diffusion(path: str, steps: int) -> Callable[[int, str], Any]:
        return lambda n, precision: lm.generate(n=n, length=LENGTH, path=path, steps=steps, precision=precision)

    found = {f"uniform {k}": diffusion("uniform", k) for k in EVALUATIONS}
    free = LENGTH - 2
    found |= {f"blocks:{BLOCK} {k} a block": diffusion(f"blocks:{BLOCK}", k * -(-free // BLOCK)) for k in (1, 2, 3, 4)}
    found["autoregressive"] = lambda n, precision: ar.generate(n=n, length=LENGTH, precision=precision)

    found["transformers GPT-2"] = lambda n, precision: write(gpts[precision], n)
    return found


def seconds(write: Callable[[int, str], Any], n: int, precision: str) -> float:
    started = time.perf_counter()
    write(n, precision)
    return time.perf_counter() - started


def main() -> None:
    process.prepare()
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(training(), 2048)
    lm, ar, gpt = model(tokenizer, "score"), model(tokenizer, "autoregressive"), peer(2048)
    gpts = {"float32": gpt, "bfloat16": peer(2048).to(torch.bfloat16)}
    writers = ways(lm, ar, gpts)
    times: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        for n in BATCHES:
            for name, write in writers.items():
                for precision in PRECISIONS:
                    took = seconds(write, n, precision)
                    if turn:  # the first warms up
                        times.setdefault(f"{name} | {n} | {precision}", []).append(took)
        print(f"round {turn} of {ROUNDS}", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in writers:
        for n in BATCHES:
            best = min(PRECISIONS, key=lambda p: statistics.median(times[f"{name} | {n} | {p}"]))
            took = statistics.median(times[f"{name} | {n} | {best}"])
            rows[f"{name} | {n}"] = {"seconds": took, "tokens_per_second": n * LENGTH / took, "precision": best}
    result = {
        "command": "python benchmarks/generation.py",
        "parameters": {"score": lm.parameters_count, "GPT-2": gpt.num_parameters()},
        "gemm_peak_gflops": {p: matmul_peak(torch.device("cpu"), getattr(torch, p)) / 1e9 for p in PRECISIONS},
        "threads": torch.get_num_threads(),
        "rows": rows,
    }  # fmt: skip
    (RESULTS / "generation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'tokens/s (ms a batch)':<24}" + "".join(f"{f'batch {n}':>22}" for n in BATCHES))
    for name in writers:
        found = [rows[f"{name} | {n}"] for n in BATCHES]
        print(f"{name:<24}" + "".join(f"{r['tokens_per_second']:>12,.0f} ({1e3 * r['seconds']:>6,.0f})" for r in found))


if __name__ == "__main__":
    main()

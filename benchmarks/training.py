"""Training speed: real tokens/s, model FLOPs utilisation (MFU), memory, where the time goes, and how it grows.

    .venv/bin/python benchmarks/training.py      # about 25 minutes on 2 cores

Writes benchmarks/results/training.json, each figure as soon as it is there, and training.png; delete the JSON to
measure anew. MFU is useful FLOPs (6 per trunk weight and token, attention inside documents, vocabulary products where
the loss needs them; padding not counted) over the fastest square product in the same precision and round. Kinds
of one size and length are interleaved; medians of 5 rounds. The peer is an autoregressive loop in the manner of nanoGPT
on PyTorch's own `nn.TransformerEncoderLayer`, whose rows are text without gaps.
"""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt import GPT
from runs import RESULTS, Kept, training
from scorelm.cli import process
from scorelm.config.recipe import ModelConfig, NoiseConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.device import matmul_peak
from scorelm.text.packing import packed_rows, packing_efficiency
from scorelm.training.data import TrainingData, prepare
from scorelm.training.step import draw_step
from scorelm.training.trainer import Trainer

ROUNDS = 5
LAYERS = {128: 4, 256: 6, 512: 8, 768: 12}
POSITIONS = {128: 4096, 256: 4096, 512: 2048, 768: 1024}
"""Of a step, by width."""
LENGTHS, LONG = (64, 128, 512), (64, 128, 256, 512, 1024, 2048)
BATCHES = (4, 8, 16, 32, 64, 128, 256)
CPU = torch.device("cpu")
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": (
        "aten::bmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "optimiser and averages": ("aten::_fused_adamw_", "aten::lerp_", "aten::_foreach_lerp_"),
}


class Padded:
    """Batches without packing: one document, cut at the row's length, in each row."""

    def __init__(self, data: TrainingData, rows: int, length: int) -> None:
        self.documents, self.shape, self.next = data.documents.train, (rows, length), 0
        self.pad = data.tokenizer.special.pad

    def __next__(self) -> dict[str, np.ndarray]:
        batch = {name: np.zeros(self.shape, np.int64) for name in ("ids", "segment", "position")}
        batch["ids"] += self.pad
        for row in range(self.shape[0]):
            ids = self.documents[self.next % len(self.documents)]["ids"][: self.shape[1]]
            self.next += 1
            batch["ids"][row, : len(ids)] = ids
            batch["segment"][row, : len(ids)] = 1
            batch["position"][row, : len(ids)] = np.arange(len(ids))
        return batch


def trainer(
    data: TrainingData,
    dim: int,
    length: int,
    streams: Any = 1,
    positions: int | None = None,
    padded: bool = False,
    film: bool = False,
    **options: Any,
) -> Trainer:
    """A run on rows that hold `positions` in all of its streams."""
    rows = max(1, (positions or POSITIONS[dim]) // length // streams)
    recipe = Recipe(
        data=DataConfig(max_length=length),
        model=ModelConfig(dim=dim, layers=LAYERS[dim], noise_conditioning="film" if film else "none"),
        noise=NoiseConfig(streams=streams),
        training=TrainingConfig(**{"steps": 10**6, "self_conditioning": 0.0, "rows": rows} | options),
    )
    run = Trainer(recipe, data)
    if padded:
        run.shards[0].batches = Padded(data, rows, length)
    return run


def speed(run: Trainer | GPT, steps: int) -> dict[str, float]:
    """Of a few steps; and of the fastest square product in the same precision just before them."""
    peak = matmul_peak(CPU, run.dtype if isinstance(run, GPT) else run.learner.dtype)
    before, started = done(run), time.perf_counter()
    for _ in range(steps):
        run.step()
    seconds = time.perf_counter() - started
    tokens, flops = (now - then for now, then in zip(done(run), before, strict=True))
    return {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / peak, "gemm_peak": peak}


def done(run: Trainer | GPT) -> tuple[float, float]:
    """Real tokens and useful FLOPs so far."""
    if isinstance(run, GPT):
        return run.tokens, run.tokens * run.flops_per_token
    sums = run.window.read()
    return float(sums.tokens), float(sums.flops)


def measured(runs: dict[str, Any], steps: int) -> dict[str, Any]:
    """Interleaved rounds of a few steps of every kind."""
    for run in runs.values():
        speed(run, 2)
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in runs}
    for _ in range(ROUNDS):
        for kind, run in runs.items():
            rounds[kind].append(speed(run, steps))
    return {
        kind: {name: statistics.median(r[name] for r in found) for name in found[0]}
        | {"tokens_per_second_all": [round(r["tokens_per_second"]) for r in found]}
        for kind, found in rounds.items()
    }


def shares(run: Trainer) -> dict[str, float]:
    """Share of a step's time by kind of operation, and of drawing its data and noise."""
    with torch.profiler.profile() as trace:
        run.step()
    times = {event.key: event.self_cpu_time_total for event in trace.key_averages()}
    total = sum(times.values())
    found = {group: sum(times.get(name, 0) for name in names) / total for group, names in GROUPS.items()}
    found["elementwise, softmax, copies"] = 1 - sum(found.values())
    draws, whole = [], []
    for _ in range(3):
        started = time.perf_counter()
        draw_step(run.learner, run.shards, run.schedule, run.progress.step)
        drawn = time.perf_counter()
        run.step()
        draws.append(drawn - started)
        whole.append(time.perf_counter() - drawn)
    return found | {"data and noise, of a step": statistics.median(draws) / statistics.median(whole)}


def cell(data: TrainingData, dim: int, length: int) -> dict[str, Any]:
    """All kinds of one size and length."""
    runs: dict[str, Any] = {
        "1 stream": trainer(data, dim, length),
        "2 streams": trainer(data, dim, length, 2),
        "1 stream, padded": trainer(data, dim, length, padded=True),
        "peer": GPT(dim, LAYERS[dim], length, POSITIONS[dim] // length, data),
    }
    if (dim, length) == (256, 64):  # the size of the reference project, and the choices that it made, in this code
        runs |= {
            "1 stream, compiled": trainer(data, dim, length, compile=True),
            "1 stream, self-conditioning in every step": trainer(data, dim, length, self_conditioning=1.0),
            "1 stream, float32": trainer(data, dim, length, precision="float32"),
            "1 stream, padded, float32, FiLM": trainer(data, dim, length, padded=True, film=True, precision="float32"),
        }
    found = measured(runs, {128: 8, 256: 3, 512: 2, 768: 1}[dim])
    for kind in ("1 stream", "2 streams"):
        found[kind]["share_of_time"] = shares(runs[kind])
    return found


def peak_memory(dim: int, length: int, text: str) -> float:
    """Most memory that three steps take beyond what was held before them, MB, in a process of its own."""
    command = [sys.executable, __file__, "--memory", str(dim), str(length), text]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def memory(dim: int, length: int, text: str) -> None:
    """What `peak_memory` runs."""
    run = trainer(load(text, length), dim, length)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most that was held is counted from here
    before = held("VmRSS")
    for _ in range(3):
        run.step()
    print(held("VmHWM") - before)


def held(name: str) -> float:
    """A figure of this process's memory, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def load(text: str, length: int) -> TrainingData:
    """The embedded corpus, or the same text in documents of 80 verses, which are longer than a row."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "long.txt"
        verses = training()
        chapters = [" ".join(verses[k : k + 80]) for k in range(0, len(verses), 80)]
        source.write_text("\n".join([verses[0], *chapters]), "utf-8")  # where every line is too long, it is refused
        config = DataConfig(source="kjv" if text == "verses" else str(source), max_length=length)
        return prepare(config, Path(folder), False, lambda line: print(line, file=sys.stderr))


def elementwise_ms() -> float:
    """Time to add two arrays of 33 MB."""
    a = torch.randn(4096, 2048)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        a + a
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def machine() -> dict[str, Any]:
    """Where this was measured, and what it can do at best."""
    before = elementwise_ms()
    process.keep_freed_memory()
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name"),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "gemm_peak_gflops": {name: matmul_peak(CPU, getattr(torch, name)) / 1e9 for name in ("float32", "bfloat16")},
        "add_33MB_ms": {"default malloc": before, "freed memory kept": elementwise_ms()},
    }  # fmt: skip


def picture(values: dict[str, Any], target: Path) -> None:
    """MFU by size and length beside the peer's; speed and memory against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = [f"{dim} x {length}" for dim in LAYERS for length in LENGTHS]
    for k, kind in enumerate(("1 stream", "2 streams", "1 stream, padded", "peer")):
        heights = [100 * values[f"size {name}"][kind]["mfu"] for name in names]
        left.bar(np.arange(len(names)) + 0.2 * (k - 1.5), heights, 0.2, label=kind.replace("peer", "peer (GPT)"))
    left.set_xticks(range(len(names)), names, rotation=90)
    left.set(ylabel="MFU, %", xlabel="width x length", ylim=(0, 80))
    left.legend(frameon=False, fontsize=8, loc="upper left")
    for text in ("verses", "long"):
        label = "short documents (verses)" if text == "verses" else "documents longer than a row"
        speed = [values[f"length {length}, {text}"]["1 stream"]["tokens_per_second"] for length in LONG]
        middle.plot(LONG, speed, "o-", label=label)
        right.plot(LONG, [values[f"memory {length}, {text}"] for length in LONG], "o-", label=label)
    middle.set(ylabel="real tokens/s, width 256", xlabel="length", xscale="log", ylim=(0, 8000))
    right.set(ylabel="memory of a step, MB", xlabel="length", xscale="log", ylim=(0, 1000))
    for axes in (middle, right):
        axes.set_xticks(LONG, [str(length) for length in LONG])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=130)


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        process.bound_kernel_caches()
        memory(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        return
    kept = Kept("training.json")
    kept.get("machine", machine)
    process.prepare()
    for length in LENGTHS:
        data = load("verses", length)
        for dim in LAYERS:
            kept.get(f"size {dim} x {length}", lambda: cell(data, dim, length))  # noqa: B023
            kept.get(f"memory of size {dim} x {length}", lambda: peak_memory(dim, length, "verses"))  # noqa: B023
    for text in ("verses", "long"):
        for length in LONG:
            data = load(text, length)
            kept.get(f"length {length}, {text}", lambda: measured({"1 stream": trainer(data, 256, length)}, 3))  # noqa: B023
            kept.get(f"memory {length}, {text}", lambda: peak_memory(256, length, text))  # noqa: B023
    data = load("verses", 64)
    runs = {f"{rows} rows": trainer(data, 256, 64, positions=64 * rows) for rows in BATCHES}
    kept.get("batch", lambda: measured(runs, 2))
    for length in (64, 128, 256):
        packed = packed_rows(
            data.documents.train, max_length=length, rows=32, pad=data.tokenizer.special.pad, seed=0, epochs=1
        )
        batches = islice(packed, 300)
        kept.get(f"packing {length}", lambda: statistics.mean(packing_efficiency(batch) for batch in batches))  # noqa: B023
    picture(kept.values, RESULTS / "training.png")
    print(json.dumps(kept.values, indent=1))


if __name__ == "__main__":
    main()

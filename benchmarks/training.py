"""Training speed: real tokens/s and model FLOPs utilisation at the reference's size, with a profile, and packing.

    .venv/bin/python benchmarks/training.py        # about 3 minutes on 2 cores; writes benchmarks/results/training.json

MFU is useful FLOPs (6 per trunk weight and token, attention, vocabulary products at live positions; padding not
counted) over the fastest square matrix product measured in the same run. Variants are interleaved; medians of 7.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from scorelm.config import DataConfig, ModelConfig, NoiseConfig, Recipe, TrainingConfig
from scorelm.device import matmul_peak
from scorelm.memory import keep_freed_memory
from scorelm.text.packing import packed_rows, packing_efficiency
from scorelm.text.tokenizer import PAD
from scorelm.training.data import TrainingData, prepare
from scorelm.training.trainer import Trainer

ROUNDS, STEPS = 7, 3
KINDS = ("1 stream", "2 streams", "1 stream, padded, float32, FiLM")
"""The last has the choices of the reference project, in this code."""
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention products": ("aten::bmm", "aten::baddbmm"),
    "optimiser and averages": ("aten::_fused_adamw_", "aten::lerp_", "aten::_foreach_lerp_"),
}


class Padded:
    """Batches without packing: one document, cut at the row's length, in each row."""

    def __init__(self, data: TrainingData, rows: int, length: int) -> None:
        self.documents, self.shape, self.next = data.documents.train, (rows, length), 0

    def __next__(self) -> dict[str, np.ndarray]:
        batch = {name: np.zeros(self.shape, np.int64) for name in ("ids", "segment", "position")}
        batch["ids"] += PAD
        for row in range(self.shape[0]):
            ids = self.documents[self.next]["ids"][: self.shape[1]]
            self.next += 1
            batch["ids"][row, : len(ids)] = ids
            batch["segment"][row, : len(ids)] = 1
            batch["position"][row, : len(ids)] = np.arange(len(ids))
        return batch


def trainer(kind: str, data: TrainingData, out: Path) -> Trainer:
    """A run at the reference's size, self-conditioning off; every kind takes 4,096 positions a step."""
    streams: Literal[1, 2] = 2 if kind == "2 streams" else 1
    plain = kind == "1 stream, padded, float32, FiLM"
    recipe = Recipe(
        model=ModelConfig(dim=256, layers=6, noise_conditioning="film" if plain else "none"),
        noise=NoiseConfig(streams=streams),
        training=TrainingConfig(
            steps=10**6, self_conditioning=0.0, rows=64 // streams, precision="float32" if plain else "auto"
        ),
    )
    run = Trainer(recipe, out, data)
    if plain:
        run.batches = Padded(data, 64, recipe.data.max_length)
    return run


def measure(run: Trainer, peak: float) -> dict[str, float]:
    """A few steps: real tokens/s and MFU."""
    for _ in range(STEPS):
        run.train_step()
    line = run.metrics(peak)
    return {"tokens_per_second": line["tokens_per_second"], "mfu": line["mfu"]}


def profile(run: Trainer) -> dict[str, float]:
    """Share of a step's time by kind of operation."""
    with torch.profiler.profile() as trace:
        run.train_step()
    times = {event.key: event.self_cpu_time_total for event in trace.key_averages()}
    total = sum(times.values())
    shares = {group: sum(times.get(name, 0) for name in names) / total for group, names in GROUPS.items()}
    return shares | {"elementwise, softmax, copies": 1 - sum(shares.values())}


def elementwise_ms() -> float:
    """Time to add two arrays of 33 MB."""
    a = torch.randn(4096, 2048)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        a + a
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def main() -> None:
    before = elementwise_ms()
    keep_freed_memory()
    after = elementwise_ms()
    cpu, peaks = torch.device("cpu"), {}
    for dtype in (torch.float32, torch.bfloat16):
        peaks[str(dtype).removeprefix("torch.")] = matmul_peak(cpu, dtype) / 1e9
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(DataConfig(), Path(folder), False, lambda text: print(text, file=sys.stderr))
        runs = {kind: trainer(kind, data, Path(folder)) for kind in KINDS}
        for run in runs.values():
            measure(run, 1.0)
        rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in runs}
        for _ in range(ROUNDS):
            for kind, run in runs.items():
                rounds[kind].append(measure(run, matmul_peak(run.device, run.dtype)))
        shares = {kind: profile(run) for kind, run in runs.items()}
    packing = {}
    for length in (64, 128, 256):
        batches = islice(packed_rows(data.documents.train, max_length=length, rows=32, seed=0, epochs=1), 300)
        packing[length] = statistics.mean(packing_efficiency(batch) for batch in batches)
    result = {
        "command": "python benchmarks/training.py",
        "machine": {"processor": torch.cpu.get_capabilities().get("cpu_name"), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "gemm_peak_gflops": peaks,
        "add_33MB_ms": {"default malloc": before, "freed memory kept": after},
        "size": "dim 256, 6 layers, length 64, vocabulary 2048, self-conditioning off",
        "training": {
            kind: {
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in rounds[kind]),
                "tokens_per_second_all": [round(r["tokens_per_second"]) for r in rounds[kind]],
                "mfu": statistics.median(r["mfu"] for r in rounds[kind]),
                "share_of_time": shares[kind],
            }
            for kind in rounds
        },
        "packing_efficiency": packing,
    }  # fmt: skip
    target = Path(__file__).parent / "results" / "training.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""What a run with a billion parameters on 64 H100s needs, computed; and the formulas against what a CPU can measure.

    .venv/bin/python benchmarks/scaling.py        # about 2 minutes on 2 cores; writes benchmarks/results/scaling.json

Computed for the 1B configuration below and the recipes of published sizes. Measured: parameter counts, bytes that real
DDP and FSDP2 steps communicate and hold on 1, 2 and 4 gloo processes, bytes kept for the backward pass, packing.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import collectives
from runs import RESULTS
from scorelm import Tokenizer
from scorelm.config.recipe import ModelConfig, NoiseConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.config.toml import load_recipe
from scorelm.model.denoiser import Denoiser
from scorelm.model.prediction import CHUNK_ON_GPU
from scorelm.text.packing import packed_rows
from scorelm.training.data import prepare

PEAK, MEMORY = 989e12, 80e9  # FLOP/s of dense bfloat16 and bytes: NVIDIA H100 SXM datasheet
NVLINK, NETWORK, NODE = 450e9, 50e9, 8  # bytes/s of a GPU, one way: the same, and 400 Gb/s a GPU in a DGX H100
STORAGE = 5e9  # bytes/s of the file system, assumed
MFUS = (0.3, 0.4, 0.5)
BILLION = Recipe(
    data=DataConfig(vocab_size=32_768, max_length=1_024),
    model=ModelConfig(dim=1_536, layers=32, heads=12),
    training=TrainingConfig(rows=8, accumulation=64, steps=40_000),
)


@dataclass(frozen=True)
class Run:
    """A recipe on `world` GPUs, its global batch (rows times accumulation) shared among them."""

    name: str
    recipe: Recipe
    world: int
    kind: str

    @property
    def rounds(self) -> int:
        """Batches that each process adds up for a step."""
        training = self.recipe.training
        return max(1, training.accumulation // self.world)

    @property
    def positions(self) -> int:
        """Positions of one process's batch that hold a token; the trunk sees them once a stream."""
        return self.recipe.training.rows * self.recipe.data.max_length


def parameters(config: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Parameters of the trunk's blocks and of the rest, by formula."""
    dim, layers, _, hidden = config.size
    blocks = layers * (4 * dim**2 + 3 * dim * hidden)
    return blocks, 2 * vocab_size * dim + config.embedding_dim * (vocab_size + dim) + vocab_size


def on_meta(recipe: Recipe) -> Denoiser:
    """The model without storage."""
    with torch.device("meta"):
        return Denoiser(recipe.model, recipe.data.vocab_size)


def shares(recipe: Recipe) -> tuple[float, float]:
    """Shares of a row's positions that have logits, and that have some evidence, as training draws them.

    One document a row.
    """
    draw = collectives.drawn(recipe.data.max_length, 2_000, recipe.data.vocab_size, recipe.noise, seed=0)
    positions = 2_000 * recipe.data.max_length
    return float(draw.live) / positions, float(draw.noisy) / positions


def flops_per_token(recipe: Recipe, live: float, noisy: float) -> float:
    """Useful FLOPs of training for each real token, averaged over steps with and without a self-conditioning pass.

    A step needs three times its forward pass, and once more with a self-conditioning pass.
    """
    tokens = 1_000 * recipe.data.max_length
    streams, pairs = recipe.noise.streams, tokens * recipe.data.max_length
    forward = on_meta(recipe).flops(streams * tokens, streams * pairs, round(noisy * tokens), round(live * tokens))
    return forward * (3 + recipe.training.self_conditioning) / tokens


def state_bytes(count: int, averages: int, world: int) -> float:
    """fp32 weights, gradients, two AdamW moments and weight averages, sharded over `world`."""
    return 4 * count * (4 + averages) / world


def activation_bytes(config: ModelConfig, rows: int, length: int, streams: int, live: int) -> float:
    """What autocast to bfloat16 keeps for the backward pass: per layer and position, and per live position.

    A layer keeps, at each position, two normalised inputs (2 D bytes each), queries, keys and values (6 D), turned
    and normalised queries and keys (4 D), the attention's output (2 D) and SwiGLU's four intermediates (8 hidden); and
    scales of the norms and log-partition functions (8 + 12 heads). The last norm and the rotation are kept once. A live
    position keeps the trunk's output (2 D) and two embeddings in float32 (8 E): what has the vocabulary's size is
    computed again, chunk by chunk.
    """
    dim, layers, heads, hidden = config.size
    layer = 16 * dim + 8 * hidden + 8 + 12 * heads
    once = 2 * dim + 4 * dim / heads
    return rows * streams * length * (layers * layer + once) + live * (2 * dim + 8 * config.embedding_dim)


def mask_bytes(layers: int, rows: int, seen: int) -> int:
    """What each layer keeps besides with the fused attention of a CPU, its mask as a bias; FlexAttention has none."""
    return 2 * layers * rows * seen**2


def working_bytes(run: Run) -> float:
    """Unsharded copies that exist for a while.

    FSDP: two blocks in bfloat16 (one computes, one is fetched), one block's gradients in bfloat16 and as the fp32 input
    of its reduce-scatter, and the rest of the model with its gradients in fp32 and copied by autocast to bfloat16.
    DDP: autocast's copy of every weight.
    """
    blocks, rest = parameters(run.recipe.model, run.recipe.data.vocab_size)
    if run.kind == "ddp":
        return 2.0 * (blocks + rest)
    return (2 * 2 + 2 + 4) * blocks / run.recipe.model.size.layers + (4 + 4 + 2) * rest


def memory(run: Run, live: float) -> dict[str, float]:
    """GB of one GPU at the fullest moment, the end of the forward pass, where the loss works on its first chunk.

    For each of the chunk's numbers it holds, forward and backward, four arrays in fp32 and two in bfloat16.
    """
    recipe = run.recipe
    vocab, length, rows = recipe.data.vocab_size, recipe.data.max_length, recipe.training.rows
    shards = run.world if run.kind == "fsdp" else 1
    count, alive = sum(parameters(recipe.model, vocab)), round(live * run.positions)
    parts = {
        "state": state_bytes(count, len(recipe.training.ema), shards),
        "unsharded": working_bytes(run),
        "activations": activation_bytes(recipe.model, rows, length, recipe.noise.streams, alive),
        "loss": 20 * min(CHUNK_ON_GPU, vocab * alive),
    }
    return {name: size / 1e9 for name, size in parts.items()} | {"total": sum(parts.values()) / 1e9}


def payloads(blocks: int, rest: int, layers: int, kind: str, world: int, first_pass: bool) -> dict[str, float]:
    """Bytes of the tensors that a step's collectives put together or reduce, for one batch.

    FSDP2 gathers the blocks (bfloat16) before each pass forward and once backward, and the rest (fp32) once; it reduces
    fp32 gradients. After a self-conditioning pass it also fetches the last block once more than is used, since
    it prefetches by the order of all passes forward.
    """
    if kind == "ddp":
        return {"all_reduce": 4.0 * (blocks + rest)}
    if world == 1:
        return {}
    gathered = blocks * (3 + 1 / layers if first_pass else 2)
    return {"all_gather": 2 * gathered + 4 * rest, "reduce_scatter": 4.0 * (blocks + rest)}


def wire(payload: dict[str, float], world: int, gloo: bool = False) -> float:
    """Bytes that a rank sends in ring algorithms; gloo does a reduce-scatter as an all-reduce."""
    once = (world - 1) / world
    rounds = {"all_gather": once, "reduce_scatter": once * (2 if gloo else 1), "all_reduce": 2 * once}
    return sum(rounds[name] * size for name, size in payload.items())


def sent_per_step(run: Run) -> float:
    """Bytes that a rank sends in a mean step; FSDP repeats its collectives for every batch, DDP does not."""
    recipe = run.recipe
    sizes = (*parameters(recipe.model, recipe.data.vocab_size), recipe.model.size.layers, run.kind, run.world)
    share = recipe.training.self_conditioning
    mean = sum(w * wire(payloads(*sizes, first), run.world) for w, first in ((1 - share, False), (share, True)))
    return mean * (run.rounds if run.kind == "fsdp" else 1)


def computed(run: Run) -> dict[str, Any]:
    """All that follows from the configuration and the stated hardware."""
    live, noisy = shares(run.recipe)
    count = sum(parameters(run.recipe.model, run.recipe.data.vocab_size))
    per_token, step_tokens = flops_per_token(run.recipe, live, noisy), run.positions * run.rounds * run.world
    checkpoint, sent = state_bytes(count, len(run.recipe.training.ema), 1) - 4 * count, sent_per_step(run)
    link = NVLINK if run.world <= NODE else NETWORK
    speeds = {}
    for mfu in MFUS:
        speed = run.world * PEAK * mfu / per_token
        speeds[f"{mfu:g}"] = {
            "tokens_per_second": speed,
            "tokens_per_second_per_rank": speed / run.world,
            "step_seconds": step_tokens / speed,
            "days": (run.recipe.training.steps or 0) * step_tokens / speed / 86_400,
        }
    return {
        "gpus": run.world, "kind": run.kind, "parameters": count, "rows": run.recipe.training.rows,
        "rounds": run.rounds, "tokens_per_step": step_tokens, "steps": run.recipe.training.steps,
        "live_share": live, "noisy_share": noisy, "flops_per_token": per_token, "memory_GB": memory(run, live),
        "at_mfu": speeds,
        "sent_GB_per_rank_and_step": sent / 1e9, "communication_seconds": sent / link,
        "checkpoint_GB": checkpoint / 1e9, "checkpoint_seconds": checkpoint / STORAGE,
    }  # fmt: skip


def against_formula() -> list[dict[str, Any]]:
    """Real steps of a small model: payload, bytes sent and bytes held, each with what the formulas say."""
    blocks, rest = parameters(collectives.SIZE, collectives.VOCAB)
    layers, averages, report = collectives.SIZE.size.layers, len(TrainingConfig().ema), []
    for kind in ("ddp", "fsdp"):
        for world in (1, 2, 4):
            found = collectives.measure(world, kind)
            shards = world if kind == "fsdp" else 1
            found["state formula"] = state_bytes(blocks + rest, averages, shards)
            for name, first_pass in (("with first pass", True), ("without", False)):
                expected = payloads(blocks, rest, layers, kind, world, first_pass)
                found[name] |= {"payload formula": expected, "wire formula": wire(expected, world, gloo=True)}
            report.append(found)
            print(json.dumps(found), flush=True)
    return report


def activations_against_formula() -> list[dict[str, float]]:
    """Bytes that the real loss keeps for the backward pass on a CPU, with what the formula says."""
    report = []
    for layers, vocab_size in ((2, 1_001), (6, 1_001), (2, 4_001)):
        config = ModelConfig(dim=128, layers=layers, heads=2)
        draw = collectives.drawn(160, 2, vocab_size, NoiseConfig(), seed=0)
        kept = collectives.saved_for_backward(config, vocab_size, draw)
        formula = activation_bytes(config, 2, 160, 2, int(draw.live)) + mask_bytes(layers, 2, 320)
        report.append({"layers": layers, "vocab_size": vocab_size, "measured": kept, "formula": formula})
    return report


def data_speed(length: int) -> dict[str, float]:
    """Tokens/s of one process that packs the embedded corpus and documents as long as a row, or that draws noise."""
    with tempfile.TemporaryDirectory() as folder:
        verses = prepare(DataConfig(max_length=length), Path(folder), False, print).documents.train
        ids = np.concatenate([np.asarray(document, np.int64) for document in verses["ids"]])
        long = [{"ids": ids[k : k + length]} for k in range(0, len(ids) - length, length)]
        speeds = {}
        for name, documents in {"packing verses": verses, "packing documents of a row": long}.items():
            batches = iter(packed_rows(documents, max_length=length, rows=8, pad=Tokenizer.special.pad, seed=0))
            next(batches)
            started, tokens = time.perf_counter(), 0
            for batch in islice(batches, 250):
                tokens += int((batch["segment"] > 0).sum())
            speeds[name] = tokens / (time.perf_counter() - started)
    started = time.perf_counter()
    for seed in range(20):
        collectives.drawn(length, 8, 2_048, NoiseConfig(), seed)
    return speeds | {"drawing noise": 20 * 8 * length / (time.perf_counter() - started)}


def main() -> None:
    runs = [Run("1b", BILLION, 64, "fsdp"), Run("1b", BILLION, 64, "ddp")]
    runs += [Run(name, load_recipe(name), 8, "ddp") for name in ("text8", "lm1b", "owt-small")]
    counts = {run.name: sum(p.numel() for p in on_meta(run.recipe).parameters()) for run in runs}
    result = {
        "command": "python benchmarks/scaling.py",
        "assumed": {
            "peak_flops": PEAK, "memory_bytes": MEMORY, "nvlink_bytes_per_second": NVLINK,
            "network_bytes_per_second": NETWORK, "storage_bytes_per_second": STORAGE,
        },
        "computed": {f"{run.name} {run.kind}": computed(run) for run in runs},
        "measured": {
            "parameters_on_meta": counts,
            "versions": {"torch": torch.__version__},
            "data_tokens_per_second": data_speed(BILLION.data.max_length),
            "kept_for_backward": activations_against_formula(),
            "steps": against_formula(),
        },
    }  # fmt: skip
    (RESULTS / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

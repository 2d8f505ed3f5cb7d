"""Real training steps of a small model under DDP and FSDP2 on gloo processes: bytes communicated and bytes held.

Used by ``scaling.py``. A collective's payload is its largest tensor; what crosses the wire is what the process wrote.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scorelm import Tokenizer
from scorelm.config.recipe import ModelConfig, NoiseConfig, TrainingConfig
from scorelm.model.denoiser import Denoiser
from scorelm.noise.schedule import Schedule, make_schedule
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch, Draw
from scorelm.parallel import split
from scorelm.training.step import Loss

NAMES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
VOCAB, ROWS, LENGTH = 1_001, 2, 64
SCORE, SPECIAL = OBJECTIVES["score"], Tokenizer.special
SIZE = ModelConfig(dim=64, layers=4)


class CountCollectives(TorchDispatchMode):
    """Adds up the payload of every collective, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.overloadpacket.__name__ in NAMES:
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.payload[NAMES[func.overloadpacket.__name__]] += max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def schedule(vocab_size: int = VOCAB) -> Schedule:
    """That training begins with."""
    return make_schedule("adaptive", 32, vocab_size)


def drawn(length: int, rows: int, vocab_size: int, noise: NoiseConfig, seed: int) -> Draw:
    """Rows of one document of random tokens each, with the noise that training draws for them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab_size, (rows, length), generator=rng)
    ids[:, 0] = SPECIAL.bos
    batch = Batch(ids, torch.ones_like(ids), torch.arange(length).expand(rows, -1))
    random = SCORE.random(batch, noise, rng)
    return SCORE.draw(batch, noise, schedule(vocab_size), SPECIAL, random).with_noise(32, rng)


def loss_of(model: nn.Module, draw: Draw, first_pass: bool) -> Tensor:
    """The loss of a drawn batch."""
    outcome = model(draw, schedule(), TrainingConfig(), live=draw.live, self_conditioned=first_pass)
    loss: Tensor = outcome.loss
    return loss


def spread(denoiser: Denoiser, kind: str) -> nn.Module:
    """The loss of a model under DDP or FSDP2 as in training, in a single process too."""
    loss = Loss(denoiser, SCORE, SPECIAL)
    if kind == "ddp":
        return DistributedDataParallel(loss)
    split(loss, denoiser.backbone.layers, torch.bfloat16)
    return loss


def written() -> int:
    """Bytes that this process has written, to sockets above all (Linux)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def held(tensor: Tensor) -> int:
    """Bytes of a tensor, or of this rank's shard of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def step(model: nn.Module, optimizer: torch.optim.Optimizer, draw: Draw, first_pass: bool) -> dict[str, Any]:
    """One optimiser step: payloads by collective, bytes written meanwhile and bytes of gradients."""
    before, count = written(), CountCollectives()
    with count:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, draw, first_pass)
        loss.backward()
    dist.barrier()
    wire = written() - before
    gradients = sum(held(p.grad) for p in model.parameters() if p.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    return {"payload": dict(count.payload), "wire": wire, "gradients": gradients}


def work(rank: int, world: int, kind: str, folder: str) -> None:
    """One rank: a step with and a step without a self-conditioning pass; every rank writes what it found."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = spread(Denoiser(SIZE, VOCAB), kind)
    optimizer = torch.optim.AdamW(model.parameters())
    averages = [[p.detach().clone() for p in model.parameters()] for _ in TrainingConfig().ema]
    draw = drawn(LENGTH, ROWS, VOCAB, NoiseConfig(), seed=rank)
    step(model, optimizer, draw, True)  # the first step also sets DDP's buckets up
    found = {"with first pass": step(model, optimizer, draw, True), "without": step(model, optimizer, draw, False)}
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    state = [*model.parameters(), *moments, *(t for average in averages for t in average)]
    total = sum(held(t) for t in state) + found["with first pass"]["gradients"]
    Path(folder, f"{rank}.json").write_text(json.dumps(found | {"state": total}))
    dist.destroy_process_group()


def measure(world: int, kind: str) -> dict[str, Any]:
    """The rank that wrote, held or communicated most, of `world` processes on the loopback interface."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, kind, folder), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    found: dict[str, Any] = {"world": world, "kind": kind, "state": max(rank["state"] for rank in ranks)}
    for step_kind in ("with first pass", "without"):
        found[step_kind] = {
            "payload": ranks[0][step_kind]["payload"],
            "wire": max(rank[step_kind]["wire"] for rank in ranks),
        }
    return found


def saved_for_backward(config: ModelConfig, vocab_size: int, draw: Draw) -> int:
    """Bytes that the loss of a batch keeps for the backward pass under autocast, weights not counted.

    As for a large vocabulary and long rows: in chunks of 50 positions and with fused attention.
    """
    denoiser = Denoiser(config, vocab_size)
    weights = {p.numel() for p in denoiser.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        patch("scorelm.model.prediction.CHUNK", 50 * vocab_size), patch("scorelm.model.attention.SHORT", 0),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16),
    ):  # fmt: skip
        loss = loss_of(Loss(denoiser, SCORE, SPECIAL), draw, False)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return total

"""Many processes as one trainer: what a rank is, how a model is spread over ranks, and what is summed over them.

Launch with ``torchrun --nproc-per-node N -m scorelm train ...``; in a single process every function here does nothing.
DDP copies the model to each rank, FSDP2 (`fully_shard`, arXiv 2304.11277) splits its weights, gradients and moments
among them. Their engines are imported where they are used, so that what does not train starts fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of the `world` that were launched together."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor of any shape, put in its place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank; each must be picklable."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def share(self, value: Any) -> Any:
        """The main rank's value, on every rank; it must be picklable."""
        shared = [value]
        if self.world > 1:
            dist.broadcast_object_list(shared)
        return shared[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on the main rank first, and then on the others, which find what it has left."""
        if not self.main:
            dist.barrier()
        try:
            yield
        finally:
            if self.main and self.world > 1:
                dist.barrier()

    def part(self, count: int) -> slice:
        """Which of `count` things are this rank's; no rank has more than one more than another."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def were_launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def were_restarted() -> bool:
    """Whether torchrun has started these processes again after one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def launched() -> Iterator[Ranks]:
    """The process group that torchrun's environment describes; `ALONE` where there is none.

    Ranks that are started again find the keys of those before them in torchrun's store, hence the prefix.
    """
    if not were_launched():
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", store=store, rank=rank, world_size=world)
    try:
        yield Ranks(rank, world)
    finally:
        dist.destroy_process_group()


def replicate(module: nn.Module, ranks: Ranks, unused: bool) -> nn.Module:
    """What to call instead of `module`, whose weights every rank has, so that gradients are means over ranks (DDP).

    Args:
        module: computes the loss in its `forward`.
        ranks: who takes part.
        unused: whether there are weights that the loss does not depend on.
    """
    if ranks.world == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=unused)


def split(module: nn.Module, layers: nn.ModuleList, dtype: torch.dtype) -> None:
    """Split the weights of `module` among all ranks, in place, so that gradients are means over ranks (FSDP2).

    Args:
        module: computes the loss in its `forward`.
        layers: parts of it that are gathered one at a time, in `dtype`; the rest stays in float32.
        dtype: of matrix products.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for layer in layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    fully_shard(module)


def hold_gradients(module: nn.Module, hold: bool) -> AbstractContextManager[None]:
    """Let backward passes inside keep their gradients to this rank, to be averaged with a later one's."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not hold)
    elif isinstance(module, nn.parallel.DistributedDataParallel) and hold:
        return module.no_sync()
    return nullcontext()


def gather_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split among ranks; every rank must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor with its parts on the ranks that have those of another; every rank must call it."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor) and isinstance(other, DTensor):
        return tensor.redistribute(other.device_mesh, other.placements)
    return tensor


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """All weights of a model on the CPU of the main rank; every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    return state

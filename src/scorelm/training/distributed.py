"""Many processes as one trainer: what a rank is, how a model is shared out, and what is summed over ranks.

Launch with ``torchrun --nproc-per-node N -m scorelm train ...``; alone, every function here does nothing. DDP copies
the model to each rank, FSDP2 (`fully_shard`, arXiv 2304.11277) shares its weights, gradients and moments out. Their
engines are imported where they are used, so that what does not train starts fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that were launched together."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
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

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The body runs on the main rank, and then on the others, which find what it has left."""
        if not self.main:
            dist.barrier()
        try:
            yield
        finally:
            if self.main and self.world > 1:
                dist.barrier()

    def part(self, count: int) -> slice:
        """Which of `count` things are this rank's: as many as another's, or one more."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


@contextmanager
def launched() -> Iterator[Ranks]:
    """The process group that torchrun's environment describes; `ALONE` where there is none.

    Ranks that are started again find the keys of those before them in torchrun's store, hence the prefix.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
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


def share_out(
    module: nn.Module, trunk: nn.ModuleList, kind: Parallel, ranks: Ranks, dtype: torch.dtype, unused: bool
) -> nn.Module:
    """What to call instead of `module`, so that gradients are means over ranks.

    Args:
        module: computes the loss in its `forward`.
        trunk: its layers, each of which FSDP gathers on its own, in `dtype`; the rest stays in float32.
        kind: ``ddp`` or ``fsdp``.
        ranks: who takes part.
        dtype: of matrix products.
        unused: whether there are weights that the loss does not depend on.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if kind == "fsdp":
        for layer in trunk:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
        fully_shard(module)
        return module
    if ranks.world == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=unused)


def gradients_stay(module: nn.Module, stay: bool) -> AbstractContextManager[None]:
    """Backward passes inside leave their gradients unreduced, to be reduced with a later one's."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not stay)
    elif isinstance(module, nn.parallel.DistributedDataParallel) and stay:
        return module.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out, gathered."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """All weights of a model on the CPU of the main rank; every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    return state

"""What a checkpoint holds of a run, so that it goes on as if it had never stopped: tensors, and all else as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from scorelm.noise.schedule import Gumbel, schedule_from_dict, schedule_to_dict
from scorelm.training import checkpoint

if TYPE_CHECKING:
    from scorelm.training.trainer import Trainer


def tensors(run: Trainer) -> dict[str, Any]:
    """Weights, moments, averages and the curve that the schedule is fitted to; each rank's own part."""
    found: dict[str, Any] = {
        "model": run.denoiser.state_dict(),
        "optimizer": get_optimizer_state_dict(run.denoiser, run.optimizers),
        "ema": {name.replace(".", "_"): average.state_dict() for name, average in run.averages.items()},
    }
    if run.curve is not None:
        found["curve"] = torch.from_numpy(run.curve.sums)
    return found


def state(run: Trainer) -> dict[str, Any]:
    """Counters, the schedule and where each shard of the data is."""
    owned = [(str(shard.index), shard.batches.get_state()) for shard in run.shards if shard.owned]
    return {
        "step": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "skipped": [run.skipped, run.skipped_in_a_row],
        "heldout": run.heldout,
        "schedule": schedule_to_dict(run.schedule),
        "batches": {index: kept for part in run.ranks.gather(owned) for index, kept in part},
        "fingerprint": run.data.fingerprint,
    }


def restore(run: Trainer, start: Path) -> None:
    """Put a run where it was at a checkpoint that `checkpoint.find` has found.

    Raises:
        ValueError: the text is not what the run was started with, or the checkpoint does not fit.
    """
    kept, found = checkpoint.read_state(start), tensors(run)
    if kept["fingerprint"] != run.data.fingerprint:
        raise ValueError(f"{run.recipe.data.source} has changed since {start} was written; start a new run")
    checkpoint.read_tensors(start, found, run.ranks)
    run.denoiser.load_state_dict(found["model"])
    set_optimizer_state_dict(run.denoiser, run.optimizers, found["optimizer"])
    for name, average in run.averages.items():
        average.load_state_dict(found["ema"][name.replace(".", "_")])
    run.schedule = schedule_from_dict(kept["schedule"])
    if run.curve is not None and isinstance(run.schedule, Gumbel):
        run.curve.schedule, run.curve.sums = run.schedule, found["curve"].numpy().copy()
    run.step, run.tokens, run.seconds = kept["step"], kept["tokens"], kept["seconds"]
    run.heldout, (run.skipped, run.skipped_in_a_row) = kept["heldout"], kept["skipped"]
    for shard in run.shards:
        shard.batches.set_state(kept["batches"][str(shard.index)])

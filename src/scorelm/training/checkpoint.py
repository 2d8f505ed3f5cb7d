"""Checkpoints of a run, through `torch.distributed.checkpoint`: written whole or not at all, the last few kept.

A checkpoint is a directory ``step-00001000`` with the tensors in DCP's files and everything else in ``state.json``.
DCP's metadata is a pickle, so a checkpoint is only ever read from the run's own directory.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from scorelm.training.distributed import ALONE, Ranks

PREFIX = "step-"


def complete(directory: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(p for p in directory.glob(f"{PREFIX}*") if p.is_dir())


def save(
    directory: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], keep: int, ranks: Ranks = ALONE
) -> None:
    """Write a checkpoint beside the others, then rename it into place; delete all but the newest `keep`.

    Args:
        directory: the run's ``checkpoints/``.
        step: optimiser steps made.
        tensors: nested dict of tensors.
        state: everything else, as JSON values.
        keep: how many checkpoints to keep, at least 1.
        ranks: who takes part; each writes what it holds, to a directory that all of them see.
    """
    final, draft = directory / f"{PREFIX}{step:08d}", directory / f".writing-{step:08d}"
    if ranks.main:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".writing-*"):
            shutil.rmtree(stale)
    ranks.wait()
    with one_process():
        state_dict_saver.save(tensors, storage_writer=FileSystemWriter(draft), no_dist=ranks.world == 1)
    if ranks.main:
        finish(directory, draft, final, state, keep)
    ranks.wait()


def finish(directory: Path, draft: Path, final: Path, state: dict[str, Any], keep: int) -> None:
    """Add the state, make everything durable, put the draft in its place and delete what is too old."""
    with (draft / "state.json").open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    sync(draft)
    if final.exists():  # the same step again, after a resume
        shutil.rmtree(final)
    draft.rename(final)
    sync(directory)
    for old in complete(directory)[:-keep]:
        shutil.rmtree(old)


@contextmanager
def one_process() -> Iterator[None]:
    """Silence DCP's remark that there is no process group, which is as intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def sync(directory: Path) -> None:
    """Make the entries of a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def read_tensors(checkpoint: Path, tensors: dict[str, Any], ranks: Ranks = ALONE) -> None:
    """Fill `tensors`, which has the shapes that are expected, in place.

    Raises:
        ValueError: the checkpoint has other tensors or shapes, or is damaged; names the checkpoint.
    """
    try:
        with one_process():
            state_dict_loader.load(tensors, checkpoint_id=checkpoint, no_dist=ranks.world == 1)
    except Exception as error:  # DCP wraps whatever went wrong in types of its own
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(f"{checkpoint} does not fit this run or is damaged: {reason}") from None


def replace_directory(draft: Path, final: Path) -> None:
    """Put `draft` in the place of `final`."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)

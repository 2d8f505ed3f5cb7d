"""Checkpoints of a run, through `torch.distributed.checkpoint`: written whole or not at all, the last few kept.

A checkpoint is a directory ``step-00001000`` with the tensors in DCP's files, everything else in ``state.json``, and
the size and digest of each of these in ``checksums.json``. DCP's metadata is a pickle, so a checkpoint is only ever
read from the run's own directory, and only after `find` has verified its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from scorelm.training.distributed import ALONE, Ranks

PREFIX = "step-"
MANIFEST = "checksums.json"


def complete(directory: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(p for p in directory.glob(f"{PREFIX}*") if p.is_dir())


class Saver:
    """Writes the checkpoints of a run, each beside the others and then renamed into place; keeps the newest few.

    Args:
        directory: the run's ``checkpoints/``.
        keep: how many checkpoints to keep, at least 1.
        ranks: who takes part; each writes what it holds, to a directory that all of them see.
        later: write from a copy, in a thread, while training goes on.
    """

    def __init__(self, directory: Path, keep: int, ranks: Ranks = ALONE, later: bool = False) -> None:
        self.directory, self.keep, self.ranks = directory, keep, ranks
        self.thread = ThreadPoolExecutor(1) if later else None
        self.group = dist.new_group(backend="gloo") if later and ranks.world > 1 else None
        self.writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.finish()

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write a checkpoint, or begin to, after the one before is there.

        Args:
            step: optimiser steps made.
            tensors: nested dict of tensors.
            state: everything else, as JSON values.

        Raises:
            OSError: it, or the one before, could not be written, for want of space or otherwise; the others are whole.
        """
        self.finish()
        final, draft = self.directory / f"{PREFIX}{step:08d}", self.directory / f".writing-{step:08d}"
        if self.ranks.gather(self.ranks.main and is_there(final))[0]:
            return
        one_process()
        disk, alone, text = FileSystemWriter(draft), self.ranks.world == 1, json.dumps(state)
        if self.thread is None:
            self._write(lambda: state_dict_saver.save(tensors, storage_writer=disk, no_dist=alone), draft, final, text)
            self.ranks.wait()
        else:
            copied = state_dict_saver.async_save(tensors, storage_writer=disk, process_group=self.group, no_dist=alone)
            self.writing = self.thread.submit(self._write, cast("Future[Any]", copied).result, draft, final, text)

    def _write(self, tensors_written: Callable[[], object], draft: Path, final: Path, state: str) -> None:
        with all_or_nothing(draft, final):
            tensors_written()
            if not self.ranks.main:
                return
            write_durably(draft / "state.json", state)
            seal(draft)
            draft.rename(final)
            sync(self.directory)
        for old in complete(self.directory)[: -self.keep]:
            doomed = self.directory / f".writing-{old.name}"  # not to be taken for a checkpoint when half deleted
            old.rename(doomed)
            shutil.rmtree(doomed)

    def poll(self) -> None:
        """Raise what a writing that has ended in the meantime has to raise; see `save`."""
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is there; see `save` for errors."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def is_there(final: Path) -> bool:
    """Clear the way for a checkpoint, unless it is there: a signal came right after a save, or right after a resume."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(".writing-*"):
        shutil.rmtree(stale)
    if final.exists() and damage(final) is not None:
        set_aside(final)
    return final.exists()


@contextmanager
def all_or_nothing(draft: Path, final: Path) -> Iterator[None]:
    """Turn whatever stops the writing of `draft` into one OSError about `final`, and give its space back.

    Raises:
        OSError: writing failed.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"{final} could not be written: {innermost(error)}") from None


def innermost(error: BaseException) -> str:
    """The first cause of an error that libraries have wrapped, in one line."""
    causes = [error]
    while True:
        last = causes[-1]
        wrapped = [e for e, _ in last.failures.values()] if isinstance(last, CheckpointException) else []
        inner = [e for e in (*wrapped, last.__cause__, last.__context__) if e is not None and e not in causes]
        if not inner:
            break
        causes.append(inner[0])
    system = [e for e in causes if isinstance(e, OSError)]
    reason = (system[-1].strerror if system else None) or str(causes[0]).strip()
    return reason.splitlines()[0] if reason else type(causes[0]).__name__


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.writing")
    write_durably(draft, text)
    draft.replace(path)


def seal(draft: Path) -> None:
    """Write the size and digest of every file of a checkpoint, after whoever writes to it has finished."""
    files = {p.name: describe(p) for p in sorted(draft.iterdir())}
    write_durably(draft / MANIFEST, json.dumps({"files": files, "digest": digest_of(files)}, indent=1))
    sync(draft)


def describe(path: Path) -> dict[str, Any]:
    """A file's size and BLAKE2b digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return {"size": path.stat().st_size, "blake2b": digest}


def digest_of(files: dict[str, Any]) -> str:
    """The digest of a manifest's own entries."""
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()


def damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written and what is wrong with it; None if all are sound."""
    manifest = checkpoint / MANIFEST
    try:
        entries = json.loads(manifest.read_bytes())
        files = entries["files"]
        if entries["digest"] != digest_of(files):
            return f"{manifest} does not match its own checksum"
        for name, written in files.items():
            path = checkpoint / name
            found = path.stat().st_size
            if found != written["size"]:
                return f"{path} has {found:,} bytes of {written['size']:,}"
            if describe(path) != written:
                return f"{path} does not match its checksum"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename} can't be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} can't be read"
    return None


def find(directory: Path, fall_back: bool = False, say: Callable[[str], object] = lambda text: None) -> Path:
    """The checkpoint to resume from: the newest one, every file of it verified.

    Args:
        directory: the run's ``checkpoints/``.
        fall_back: where the newest is damaged, take the newest sound one and keep the damaged ones under other names.
        say: told what was set aside.

    Raises:
        ValueError: there is no checkpoint, or it is damaged; names the file.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(complete(directory)):
        problem = damage(path)
        if problem is None:
            for bad, why in damaged.items():
                say(f"{why}; kept as {set_aside(bad)}")
            return path
        damaged[path] = problem
        if not fall_back:
            raise ValueError(f"{problem}; --resume --fall-back continues from the newest sound checkpoint, if any")
    first = next(iter(damaged.values()), "no checkpoint was written yet")
    raise ValueError(f"{directory} has no sound checkpoint: {first}")


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither resumed from nor deleted."""
    number = checkpoint.name.removeprefix(PREFIX)
    names = (f"damaged-{number}{suffix}" for suffix in ("", *(f"-{k}" for k in range(2, 1000))))
    aside = next(p for name in names if not (p := checkpoint.with_name(name)).exists())
    return checkpoint.rename(aside)


def one_process() -> None:
    """Silence DCP's remark that there is no process group, which is as intended."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


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
        one_process()
        state_dict_loader.load(tensors, checkpoint_id=checkpoint, no_dist=ranks.world == 1)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{checkpoint} does not fit this run or is damaged: {innermost(error)}") from None


def replace_directory(draft: Path, final: Path) -> None:
    """Put `draft` in the place of `final`."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)

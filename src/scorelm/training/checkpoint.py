"""Checkpoints of a run, through `torch.distributed.checkpoint`: written whole or not at all, the last few kept.

A checkpoint is a directory ``step-00001000`` with the tensors in DCP's files, everything else in ``state.json``, and
the size and digest of each of these in ``checksums.json``. DCP's metadata is a pickle, so a checkpoint is only ever
read from the run's own directory, and only after `find_checkpoint` has verified its files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, cast

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from scorelm.errors import InputError, exists, writing
from scorelm.lm import ScoreLM
from scorelm.parallel import ALONE, Ranks
from scorelm.training.durable import replace_directory, sync, write_durably, writing_draft

PREFIX = "step-"
NAME = re.compile(PREFIX + r"\d{8,}")
MANIFEST = "checksums.json"
FIRST_AFTER = 30.0
"""Seconds from the start of a run, or from its resumption, to the first checkpoint."""
FILES = re.compile(r"\.metadata|.*\.distcp|state\.json|checksums\.json")


def list_checkpoints(directory: Path) -> list[Path]:
    """The run's checkpoints, damaged ones too, oldest first."""
    named = [p for p in directory.glob(f"{PREFIX}*") if NAME.fullmatch(p.name)] if exists(directory) else []
    return sorted(p for p in named if p.is_dir() and any(FILES.fullmatch(file.name) for file in p.iterdir()))


class Saver:
    """Writes the checkpoints of a run, each under another name until it is whole; keeps the newest few.

    Args:
        directory: the run's ``checkpoints/``.
        keep: how many checkpoints to keep, at least 1.
        ranks: who takes part; each writes what it holds, to a directory that all of them see.
        later: write from a copy, in a thread, while training goes on.
        minutes: most minutes between checkpoints; the first one is due after half a minute.
    """

    def __init__(
        self, directory: Path, keep: int, ranks: Ranks = ALONE, later: bool = False, minutes: float = math.inf
    ) -> None:
        self.directory, self.keep, self.ranks = directory, keep, ranks
        self.thread = ThreadPoolExecutor(1) if later else None
        self.group = dist.new_group(backend="gloo") if later and ranks.world > 1 else None
        self.pending: Future[None] | None = None
        self.pinned: int | None = None
        """The step of a checkpoint that stays, whatever its age."""
        self.seconds = 60 * minutes
        self.due_at = time.perf_counter() + min(FIRST_AFTER, self.seconds)

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint, by the clock of this rank."""
        return time.perf_counter() >= self.due_at

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self.finish()
        finally:
            if self.thread is not None:
                self.thread.shutdown()

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write a checkpoint, or begin to once the one before is written.

        Does nothing where the step has a sound one: a signal may come right after a save, or right after a resume.

        Args:
            step: optimiser steps made.
            tensors: nested dict of tensors.
            state: everything else, as JSON values.

        Raises:
            DiskError: it, or the one before, could not be written, on a full disk for example; the others are whole.
        """
        self.finish()
        final, draft = self.directory / f"{PREFIX}{step:08d}", self.directory / f".writing-{step:08d}"
        if self.ranks.main:
            clear_way(final)
        if self.ranks.gather(final.exists())[0]:
            return
        silence_single_process()
        disk, single, text = FileSystemWriter(draft), self.ranks.world == 1, json.dumps(state)
        if self.thread is None:
            self._write(lambda: state_dict_saver.save(tensors, storage_writer=disk, no_dist=single), draft, final, text)
            self.ranks.wait()
        else:
            copied = state_dict_saver.async_save(tensors, storage_writer=disk, process_group=self.group, no_dist=single)
            self.pending = self.thread.submit(self._write, cast("Future[Any]", copied).result, draft, final, text)
        self.due_at = time.perf_counter() + self.seconds

    def _write(self, write_tensors: Callable[[], object], draft: Path, final: Path, state: str) -> None:
        with writing_draft(draft, final):
            write_tensors()
            if not self.ranks.main:
                return
            write_durably(draft / "state.json", state)
            seal(draft)
            draft.rename(final)
            sync(self.directory)
        for old in filter(holds_nothing_else, list_checkpoints(self.directory)[: -self.keep]):
            if old.name == f"{PREFIX}{self.pinned or 0:08d}":
                continue
            doomed = self.directory / f".writing-{old.name}"  # not to be taken for a checkpoint when half deleted
            old.rename(doomed)
            shutil.rmtree(doomed)

    def poll(self) -> None:
        """Raise what a writing that has ended in the meantime has to raise; see `save`."""
        if self.pending is not None and self.pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is written; see `save` for errors."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def clear_way(final: Path) -> None:
    """Make room for a checkpoint: delete unfinished ones, and rename one of the same step that is damaged."""
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for stale in final.parent.glob(".writing-*"):
            shutil.rmtree(stale)
        if final.exists() and find_damage(final) is not None:
            set_aside(final)


def holds_nothing_else(checkpoint: Path) -> bool:
    """Whether nobody has put a file of their own into a checkpoint, which then has to stay."""
    return all(FILES.fullmatch(path.name) for path in checkpoint.iterdir())


def write_model(lm: ScoreLM, final: Path) -> None:
    """Put a model in the place of the last one.

    Raises:
        DiskError: it could not be written; the last one is whole.
    """
    draft = final.with_name(f".{final.name}-writing")
    shutil.rmtree(draft, ignore_errors=True)
    with writing_draft(draft, final):
        lm.save_pretrained(draft)
        replace_directory(draft, final)


def seal(draft: Path) -> None:
    """Write the size and digest of every file of a checkpoint, after whoever writes to it has finished."""
    files = {p.name: digest_file(p) for p in sorted(draft.iterdir())}
    write_durably(draft / MANIFEST, json.dumps({"files": files, "digest": digest_entries(files)}, indent=1))
    sync(draft)


def digest_file(path: Path) -> dict[str, Any]:
    """A file's size and BLAKE2b digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return {"size": path.stat().st_size, "blake2b": digest}


def digest_entries(files: dict[str, Any]) -> str:
    """The digest of a manifest's own entries."""
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()


def find_damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, and what is wrong with it; None if all are."""
    manifest = checkpoint / MANIFEST
    try:
        entries = json.loads(manifest.read_bytes())
        files = entries["files"]
        if entries["digest"] != digest_entries(files):
            return f"{manifest} does not match its own checksum"
        for name, written in files.items():
            path = checkpoint / name
            found = path.stat().st_size
            if found != written["size"]:
                return f"{path} has {found:,} bytes of {written['size']:,}"
            if digest_file(path) != written:
                return f"{path} does not match its checksum"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename} can't be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} can't be read"
    return None


def find_checkpoint(directory: Path, fall_back: bool, say: Callable[[str], object]) -> Path:
    """The checkpoint to resume from: the newest one, every file of it verified.

    Args:
        directory: the run's ``checkpoints/``.
        fall_back: where the newest is damaged, take the newest sound one and rename the damaged ones.
        say: told what was renamed.

    Raises:
        InputError: there is no checkpoint, or it is damaged; names the file.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(directory)):
        problem = find_damage(path)
        if problem is None:
            for bad, why in damaged.items():
                say(f"{why}; kept as {set_aside(bad)}")
            return path
        damaged[path] = problem
        if not fall_back:
            raise InputError(f"{problem}; --resume --fall-back continues from the newest sound checkpoint, if any")
    first = next(iter(damaged.values()), "no checkpoint was written yet")
    raise InputError(f"{directory} has no sound checkpoint: {first}")


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither resumed from nor deleted."""
    number = checkpoint.name.removeprefix(PREFIX)
    names = (f"damaged-{number}{suffix}" for suffix in ("", *(f"-{k}" for k in range(2, 1000))))
    aside = next(p for name in names if not (p := checkpoint.with_name(name)).exists())
    return checkpoint.rename(aside)


def silence_single_process() -> None:
    """Silence DCP's remark that there is no process group, which is as intended."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`.

    Raises:
        InputError: an older version has written it.
    """
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    rows = [kept for kept in state["batches"].values() if kept is not None]
    if "watch" not in state or not all("taken" in kept for kept in rows):
        raise InputError(
            f"{checkpoint} was written by an older scorelm: start a new run in another --out, with --init-from and the "
            "model of this one to go on from it"
        )
    return state


def read_tensors(checkpoint: Path, tensors: dict[str, Any], ranks: Ranks = ALONE) -> None:
    """Fill `tensors`, which has the shapes that are expected, in place.

    Raises:
        InputError: the checkpoint has other tensors or shapes, or is damaged; names the checkpoint.
    """
    try:
        silence_single_process()
        state_dict_loader.load(tensors, checkpoint_id=checkpoint, no_dist=ranks.world == 1)
    except (Exception, CheckpointException) as error:
        raise InputError(f"{checkpoint} does not fit this run or is damaged: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """What an error, or the first that DCP has collected in one, says in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        return first_line(next(iter(error.failures.values()))[0])
    return str(error).strip().partition("\n")[0] or type(error).__name__

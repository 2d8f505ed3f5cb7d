"""Files and directories that are written whole or not at all, and stay where power or disk fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from scorelm.errors import writing


@contextmanager
def writing_draft(draft: Path, final: Path) -> Iterator[None]:
    """Write `draft`, which is to become `final`, or delete what there is of it.

    Raises:
        DiskError: writing failed; one line about `final`.
    """
    try:
        with writing(final):
            try:
                yield
            except (Exception, CheckpointException) as error:
                raise system_error(error) or error from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def system_error(error: BaseException) -> OSError | None:
    """The error of the operating system that libraries have wrapped, if there is one."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, SafetensorError) and "I/O error: " in str(error):
        return OSError(str(error).partition("I/O error: ")[2])
    wrapped = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    causes = (e for e in (*wrapped, error.__cause__, error.__context__) if e is not None)
    return next((found for cause in causes if (found := system_error(cause)) is not None), None)


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.writing")
    with writing(path):
        write_durably(draft, text)
        draft.replace(path)


def replace_directory(draft: Path, final: Path) -> None:
    """Put `draft` in the place of `final`; what only `final` holds, as a user's own file, moves along."""
    old = final.with_name(f".{final.name}-old")
    take_over(old, final)  # where a kill has left it
    if final.exists():
        final.rename(old)
    draft.rename(final)
    take_over(old, final)


def take_over(old: Path, new: Path) -> None:
    """Move what only `old` holds to `new`, and remove the rest."""
    if not old.exists():
        return
    if not new.exists():
        old.rename(new)
        return
    for path in old.iterdir():
        if not (new / path.name).exists():
            path.rename(new / path.name)
    shutil.rmtree(old)


def sync(directory: Path) -> None:
    """Make the entries of a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

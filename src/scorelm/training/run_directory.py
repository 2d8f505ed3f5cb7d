"""The run directory: which files in it are a run's own, and which process holds it."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from scorelm.errors import InputError, brief, exists, writing
from scorelm.parallel import were_restarted
from scorelm.training.runlog import Say

LOCK = ".lock"
DRAFT = ".starting"
"""Where a new run keeps its tokenizer until it trains."""
DIRECTORIES = ("checkpoints", "model", "tensorboard", "wandb")
OWN = re.compile(
    r"""recipe\.toml | tokenizer\.(model|json) | metrics\.jsonl | samples\.txt | prices\.png | run_id
    | model/ (config\.json | model\.safetensors | tokenizer\.(model|json) | README\.md | recipe\.toml)
    | checkpoints/ (step|damaged)-\d{8,}(-\d+)? / (\.metadata | [^/]*\.distcp | state\.json | checksums\.json)
    | tensorboard/events\.out\.tfevents\.[^/]*
    | wandb/ ((offline-)?run-\d+_\d+-[\w-]+/.* | debug(-internal)?\.log | latest-run)""",
    re.VERBOSE,
)
"""The paths in a run directory that the run, or ``scorelm plot``, writes."""


def list_files(out: Path) -> list[Path]:
    """The files of a run that a directory holds, and none that somebody else has put there."""
    found = {*out.glob("*"), *(p for name in DIRECTORIES for p in out.glob(f"{name}/**/*"))}
    own = (p for p in found if OWN.fullmatch(p.relative_to(out).as_posix()))
    return sorted(p for p in own if p.is_file() or p.is_symlink())


def remove_run(out: Path, say: Say) -> None:
    """Remove the files of a run, and say what else its directory holds, which stays."""
    files = list_files(out)
    with writing(out):
        for path in files:
            path.unlink()
        emptied = {p for path in files for p in path.parents if out in p.parents}
        for place in sorted(emptied | {p for p in out.glob("wandb/**/*") if p.is_dir()}, reverse=True):
            with suppress(OSError):  # something is left in it
                place.rmdir()
        others = (p.relative_to(out) for p in sorted(out.rglob("*")) if p.is_file())
        left = [str(path) for path in others if not any(part.startswith(".") for part in path.parts)]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        say(f"the run in {out} is removed; what is not its own stays: {', '.join(left[:5])}{more}")


class Hold:
    """The right of this process to write to a run directory.

    Args:
        file: the lock, which says who holds it.
    """

    def __init__(self, file: FileIO) -> None:
        self.file, self.begun = file, False
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        self.launch = f"launch {run_id} of process {os.getppid()}" if run_id else ""
        """What tells one start of torchrun, with all its restarts, from another."""
        self.file.seek(0)
        self.again = bool(self.launch) and were_restarted() and self.launch.encode() in self.file.read().splitlines()
        """Whether torchrun has started this process again after an earlier one had begun to train here."""
        self._write(self.launch if self.again else "")

    def begin(self) -> None:
        """Note that the run trains, for the processes that torchrun may start after this one."""
        self.begun = True
        self._write(self.launch)

    def _write(self, text: str) -> None:
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}\n{text}".encode())


@contextmanager
def hold(out: Path, say: Say) -> Iterator[Hold]:
    """Keep other processes out of a run directory, which is made if need be and goes again if it stays empty.

    Raises:
        InputError: another process holds it, or it cannot be made.
    """
    missing = [p for p in (out, *out.parents) if not exists(p)]
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            file = lock(out / LOCK, say)
        with file:
            kept = False
            try:
                with writing(out):
                    held = Hold(file)
                try:
                    yield held
                except BaseException:
                    kept = bool(held.launch) and (held.begun or held.again)  # for the next start to read
                    raise
            finally:
                shutil.rmtree(out / DRAFT, ignore_errors=True)
                if not kept:
                    (out / LOCK).unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # something is in it
            for directory in missing:
                directory.rmdir()


def lock(path: Path, say: Say) -> FileIO:
    """Open and lock a file; the lock goes with the process, however that ends.

    Raises:
        InputError: another process has locked it; says which.
    """
    while True:
        file = FileIO(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = brief(file.readline().decode(errors="replace").strip()) or "another process"
            raise InputError(
                f"{path.parent} is in use: {holder} trains there; wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:
            say(f"nothing keeps a second run out of {path.parent}, whose file system has no locks: {error.strerror}")
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder has ended in this very moment, and has removed it

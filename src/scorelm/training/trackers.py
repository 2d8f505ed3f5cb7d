"""Where a run can be followed besides metrics.jsonl: TensorBoard, Weights & Biases and trackio, behind one protocol.

Each is fed by a thread of its own, so that one that fails, or waits for a network, neither holds a run up nor ends it.
A run that is resumed goes on under the name that it had; what a killed run had told of the steps after its checkpoint
is told again with the same values.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, NamedTuple, Protocol

from scorelm.errors import InputError, brief
from scorelm.training.durable import replace_file

PROJECT = "scorelm"
RUN_ID = "run_id"
"""The file in a run directory with the name that trackers know the run by."""
NAME = re.compile(r"[a-zA-Z0-9_-]+")
WAITING = 10_000
"""Most jobs that wait for a tracker."""
PATIENCE = 60.0
"""Seconds that a tracker has at the end of a run to take what it was given."""
UNSAID = 2.0
"""Seconds of them before it is said that it is waited for."""


class Followed(NamedTuple):
    """What a tracker is told of a run before it begins."""

    out: Path
    """The run directory."""
    step: int
    """Steps that are already made: more than 0 in a run that is resumed."""
    options: dict[str, Any]
    """Those of its recipe."""
    id: str
    """Its own among all runs, the same when it is resumed."""
    say: Callable[[str], object]
    """Takes lines for people."""


class Tracker(Protocol):
    """Takes what a run measures; any exception ends the tracking and nothing else."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name."""

    def texts(self, step: int, texts: Sequence[str]) -> None:
        """What the model writes."""

    def page(self, step: int, name: str, html: str) -> None:
        """A web page that stands by itself."""

    def close(self) -> None:
        """Take whatever is still on its way; the run has ended."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory; it has no place for web pages."""

    def __init__(self, run: Followed) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.out / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def texts(self, step: int, texts: Sequence[str]) -> None:
        self.writer.add_text("samples", "\n\n".join(texts), step)

    def page(self, step: int, name: str, html: str) -> None:
        """Nothing."""

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; without a key of an account it stays in the run directory, for ``wandb sync``."""

    def __init__(self, run: Followed) -> None:
        self.wandb = wandb = import_module("wandb")
        wandb.setup(wandb.Settings(silent=True))
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.id, id=run.id, resume="allow",
            dir=str(run.out), config=run.options, mode=mode, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        kept = f"kept in {run.out / 'wandb'}, for wandb sync"
        run.say(f"wandb: {kept if mode == 'offline' else self.run.url}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def texts(self, step: int, texts: Sequence[str]) -> None:
        self.run.log({"samples": self.wandb.Table(columns=["text"], data=[[text] for text in texts])}, step=step)

    def page(self, step: int, name: str, html: str) -> None:
        self.run.log({name: self.wandb.Html(html, inject=False)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine unless its own environment variables say otherwise."""

    def __init__(self, run: Followed) -> None:
        with redirect_stdout(StringIO()):  # where results go
            self.trackio = import_module("trackio")
            self.run = self.trackio.init(PROJECT, name=run.id, resume="allow", config=run.options, embed=False)
        run.say(f"trackio: {run.id}, shown by trackio show --project {PROJECT}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def texts(self, step: int, texts: Sequence[str]) -> None:
        self.run.log({"samples": self.trackio.Markdown("\n\n".join(texts))}, step=step)

    def page(self, step: int, name: str, html: str) -> None:
        self.run.log({name: self.trackio.Html(html)}, step=step)

    def close(self) -> None:
        with redirect_stdout(StringIO()):
            self.run.finish()


TRACKERS: dict[str, Callable[[Followed], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio,
}  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        InputError: one is not; says how to install it.
    """
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed: pip install 'scorelm[{name}]'")


class Feed:
    """Hands what a run tells to a tracker, in a thread; says so once where the tracker fails, and drops the rest."""

    def __init__(self, name: str, run: Followed) -> None:
        self.name, self.say = name, run.say
        self.jobs: Queue[Callable[[Tracker], object] | None] = Queue(WAITING)
        self.thread = Thread(target=self._work, args=(run,), daemon=True)
        self.failed = False
        self.thread.start()

    def put(self, job: Callable[[Tracker], object] | None) -> None:
        """Let the tracker do something; None ends the work."""
        if not self.failed:
            try:
                self.jobs.put_nowait(job)
            except Full:
                self._give_up("it does not keep up")

    def close(self) -> None:
        """Wait until the tracker has taken everything, for a while."""
        self.put(None)
        self.thread.join(0 if self.failed else UNSAID)
        if self.thread.is_alive() and not self.failed:
            self.say(f"waiting up to {PATIENCE:.0f} seconds for {self.name} to take the rest")
            self.thread.join(PATIENCE)
        if self.thread.is_alive() and not self.failed:
            self._give_up(f"it has not taken everything in {PATIENCE:.0f} seconds")

    def _work(self, run: Followed) -> None:
        try:
            tracker = TRACKERS[self.name](run)
            while (job := self.jobs.get()) is not None:
                job(tracker)
            tracker.close()
        except Exception as error:  # whatever a tracker's client raises
            self._give_up(brief(" ".join(str(error).split()) or type(error).__name__))

    def _give_up(self, reason: str) -> None:
        self.failed = True
        self.say(f"{self.name} no longer follows the run, which goes on: {reason}")


def follow(names: Sequence[str], run: Followed) -> list[Feed]:
    """Begin to feed the trackers of these names, each once."""
    return [Feed(name, run) for name in dict.fromkeys(names)]


def run_id(out: Path) -> str:
    """What trackers know a run by: as its directory says, or new, after the directory's name, and noted there."""
    path = out / RUN_ID
    with suppress(OSError, UnicodeDecodeError):
        if NAME.fullmatch(kept := path.read_text(encoding="ascii").strip()):
            return kept
    made = f"{re.sub(r'[^a-zA-Z0-9_-]', '-', out.resolve().name)}-{secrets.token_hex(4)}"
    with suppress(InputError):  # a disk that is full ends the run elsewhere, and with more to say
        replace_file(path, f"{made}\n")
    return made


def figures(values: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """The numbers of a line of metrics.jsonl but its step, by name; those of a table as ``table/name``."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{above}{name}/")
        elif name != "step" and isinstance(value, int | float) and math.isfinite(value):
            found[f"{above}{name}"] = value
    return found

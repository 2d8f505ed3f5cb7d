"""What a run tells: metrics.jsonl, lines and a progress bar on stderr, samples.txt, and trackers if asked."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from scorelm.config.recipe import Recipe
from scorelm.errors import writing
from scorelm.training.durable import replace_file
from scorelm.training.trackers import Feed, Followed, Tracker, figures, follow, run_id

Say = Callable[[str], object]


def speak(text: str) -> None:
    """Write a line to stderr; drop it, rather than wait, where its reader has stopped reading or has gone."""
    with suppress(OSError, ValueError):  # ValueError: stderr is closed, or is no file of the system
        if select.select([], [sys.stderr.fileno()], [], 0)[1]:
            print(text, file=sys.stderr, flush=True)


class RateColumn(ProgressColumn):
    """Losses and speed, from the task's fields."""

    def render(self, task: Task) -> Text:
        """The figures as text."""
        loss, heldout, speed = (task.fields[name] for name in ("loss", "heldout", "speed"))
        return Text("" if loss is None else f"loss {loss:.3f}{heldout}  {speed:,.0f} tokens/s", style="cyan")


class RunLog:
    """Writes metrics.jsonl and shows progress, on the main rank; a context manager.

    Args:
        out: the run directory.
        step: where the run starts, or goes on from a checkpoint; later lines of metrics.jsonl are dropped.
        recipe: of the run, which names the trackers that are told of it too.
        main: whether this rank writes and shows anything.
        say: takes lines for people; with the default there is a bar as well where stderr is a terminal.
    """

    def __init__(self, out: Path, step: int, recipe: Recipe, main: bool = True, say: Say = speak) -> None:
        self.out, self.path = out, out / "metrics.jsonl"
        self.step, self.main = step, main
        self.file: TextIO | None = None
        self.recipe, self.feeds = recipe, list[Feed]()
        console = Console(stderr=True, quiet=not main)
        self.show_bar = main and say is speak and console.is_terminal
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            RateColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not self.show_bar,
        )  # fmt: skip
        self.task = self.progress.add_task("training", total=1.0, loss=None, heldout="", speed=0.0)
        self._say = say if main else drop
        self.heldout = ""
        self.said = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.file is not None:
            self.file.close()
        for feed in self.feeds:
            feed.close()

    def open(self) -> None:
        """Begin to write files; before that, those of an earlier run are as they were."""
        if self.main:
            with writing(self.path):
                drop_lines_after(self.path, self.step)
                self.file = self.path.open("a", encoding="utf-8")
            if names := self.recipe.training.track:
                options = self.recipe.model_dump(mode="json")
                self.feeds = follow(names, Followed(self.out, self.step, options, run_id(self.out), self.say))

    def advance(self, step: int, share: float) -> None:
        """Move the bar to `share` (0 to 1) of the run."""
        self.progress.update(self.task, completed=share, description=f"step {step:,}")

    def show_price(self, nats: float) -> None:
        """Show the newest price of held-out text, nats per token, wherever the loss is shown."""
        self.heldout = f"  held out {nats:.3f}"
        self.progress.update(self.task, heldout=self.heldout)

    def write(self, metrics: dict[str, Any], share: float) -> None:
        """Write one line of metrics.jsonl; where there is no bar, also say one every ten seconds."""
        if self.file is not None:
            with writing(self.path):
                self.file.write(json.dumps(metrics) + "\n")
                self.file.flush()
        loss, speed = metrics["loss"], metrics["tokens_per_second"]
        self.progress.update(self.task, loss=loss, speed=speed)
        if not self.show_bar and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            epoch = "" if metrics["epoch"] is None else f"epoch {metrics['epoch']:.1f}  "
            self._say(
                f"{share:4.0%}  {epoch}step {metrics['step']:,}  "
                f"loss {'none' if loss is None else f'{loss:.3f}'}{self.heldout}  {speed:,.0f} tokens/s  "
                f"packing {metrics['packing_efficiency']:.1%}  MFU {metrics['mfu']:.0%}"
            )
        self.tell(lambda tracker: tracker.scalars(metrics["step"], figures(metrics)))

    def write_samples(self, step: int, texts: Sequence[str]) -> None:
        """Append the samples of a step to samples.txt."""
        append_samples(self.out / "samples.txt", step, texts)
        self.tell(lambda tracker: tracker.texts(step, texts))

    def tell(self, what: Callable[[Tracker], object]) -> None:
        """Let every tracker take something, when it comes to it."""
        for feed in self.feeds:
            feed.put(what)

    def say(self, text: str) -> None:
        """Say a line, above the bar if there is one."""
        if self.show_bar:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self._say(text)


def drop(text: str) -> None:
    """Say nothing."""


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint, and a torn last line."""
    if not path.exists():
        return
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    replace_file(path, "".join(f"{line}\n" for line in lines if not is_later(line, step)))


def is_later(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is of a later step; a line that is none of the run's is not."""
    try:
        return bool(json.loads(line)["step"] > step)
    except (ValueError, KeyError, TypeError):
        return False


def append_samples(path: Path, step: int, texts: Iterable[str]) -> None:
    """Append the samples of a step to samples.txt."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(f"step {step}\n" + "".join(f"  {text}\n" for text in texts))

"""Progress on stderr for work whose length is known: a bar in a terminal, and a line every ten seconds elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


Telling = Callable[..., None]
"""``watch(share, doing)``: told the share of the work that is done, from 0 to 1, and what is being done just now."""


@contextmanager
def progress(title: str, shown: bool = True) -> Iterator[Telling]:
    """Show `title`, the share that is done and the time left, for as long as the body runs and tells how far it is.

    Args:
        title: what is being done.
        shown: whether to show anything.
    """
    console = Console(stderr=True)
    if not shown:
        yield lambda share, doing="": None
    elif console.is_terminal:
        with bar(title, console) as watch:
            yield watch
    else:
        with lines(title, console) as watch:
            yield watch


@contextmanager
def bar(title: str, console: Console) -> Iterator[Telling]:
    """A bar that stays in its place."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeLeft())
    with Progress(*columns, console=console) as shown:
        task = shown.add_task(title, total=1.0)
        yield lambda share, doing="": shown.update(task, completed=share, description=named(title, doing))


@contextmanager
def lines(title: str, console: Console) -> Iterator[Telling]:
    """A line every ten seconds, whether or not the work has got any further."""
    begun, told, over = monotonic(), (0.0, ""), Event()

    def watch(share: float, doing: str = "") -> None:
        nonlocal told
        told = share, doing

    def speak() -> None:
        while not over.wait(EVERY):
            share, doing = told
            line = f"{named(title, doing)}: {share:.0%} done, {time_left(share, monotonic() - begun)}"
            with suppress(OSError):
                console.print(line, highlight=False, markup=False, soft_wrap=True)

    speaker = Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield watch
    finally:
        over.set()
        speaker.join()


class TimeLeft(ProgressColumn):
    """The time left as a column of a bar."""

    def render(self, task: Task) -> Text:
        """What `time_left` says."""
        return Text(time_left(task.percentage / 100, task.elapsed or 0.0))


def time_left(share: float, seconds: float) -> str:
    """The time left in words, at the mean speed of the work so far: a share of it took so many seconds."""
    if not share:
        return "time left not known yet"
    left = round(seconds * (1 - share) / share)
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def named(title: str, doing: str) -> str:
    """The work, and what of it is being done."""
    return f"{title}: {doing}" if doing else title

"""What a run reports: metrics.jsonl, a progress bar on stderr, TensorBoard if asked, and model FLOPs utilisation."""

from __future__ import annotations

import json
import math
import os
import select
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from scorelm.config import Recipe
from scorelm.model.denoiser import Denoiser
from scorelm.noise.levels import runs
from scorelm.training.distributed import Ranks, whole
from scorelm.training.loss import Batch, Draw, Outcome

BANDS = (6.0, 4.0, 3.0, 2.0, 1.0, 0.0)
"""Lower edges of the bands of sqrt(E)/sigma that the loss is reported by; the last band ends at no evidence."""


def useful_flops(denoiser: Denoiser, lengths: Tensor, streams: int, noisy: int, live: int, first_pass: bool) -> float:
    """FLOPs that a training step needs: 2 per weight and token forward, twice that backward, attention likewise.

    Args:
        denoiser: the model.
        lengths: lengths of the documents in the batch; padding is not counted.
        streams: copies of each document.
        noisy: positions with a soft token of their own: sigma above 0 and finite.
        live: positions with logits: sigma above 0.
        first_pass: whether a self-conditioning pass (forward only) was made.
    """
    trunk = sum(p.numel() for p in denoiser.trunk.parameters() if p.ndim == 2)
    table = denoiser.embedding.weight.numel()
    vocabulary = noisy * (table + denoiser.token_in.numel()) + live * denoiser.context.weight.numel()
    dim, layers = denoiser.token_in.shape[1], len(denoiser.trunk.blocks)
    tokens, pairs = streams * int(lengths.sum()), streams * int((lengths**2).sum())
    forward = 2.0 * (trunk * tokens + vocabulary) + 4.0 * dim * layers * pairs
    return forward * (4 if first_pass else 3)


class Window:
    """Sums over the steps since the last line of metrics.jsonl."""

    def __init__(self) -> None:
        self.loss = self.flops = self.seconds = 0.0
        self.steps = self.tokens = self.positions = self.live = self.correct = 0
        self.bands = torch.zeros(2, len(BANDS) + 1, dtype=torch.float64)

    def add(self, denoiser: Denoiser, batch: Batch, draw: Draw, outcome: Outcome, first_pass: bool) -> None:
        """Count a batch of this rank, without its cross-entropies where one is not finite."""
        documents = runs(batch.segment)
        lengths = torch.bincount(documents.index_BL[batch.segment > 0])
        streams, norm = draw.ids_BS.shape[1] // batch.ids.shape[1], denoiser.embedding.norm
        self.flops += useful_flops(denoiser, lengths, streams, draw.noisy, draw.live, first_pass)
        self.positions += batch.segment.numel()
        if not outcome.cross_entropy_N.isfinite().all():
            return
        self.live += len(outcome.sigma_N)
        self.correct += int(outcome.correct_N.sum())
        edges = torch.tensor(BANDS[::-1], dtype=torch.float32)
        band = len(BANDS) - torch.bucketize(norm / outcome.sigma_N.float(), edges)
        count = torch.bincount(band, minlength=len(BANDS) + 1)[: len(BANDS) + 1]
        total = torch.bincount(band, outcome.cross_entropy_N.double(), minlength=len(BANDS) + 1)
        self.bands += torch.stack([count.double(), total[: len(BANDS) + 1]])

    def advance(self, loss: float, tokens: int, seconds: float) -> None:
        """Count a step, by what all ranks together made; its loss only if it is finite."""
        self.tokens += tokens
        self.seconds += seconds
        if math.isfinite(loss):
            self.loss += loss
            self.steps += 1

    def summed(self, ranks: Ranks) -> Window:
        """The window with what each rank counted for itself summed over them."""
        own = [self.flops, self.positions, self.live, self.correct, *self.bands.flatten().tolist()]
        flops, *counts = ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        self.flops, (self.positions, self.live, self.correct) = flops, map(int, counts[:3])
        self.bands = torch.tensor(counts[3:], dtype=torch.float64).view_as(self.bands)
        return self

    def by_band(self) -> dict[str, float | None]:
        """Mean cross-entropy, nats, by band of sqrt(E)/sigma."""
        names = [f">{BANDS[0]:g}", *(f"{low:g}-{high:g}" for high, low in pairwise(BANDS)), "none"]
        counts, totals = self.bands.tolist()
        return {name: t / n if n else None for name, n, t in zip(names, counts, totals, strict=True)}


def anisotropy(denoiser: Denoiser) -> float:
    """Mean cosine between the embeddings of two different tokens; 0 for directions spread evenly."""
    unit = whole(denoiser.embedding.table().detach()).double() / denoiser.embedding.norm
    count = len(unit)
    return float((unit.sum(0).pow(2).sum() - count) / (count * (count - 1)))


class RateColumn(ProgressColumn):
    """Loss and speed, from the task's fields."""

    def render(self, task: Task) -> Text:
        """The two figures as text."""
        loss, speed = task.fields["loss"], task.fields["speed"]
        return Text("" if loss is None else f"loss {loss:.3f}  {speed:,.0f} tokens/s", style="cyan")


class RunLog:
    """Writes metrics.jsonl and shows progress, on the main rank; use as a context manager."""

    def __init__(self, out: Path, recipe: Recipe, resumed_step: int, main: bool = True) -> None:
        self.path = out / "metrics.jsonl" if main else Path(os.devnull)
        if main:
            keep_lines_until(self.path, resumed_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = tensorboard_writer(out) if main and recipe.training.tensorboard else None
        self.console = Console(stderr=True, quiet=not main)
        self.main, self.live = main, self.console.is_terminal and main
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            RateColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not self.live,
        )  # fmt: skip
        self.task = self.progress.add_task("training", total=1.0, loss=None, speed=0.0)
        self.printed = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def advance(self, step: int, share: float) -> None:
        """Move the bar to `share` (0 to 1) of the run."""
        self.progress.update(self.task, completed=share, description=f"step {step:,}")

    def write(self, metrics: dict[str, Any], share: float) -> None:
        """One line of metrics.jsonl, flushed; without a terminal, also a line on stderr every ten seconds."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        loss, speed = metrics["loss"], metrics["tokens_per_second"]
        self.progress.update(self.task, loss=loss, speed=speed)
        if self.main and not self.live and time.monotonic() - self.printed > 10:
            self.printed = time.monotonic()
            say(
                f"{share:4.0%}  step {metrics['step']:,}  loss {'none' if loss is None else f'{loss:.3f}'}  "
                f"{speed:,.0f} tokens/s  packing {metrics['packing_efficiency']:.1%}  MFU {metrics['mfu']:.0%}"
            )
        if self.tensorboard is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, metrics["step"])

    def say(self, text: str) -> None:
        """A line on stderr, above the bar if there is one."""
        if self.live:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.main:
            say(text)


def say(text: str) -> None:
    """A line on stderr; dropped, rather than waited for, where its reader has stopped reading or has gone."""
    with suppress(OSError, ValueError):  # ValueError: stderr is closed, or is no file of the system
        if select.select([], [sys.stderr.fileno()], [], 0)[1]:
            print(text, file=sys.stderr, flush=True)


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    draft = path.with_suffix(".writing")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)


def tensorboard_writer(out: Path) -> Any:
    """TensorBoard's writer for the run.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: pip install 'scorelm[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"))

"""How far a run has come, and what the device has counted of it that nobody has read yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorelm.config.recipe import TrainingConfig
from scorelm.training.metrics import Sums


@dataclass
class Watch:
    """What has been seen of the price of held-out text; checkpoints keep it."""

    times: int | None = None
    """How often it is taken in the whole run; None until that is decided, 0 where the run is too short."""
    tokens: int = 0
    """Of the text that is priced each time."""
    took: float = 0.0
    """Seconds that the newest prices took, in a run of minutes."""
    step: int = 0
    """Of the newest prices, as `seconds`."""
    seconds: float = 0.0
    prices: dict[str, float] = field(default_factory=dict)
    """Newest ones: nats per token by path, and the largest standard error."""
    best: float | None = None
    """Lowest price so far on what decides."""
    best_step: int = 0
    best_epoch: float | None = 0.0
    """None where nobody knows how long the text is."""
    since: int = 0
    """How often prices were taken since then."""

    def note(self, prices: dict[str, float], chosen: float, progress: Progress, epoch: float | None) -> None:
        """Take new prices, of which `chosen` decides."""
        self.prices, self.step, self.seconds = prices, progress.step, progress.seconds
        self.since += 1
        if math.isfinite(chosen) and (self.best is None or chosen < self.best):
            self.best, self.since = chosen, 0
            self.best_step, self.best_epoch = progress.step, epoch

    def keeps(self, step: int) -> bool:
        """Whether the model of that step is the one to keep: the best, or any as long as none was priced."""
        return self.best is None or self.best_step == step


class Cooling(NamedTuple):
    """The end of a run that has stopped improving: from its best weights, the learning rate falls to 0."""

    begun: int
    """After so many steps."""
    steps: int
    share: float
    """How much of the run counts as done when it begins."""


def point(epoch: float | None, step: int) -> str:
    """A point of a run in words: its epoch, or its step where nobody knows how long the text is."""
    return f"step {step:,}" if epoch is None else f"epoch {epoch:.1f}"


def has_cooled(state: dict[str, Any]) -> bool:
    """Whether a checkpoint is of a run that has come to its end in this way."""
    return state["cooling"] is not None and state["step"] >= sum(state["cooling"][:2])


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Spent in steps; what checkpoints and held-out losses take is not counted."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    heldout: dict[str, float] = field(default_factory=dict)
    """Newest held-out losses, nats, of the ``weights`` and of their averages by name."""
    gradient_norm: float = 0.0
    """Of the newest step that was not skipped."""
    watch: Watch = field(default_factory=Watch)
    """What was seen of held-out prices."""
    cooling: Cooling | None = None

    def watch_due(self, config: TrainingConfig, times: int) -> bool:
        """Whether it is time to price held-out text, so many times in the run; always at its end."""
        if not times:
            return False
        then = Progress(step=self.watch.step, seconds=self.watch.seconds, cooling=self.cooling)
        share, before = self.share(config), then.share(config)
        return share >= 1 or share - before >= 1 / times

    def cooled(self, config: TrainingConfig) -> tuple[float, float]:
        """How much of the run was done when its cooling began, or now if it has not; how much of the cooling is."""
        if self.cooling is None:
            return self.share(config), 0.0
        return self.cooling.share, min(1.0, (self.step - self.cooling.begun) / self.cooling.steps)

    def share(self, config: TrainingConfig) -> float:
        """How much of the run is done, 0 to 1."""
        if self.cooling is not None:
            begun, done = self.cooled(config)
            return min(1.0, begun + (1 - begun) * done)
        if config.minutes:
            return min(1.0, self.seconds / (60 * config.minutes))
        return self.step / (config.steps or 20_000)


class Unread(NamedTuple):
    """What the device has counted and the host has not read yet: tensors without axes."""

    tokens: Tensor
    """Since they were last read, as `skipped` steps."""
    skipped: Tensor
    skipped_in_a_row: Tensor
    gradient_norm: Tensor
    """Of the newest step that was not skipped."""
    loss: Tensor
    """Of the newest step, as `norm` is."""
    norm: Tensor

    @classmethod
    def after(cls, progress: Progress, device: torch.device) -> Unread:
        """Nothing but what goes on from what was read."""
        values = 0, 0, progress.skipped_in_a_row, progress.gradient_norm, 0.0, 0.0
        return cls(*(torch.tensor(value, device=device) for value in values))

    def add(self, found: Sums, norm: Tensor, finite: Tensor) -> Unread:
        """After a step of all ranks together, which was skipped unless its loss and gradient are finite."""
        tokens, skipped = self.tokens + found.tokens.long(), self.skipped + ~finite
        in_a_row = torch.where(finite, 0, self.skipped_in_a_row + 1)
        return Unread(tokens, skipped, in_a_row, torch.where(finite, norm, self.gradient_norm), found.loss, norm)

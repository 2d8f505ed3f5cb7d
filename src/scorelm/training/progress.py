"""How far a run has come, and what the device has counted of it that nobody has read yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from scorelm.config.recipe import TrainingConfig
from scorelm.training.metrics import Sums


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

    def share(self, config: TrainingConfig) -> float:
        """How much of the run is done, 0 to 1."""
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

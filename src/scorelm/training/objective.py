"""What can be learned: score diffusion and its two peers in the same trunk, each a way to draw and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from scorelm.baselines.autoregressive import draw_targets, next_token_loss
from scorelm.baselines.masked import draw_masks
from scorelm.model.denoiser import Denoiser
from scorelm.training.loss import Draw, Outcome, draw_noise, score_loss


class Objective(NamedTuple):
    """A training objective.

    Attributes:
        draw: ``draw(batch, noise config, schedule, rng)``: what is to be predicted from what.
        loss: ``loss(denoiser, draw, schedule, training config, live=, self_conditioned=)``.
        self_conditions: whether a first pass may be fed back.
    """

    draw: Callable[..., Draw]
    loss: Callable[..., Outcome]
    self_conditions: bool


OBJECTIVES: dict[str, Objective] = {
    "score": Objective(draw_noise, score_loss, True),
    "masked": Objective(draw_masks, score_loss, False),
    "autoregressive": Objective(draw_targets, next_token_loss, False),
}
"""Every objective by name."""


class Loss(nn.Module):
    """A denoiser with its loss as `forward`, which is what DDP and FSDP watch."""

    def __init__(self, denoiser: Denoiser, objective: Objective) -> None:
        super().__init__()
        self.denoiser, self.objective = denoiser, objective

    def forward(self, draw: Draw, *settings: Any, **how: Any) -> Outcome:
        return self.objective.loss(self.denoiser, draw, *settings, **how)

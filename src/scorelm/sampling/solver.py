"""Solvers: how a position moves from its noise level to a lower one, given the posterior over its token.

All are elementwise in a per-position sigma, and exact at both ends: from sigma inf (no evidence) the state is fresh
noise, at sigma 0 it is an embedding. A step to the level a position already has leaves it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scorelm.noise.path import parse_call


class Draws(Protocol):
    """Random numbers for a step, from generators that belong to the rows."""

    def normal(self) -> Tensor:
        """Standard normal [N, E]."""

    def token(self, logits_NV: Tensor) -> Tensor:
        """Token ids [N] drawn from softmax(logits)."""


@dataclass(frozen=True)
class Step:
    """A step of N positions from `sigma_N` to `target_N` (0 <= target <= sigma <= inf, target finite)."""

    x_NE: Tensor
    sigma_N: Tensor
    target_N: Tensor
    logits_NV: Tensor
    table_VE: Tensor
    draws: Draws


@dataclass(frozen=True)
class Solver:
    """A rule that makes steps.

    Attributes:
        name: how it is written, with its argument.
        move: the new x [N, E] of a `Step`.
        stochastic: whether a position that finishes draws its token from the posterior or takes the likeliest.
    """

    name: str
    move: Callable[[Step], Tensor]
    stochastic: bool


def towards(step: Step, x0_NE: Tensor, eta: float) -> Tensor:
    """Move to the target level around the clean estimate `x0_NE`, with a share of fresh noise.

    ``x' = x0 + down (x - x0) / sigma + up eps`` with ``up = eta target sqrt(1 - target^2 / sigma^2)`` and
    ``down^2 + up^2 = target^2``: the ancestral step in variance-exploding form (DDPM posterior for eta = 1, DDIM,
    arXiv 2010.02502, for eta = 0). From sigma inf, ``(x - x0) / sigma`` is the standard normal that it tends to.
    """
    sigma_N1, target_N1 = step.sigma_N[:, None], step.target_N[:, None]
    sigma_N1 = torch.where(sigma_N1 == 0, 1.0, sigma_N1)  # already finished: nothing of the residual is kept
    residual_NE = torch.where(sigma_N1.isinf(), step.draws.normal(), (step.x_NE - x0_NE) / sigma_N1)
    up_N1 = eta * target_N1 * (1 - (target_N1 / sigma_N1) ** 2).clamp(min=0).sqrt()
    down_N1 = (target_N1**2 - up_N1**2).clamp(min=0).sqrt()
    moved_NE = x0_NE + down_N1 * residual_NE
    return moved_NE + up_N1 * step.draws.normal() if eta else moved_NE


def posterior_mean(step: Step) -> Tensor:
    """Score interpolation: ``softmax(logits) @ table``, [N, E]."""
    return step.logits_NV.softmax(-1) @ step.table_VE


def euler() -> Solver:
    """Deterministic Euler step of the probability-flow ODE ``dx = (x - x0) / sigma dsigma`` (= DDIM).

    Right for paths that are fixed in advance; biased where the levels depend on the state.
    """
    return Solver("euler", lambda step: towards(step, posterior_mean(step), 0.0), stochastic=False)


def ancestral(eta: float = 1.0) -> Solver:
    """Step towards the posterior mean with fresh noise; eta = 1 is the Euler-Maruyama step of localization.

    Right in the limit of small steps on any path, even one chosen from the state.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ancestral needs an eta from 0 to 1, got {eta:g}")
    return Solver(f"ancestral:{eta:g}", lambda step: towards(step, posterior_mean(step), eta), stochastic=True)


def posterior() -> Solver:
    """Draw the clean token from the posterior, then step towards its embedding with fresh noise.

    Exact for one position at any step size; its only error is that the tokens of one step are drawn independently.
    """

    def move(step: Step) -> Tensor:
        return towards(step, step.table_VE[step.draws.token(step.logits_NV)], 1.0)

    return Solver("posterior", move, stochastic=True)


SOLVERS: dict[str, Callable[..., Solver]] = {"euler": euler, "ancestral": ancestral, "posterior": posterior}
"""Every solver by name; each takes at most one number."""


def make_solver(text: str) -> Solver:
    """The solver written as ``name`` or ``name:number``, such as ``ancestral:0.5``.

    Raises:
        ValueError: unknown name or bad argument.
    """
    solver: Solver = parse_call(text, SOLVERS, "solver")
    return solver

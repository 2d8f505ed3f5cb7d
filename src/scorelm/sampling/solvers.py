"""Solvers: how a position moves from its noise level to a lower one, given the posterior over its token.

All are elementwise in a per-position sigma, and exact at both ends: from sigma inf (no evidence) the state is fresh
noise, at sigma 0 it is an embedding. A step to the level a position already has leaves it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scorelm.config.registry import read
from scorelm.errors import InputError
from scorelm.noise.forward import add_noise
from scorelm.sampling.guidance import keep_likeliest


class Draws(Protocol):
    """Random numbers for a step, from generators that belong to the rows."""

    def normal(self) -> Tensor:
        """Standard normal [N, E]."""

    def token(self, logits_NV: Tensor) -> Tensor:
        """Token ids [N] drawn from softmax(logits)."""


class Estimate(NamedTuple):
    """A clean estimate and the level that it was made at."""

    x0_NE: Tensor
    sigma_N: Tensor


@dataclass(frozen=True)
class Step:
    """A step of N positions from `sigma_N` to `target_N` (0 <= target <= sigma <= inf, target finite)."""

    x_NE: Tensor
    sigma_N: Tensor
    target_N: Tensor
    logits_NV: Tensor
    """Logits of the posterior at `x_NE` and `sigma_N`."""
    table_VE: Tensor
    draws: Draws
    before: Estimate | None = None
    """Each position's tempered estimate of the step before, at sigma inf where there was none."""
    score_temperature: float = 1.0
    """Divides the score."""


@dataclass(frozen=True)
class Solver:
    """A rule that makes steps.

    Attributes:
        name: how it is written, with its argument.
        move: the new x [N, E] of a `Step`.
        stochastic: whether a position that finishes draws its token from the posterior or takes the likeliest.
        correct: ``correct(step, moved_NE, logits_NV)``: a better new x, given the logits at where `move` has led
            (`far_end`); this takes another evaluation.
        churn: ``churn(sigma_N, steps)``: the level, at or above sigma_N, that noise is added up to before a step.
        churn_noise: standard deviation of that noise, 1 in theory.
        follows_score: whether the score's temperature means anything.
        top_k: limits the tokens that are drawn, as `top_p` does; see `keep_likeliest`.
        top_p: see `top_k`.
    """

    name: str
    move: Callable[[Step], Tensor]
    stochastic: bool
    correct: Callable[[Step, Tensor, Tensor], Tensor] | None = None
    churn: Callable[[Tensor, int], Tensor] | None = None
    churn_noise: float = 1.0
    follows_score: bool = True
    top_k: float = 0
    top_p: float = 1.0

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser in a step."""
        return 1 if self.correct is None else 2


def tempered(step: Step, x0_NE: Tensor, x_NE: Tensor, sigma_N: Tensor) -> Tensor:
    """The clean estimate whose score is that of `x0_NE` over the score temperature, [N, E].

    The score ``(x0 - x) / sigma^2`` divided by T is the score of ``x + (x0 - x) / T``; at sigma inf there is none.
    """
    if step.score_temperature == 1:
        return x0_NE
    return torch.where(sigma_N[:, None].isinf(), x0_NE, x_NE + (x0_NE - x_NE) / step.score_temperature)


def clean_estimate(step: Step, x_NE: Tensor, sigma_N: Tensor, logits_NV: Tensor) -> Tensor:
    """Score interpolation ``x0 = softmax(logits) @ table``, [N, E], tempered."""
    return tempered(step, logits_NV.softmax(-1) @ step.table_VE, x_NE, sigma_N)


def clean_here(step: Step) -> Tensor:
    """`clean_estimate` at the state that the step starts from."""
    return clean_estimate(step, step.x_NE, step.sigma_N, step.logits_NV)


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


def euler_step(step: Step) -> Tensor:
    """One Euler step of the probability flow ``dx = (x - x0) / sigma dsigma``."""
    return towards(step, clean_here(step), 0.0)


def euler() -> Solver:
    """Deterministic Euler step of the probability flow (DDIM). Not for adaptive paths, where it is biased."""
    return Solver("euler", euler_step, stochastic=False)


def bends(sigma: Tensor, target: Tensor) -> Tensor:
    """Whether a step between two levels has a slope at its far end: both are finite and above 0, and it goes down."""
    return (target > 0) & (target < sigma) & sigma.isfinite()


def far_end(step: Step, moved_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a step's far end is judged: a mask [N] of positions that move between two finite levels, their x and sigma.

    A step to 0, or from inf, has no slope at its far end: such positions stay where they were.
    """
    inner_N = bends(step.sigma_N, step.target_N)
    x_NE = torch.where(inner_N[:, None], moved_NE, step.x_NE)
    return inner_N, x_NE, torch.where(inner_N, step.target_N, step.sigma_N)


def trapezoid(step: Step, moved_NE: Tensor, logits_NV: Tensor) -> Tensor:
    """The step by the mean of the slopes at both ends (EDM, arXiv 2206.00364, Alg. 1, line 8)."""
    inner_N, x_NE, sigma_N = far_end(step, moved_NE)
    far_NE = clean_estimate(step, x_NE, sigma_N, logits_NV)
    safe_N1, safe_target_N1 = (torch.where(inner_N, t, 1.0)[:, None] for t in (step.sigma_N, step.target_N))
    slope_NE = ((step.x_NE - clean_here(step)) / safe_N1 + (moved_NE - far_NE) / safe_target_N1) / 2
    return torch.where(inner_N[:, None], step.x_NE + (safe_target_N1 - safe_N1) * slope_NE, moved_NE)


def heun() -> Solver:
    """Heun's second-order step of the probability flow, two evaluations a step (EDM). Not for adaptive paths."""
    return Solver("heun", euler_step, stochastic=False, correct=trapezoid)


def dpmpp_2m() -> Solver:
    """Second-order multistep DPM-Solver++, one evaluation a step. Not for adaptive paths.

    arXiv 2211.01095, Alg. 2, in variance-exploding form with ``t = -log sigma``. The estimate is extrapolated from the
    step before, ``x0 + (x0 - x0_before) / 2r`` with r the ratio of the two steps in t; where there was none, the step
    is Euler's.
    """

    def move(step: Step) -> Tensor:
        if step.before is None:
            return euler_step(step)
        x0_NE = clean_here(step)
        before_N = step.before.sigma_N
        known_N = before_N.isfinite() & (before_N > step.sigma_N) & (step.target_N > 0)
        ratio_N = (step.sigma_N / step.target_N).log() / (before_N / step.sigma_N).log()
        half_N1 = torch.where(known_N, ratio_N / 2, 0.0)[:, None]
        return towards(step, x0_NE + half_N1 * (x0_NE - step.before.x0_NE), 0.0)

    return Solver("dpmpp_2m", move, stochastic=False)


def ancestral(eta: float = 1.0) -> Solver:
    """Step towards the posterior mean with fresh noise, a share ETA of it; right on any path if steps are small.

    With eta = 1 it is the Euler-Maruyama step of localization.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"ancestral needs an eta from 0 to 1, got {eta:g}")

    def move(step: Step) -> Tensor:
        return towards(step, clean_here(step), eta)

    return Solver(f"ancestral:{eta:g}", move, stochastic=True)


def sde(churn: float = 40.0, s_noise: float = 1.0, s_min: float = 0.0, s_max: float = math.inf) -> Solver:
    """Noise is added before each step of heun (EDM's stochastic sampler, arXiv 2206.00364, Alg. 2).

    The level rises to ``sigma (1 + gamma)`` with ``gamma = min(churn / steps, sqrt(2) - 1)`` where sigma is within
    [s_min, s_max], by noise of standard deviation `s_noise`. On adaptive paths the added noise costs an evaluation
    and biases the law, as it does in `renoise`.
    """
    if not (0 <= churn < math.inf and 0 <= s_noise < math.inf and 0 <= s_min <= s_max):
        raise InputError(
            "sde needs churn and s_noise of 0 or more and s_min up to s_max, "
            f"got {churn:g},{s_noise:g},{s_min:g},{s_max:g}"
        )

    def raised(sigma_N: Tensor, steps: int) -> Tensor:
        gamma = min(churn / steps, math.sqrt(2) - 1)
        return torch.where((sigma_N >= s_min) & (sigma_N <= s_max), sigma_N * (1 + gamma), sigma_N)

    name = f"sde:{churn:g},{s_noise:g},{s_min:g},{s_max:g}"
    return Solver(name, euler_step, stochastic=True, correct=trapezoid, churn=raised, churn_noise=s_noise)


def drawn(step: Step, top_k: float, top_p: float) -> Tensor:
    """Embeddings of tokens drawn from the posterior, [N, E]."""
    return step.table_VE[step.draws.token(keep_likeliest(step.logits_NV, top_k, top_p))]


def posterior(top_k: float = 0, top_p: float = 1.0) -> Solver:
    """Draw a token, then step towards its embedding with fresh noise.

    The token is drawn from the posterior, or only from its `top_k` likeliest tokens (0: all) or those that make up
    `top_p` of the probability. Exact for one position at any step size; the only error is that the tokens of one step
    are drawn independently.
    """
    keep_likeliest(torch.zeros(1, 1), top_k, top_p)  # refuse what is out of range now
    name = "posterior" if (top_k, top_p) == (0, 1.0) else f"posterior:{top_k:g},{top_p:g}"

    def move(step: Step) -> Tensor:
        return towards(step, drawn(step, top_k, top_p), 1.0)

    return Solver(name, move, stochastic=True, follows_score=False, top_k=top_k, top_p=top_p)


def renoise() -> Solver:
    """Draw a token, then noise its embedding afresh to the next level.

    Forgets the state but for the token, so it is exact for one position on a fixed path, as `posterior` is, and changes
    its mind more. On adaptive paths it is biased towards what the model is sure of, the more the more steps there are.
    """

    def move(step: Step) -> Tensor:
        still_N1 = (step.target_N == step.sigma_N)[:, None]
        fresh_NE = add_noise(drawn(step, 0, 1.0), step.target_N, step.draws.normal())
        return torch.where(still_N1, step.x_NE, fresh_NE)

    return Solver("renoise", move, stochastic=True, follows_score=False)


SOLVERS: dict[str, Callable[..., Solver]] = {
    s.__name__: s for s in (posterior, renoise, ancestral, sde, euler, heun, dpmpp_2m)
}
"""Every solver by name, with the numbers it takes."""


def make_solver(text: str) -> Solver:
    """The solver written as ``name`` or with its numbers, such as ``ancestral:0.5`` or ``posterior:50,0.9``.

    Raises:
        InputError: unknown name or bad argument.
    """
    return read(text, SOLVERS, "solver")

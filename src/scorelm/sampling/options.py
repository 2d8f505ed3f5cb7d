"""How to generate: a path, a solver, a budget of evaluations, and what may be done to the posterior on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from scorelm.noise.path import make_path
from scorelm.noise.plan import Path
from scorelm.sampling.guidance import Guidance
from scorelm.sampling.halting import Halting, make_halting
from scorelm.sampling.solver import Solver, make_solver

PRECISIONS = ("float32", "bfloat16", "auto")


@dataclass(frozen=True)
class Options:
    """How to generate.

    Raises:
        ValueError: a value out of range, or a score temperature for a solver that draws tokens.
    """

    path: Path
    solver: Solver
    steps: int
    """Most evaluations of the denoiser; `blocks` takes one a block or more, and guidance as many again."""
    guidance: Guidance = field(default_factory=Guidance)
    halting: Halting | None = None
    window: int = 0
    """On a path of blocks, how many positions back a block sees; 0 for all."""
    nats_per_step: float | None = None
    """On the paths `confidence` and `entropy`, a step's budget in each row; the number of steps is then an outcome."""
    repair: float | None = None
    """Level u, from 0 to 1, of the noise that given tokens get, so that they are written anew; None leaves them."""
    precision: str = "float32"
    """Of the denoiser's matrix products; bfloat16 is faster, and then a row may depend on its batch by a rounding."""

    def __post_init__(self) -> None:
        if self.repair is not None and not 0 < self.repair < 1:
            raise ValueError(f"the level of a repair must be between 0 and 1, got {self.repair:g}")
        if self.repair is not None and (self.path.block or self.guidance.weight != 1):
            raise ValueError("a repair sees the whole text and has no prompt: it takes no path of blocks, no guidance")
        if self.nats_per_step is not None:
            if not self.path.budgeted:
                raise ValueError(f"{self.path.name} has no budget of nats: use confidence or entropy")
            if not 0 < self.nats_per_step < math.inf:
                raise ValueError(f"nats per step must be above 0, got {self.nats_per_step:g}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"no precision {self.precision!r}: choose {', '.join(PRECISIONS)}")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")
        if self.guidance.score_temperature != 1 and not self.solver.follows_score:
            raise ValueError(f"{self.solver.name} draws tokens and has no score to temper: use temperature")
        if self.window and not 0 < max(1, self.path.block) <= self.window:
            raise ValueError(f"a block of {self.path.block} is longer than the {self.window} positions that it may see")
        if self.window and (not self.path.block or not self.guidance.one_pass):
            raise ValueError("only a path of blocks, without guidance, has a window")

    @property
    def path_steps(self) -> int:
        """Steps of the path that take `steps` evaluations at most.

        Solvers of several evaluations take one in the first step and save one in the last; on an adaptive path,
        added noise makes what was observed void, which costs one more.
        """
        each = self.solver.evaluations + (self.path.adaptive and self.solver.churn is not None)
        return self.steps if each == 1 else self.steps // each + 1


def make_options(
    path: str = "bounded",
    solver: str = "posterior",
    steps: int = 64,
    halt: str | None = None,
    guidance: float = 1.0,
    self_guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    score_temperature: float = 1.0,
    nats_per_step: float | None = None,
    precision: str = "float32",
) -> Options:
    """How to generate, in words and numbers: what `sample` and `infill` take by keyword.

    Args:
        path: ``bounded:NATS``, ``surest``, ``shuffled``, ``remask:SHARE``, ``uniform``, ``ramp:SLOPE``,
            ``blocks:SIZE``, ``confidence:NATS`` or ``entropy:NATS``; numbers may be left out.
        solver: ``posterior:TOP_K,TOP_P``, ``renoise``, ``ancestral:ETA``, ``sde:CHURN,S_NOISE,S_MIN,S_MAX``, ``euler``,
            ``heun`` or ``dpmpp_2m``; numbers may be left out.
        steps: evaluations of the denoiser; ``blocks`` takes at least one a block, and guidance more.
        halt: ``entropy:NATS``, ``patience:STEPS`` or ``kl:NATS`` ends rows early; None for not.
        guidance: weight of classifier-free guidance by what is given; 1 is none.
        self_guidance: weight of self-conditioning guidance; 1 is none.
        temperature: divides the logits.
        top_k: keeps the likeliest tokens alone; 0 keeps all.
        top_p: keeps the likeliest tokens that make up this probability alone.
        score_temperature: divides the score, for solvers that follow it.
        nats_per_step: on ``confidence`` and ``entropy``, what a step may spend in each text, within `steps` at most.
        precision: ``float32``; ``bfloat16``; or ``auto``, which is bfloat16 where the processor has it natively. A
            row depends on its batch by a rounding, which is seldom enough to change a token in ``float32``.

    Raises:
        ValueError: a bad option.
    """
    halting = make_halting(halt) if halt else None
    guide = Guidance(guidance, self_guidance, temperature, top_k, top_p, score_temperature)
    return Options(
        make_path(path), make_solver(solver), steps, guide, halting, nats_per_step=nats_per_step, precision=precision
    )

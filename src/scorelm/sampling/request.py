"""A request with its words read: path, solver and halting criterion as objects, every combination checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from scorelm.config.generation import Generation, Infilling
from scorelm.errors import InputError
from scorelm.sampling.halting import Halting, make_halting
from scorelm.sampling.paths import Path, make_path
from scorelm.sampling.solvers import Solver, make_solver

MOST_STEPS = 128
"""Of a text that is not told how many; those that write at once seldom need as many."""
LEAST_TEMPERATURE = 0.001
"""What logits can be divided by; below it, nothing is drawn."""


@dataclass(frozen=True)
class Settings:
    """How to generate, ready to be used.

    Attributes:
        options: the request as it was made.
        path: order in which noise is removed.
        solver: rule that makes a step.
        halting: what ends rows early, if anything.
        window: on a path of blocks, how many positions back a block sees; 0 for all.
        candidates: how many of the likeliest tokens the record of a step has for each position.
    """

    options: Generation
    path: Path
    solver: Solver
    halting: Halting | None = None
    window: int = 0
    candidates: int = 0

    @classmethod
    def of(cls, options: Generation, default_path: str = "bounded", window: int = 0) -> Self:
        """The settings of a request; no model is needed.

        Raises:
            InputError: a name that there is not, a number out of range, or options that do not go together.
        """
        path, solver = make_path(default_path if options.path is None else options.path), make_solver(options.solver)
        halting = None if options.halt is None else make_halting(options.halt)
        return cls(options, path, solver, halting, window).checked()

    def checked(self) -> Self:
        """The settings, if they go together.

        Raises:
            InputError: they do not.
        """
        options, path = self.options, self.path
        if self.repair is not None and (path.block or options.guidance != 1):
            raise InputError("a repair works on the whole text and has no prompt: use neither blocks nor guidance")
        if options.nats_per_step is not None and not path.budgeted:
            raise InputError(f"{path} does not count nats: use nats per step with confidence or entropy")
        if options.score_temperature != 1 and not self.solver.follows_score:
            raise InputError(f"{self.solver.name} draws tokens and follows no score: use temperature instead")
        if self.window and path.block > self.window:
            raise InputError(f"a block of {path.block} tokens is longer than the {self.window} that it may see")
        if self.window and (not path.block or not self.one_pass):
            raise InputError("only a path of blocks, without guidance, can go beyond the length of the model")
        return self

    @property
    def repair(self) -> float | None:
        """Level of the noise that given tokens get, so that they are written anew; None leaves them."""
        return self.options.repair if isinstance(self.options, Infilling) else None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is written always, and no logits are divided: they are what a path looks at."""
        return self.options.temperature < LEAST_TEMPERATURE

    @property
    def one_pass(self) -> bool:
        """Whether guidance takes no further evaluation."""
        return self.options.guidance == self.options.self_guidance == 1

    @property
    def evaluations(self) -> int:
        """Most evaluations that a text takes; paths of blocks make one for each block, be they more."""
        if self.options.steps is not None:
            return self.options.steps
        return 1 if self.path.block == 1 else MOST_STEPS

    @property
    def path_steps(self) -> int:
        """Steps of the path that take `evaluations` at most.

        Solvers of several evaluations take one in the first step and save one in the last; on an adaptive path,
        added noise makes the prediction void, which costs one more.
        """
        each = self.solver.evaluations + (self.path.adaptive and self.solver.churn is not None)
        return self.evaluations if each == 1 else self.evaluations // each + 1

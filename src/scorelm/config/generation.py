"""A request to a trained model, declared once: flags, keyword arguments and (later) the server's JSON are these models.

Paths, solvers and halting criteria are named here as text; `scorelm.sampling` has their registries and reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt

from scorelm.config import Options

Precision = Literal["float32", "bfloat16", "auto"]
Weight = Annotated[float, Field(ge=0, le=1000)]
Temperature = Annotated[float, Field(ge=0.001, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Generation(Options):
    """How to write text."""

    steps: PositiveInt = 64
    """Most evaluations of the network for a text. Paths of blocks make at least one evaluation for each block, and each
    kind of guidance adds one to every step."""
    path: str | None = None
    """Order in which the noise is removed, such as bounded, uniform or blocks:4. By default bounded (the surest words
    first, several at once), or blocks:1 (left to right) for an autoregressive model."""
    nats_per_step: PositiveFloat | None = None
    """How much uncertainty each step may remove from a text, on the paths confidence and entropy; the number of steps
    then follows from it, up to --steps."""
    solver: str = "posterior"
    """Rule that takes a position from one noise level to the next, such as posterior, ancestral:0.5 or heun."""
    temperature: Temperature = 1.0
    """Divides the logits: below 1, text is safer and less varied."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the K likeliest tokens only; 0 draws from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability only."""
    guidance: Weight = 1.0
    """Weight of classifier-free guidance by the given text; 1 turns it off."""
    self_guidance: Weight = 1.0
    """Weight of guidance by the model's own last estimate; 1 turns it off."""
    score_temperature: Temperature = 1.0
    """Divides the score, for solvers that follow the score rather than draw tokens."""
    halt: str | None = None
    """Finish a text (on blocks, a block) as soon as it has settled: entropy:NATS, patience:STEPS or kl:NATS."""
    best_of: PositiveInt = 1
    """Write N candidates for each sample and keep the best one."""
    choose: Literal["mbr", "vote"] = "mbr"
    """How the best candidate is chosen: mbr keeps the one most like the others, vote the most frequent one."""
    precision: Precision = "float32"
    """Number format of matrix products: float32, bfloat16, or auto (bfloat16 where the hardware has it natively)."""
    seed: Seed = 0
    """Seed of the first text; each further text takes the next one."""


class Continuation(Generation):
    """How to continue a prompt."""

    length: int | None = None
    """Length of a text in tokens, both ends included; by default drawn from the lengths of the training text, except
    left to right (blocks:1), where the model itself ends the text."""
    max_length: PositiveInt | None = None
    """Most tokens in a text, by default the longest length that the model was trained on. Only paths of blocks can go
    beyond that, and blocks of more than one token then need --length."""


class Infilling(Generation):
    """How to fill in blanks."""

    blank_tokens: PositiveInt | None = None
    """Tokens in each blank; by default drawn so that the length of the whole suits the training text."""
    repair: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Doubt the given text too: put noise of this level (between 0 and 1) on all of it and write it anew, by default
    along the path uniform. The text then needs no blank."""


class Pricing(Options):
    """How to measure what texts cost."""

    path: str | None = None
    """What is priced. uniform (the default), ramp:SLOPE and blocks:SIZE are bounds in the limit of small steps; ordered
    (left to right) and reverse are exact; random is a mean over orders. With --steps, any path of scorelm sample."""
    steps: PositiveInt | None = None
    """Price the very sampler that makes N evaluations; by default 64 on paths that look at the text as they go."""
    draws: PositiveInt = 16
    """Noise levels (or orders, on random) that are averaged over for each text."""
    seed: Seed = 0
    """Seed of the noise."""
    precision: Precision = "float32"
    """Number format of matrix products: float32, bfloat16, or auto (bfloat16 where the hardware has it natively)."""


Function = TypeVar("Function", bound=Callable[..., Any])


def takes(options: type[Options]) -> Callable[[Function], Function]:
    """Show the fields of `options` as the keyword arguments that a function takes in its ``**options``, for ``help``.

    The function's own docstring is indented as usual, and ends with the section that the fields are added to.
    """

    def shown(function: Function) -> Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = options.model_fields.items()
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
            for name, field in fields
            if name not in {p.name for p in own}
        ]
        function.__signature__ = inspect.Signature([*own, *keywords])  # type: ignore[attr-defined]
        lines = "\n".join(f"    {name}: {' '.join((field.description or '').split())}" for name, field in fields)
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{lines}\n"
        return function

    return shown

"""A request to a trained model, declared once: flags, keyword arguments and the server's JSON are these models.

Paths, solvers and halting criteria are named here as text; `scorelm.sampling` has their registries and reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scorelm.config import Options

Precision = Literal["float32", "bfloat16", "auto"]
Weight = Annotated[float, Field(ge=0, le=1000)]
ScoreTemperature = Annotated[float, Field(ge=0.001, le=1000)]
Temperature = Annotated[float, Field(ge=0, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Generation(Options):
    """How to write text."""

    steps: PositiveInt | None = None
    """Most evaluations of the network for a text, by default 128, or on blocks:1 one for each token. The path bounded
    ends as soon as all is written, after about one for each word. Paths of blocks make at least one for each block, and
    each kind of guidance adds one to every step."""
    path: str | None = None
    """Order in which the noise is removed, such as bounded (the default: the surest words first, several at once),
    uniform or blocks:4."""
    nats_per_step: PositiveFloat | None = None
    """How much uncertainty each step may remove from a text, on the paths confidence and entropy; the number of steps
    then follows from it, up to --steps. By default all --steps are made."""
    solver: str = "posterior"
    """Rule that takes a position from one noise level to the next, such as posterior, ancestral:0.5 or heun."""
    temperature: Temperature = 1.0
    """Divides the logits."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the K likeliest tokens only; 0 draws from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability only."""
    guidance: Weight = 1.0
    """Above 1, favours what the given text makes likelier (classifier-free guidance); 1 turns it off."""
    self_guidance: Weight = 1.0
    """Above 1, favours what the model's own last estimate makes likelier; 1 turns it off."""
    score_temperature: ScoreTemperature = 1.0
    """Divides the score, for solvers that follow the score rather than draw tokens."""
    halt: str | None = None
    """Finish a text (on blocks, a block) as soon as it has settled: entropy:NATS, patience:STEPS or kl:NATS. By default
    it goes on to the end of its path."""
    best_of: PositiveInt = 1
    """Write N candidates for each sample and keep the best one."""
    choose: Literal["mbr", "vote"] = "mbr"
    """How the best candidate is chosen: mbr keeps the one most like the others, vote the most frequent one."""
    precision: Precision = "float32"
    """Number format of matrix products: float32, bfloat16, or auto (bfloat16 where the hardware has it natively)."""
    seed: Seed = 0
    """Seed of the first text; each further text takes the next one."""


class Request(Generation):
    """What a request for text has of its own, be it a continuation or a filling."""

    temperature: Temperature = 0.75
    """Divides the logits: below 1, text is safer and less varied. At 1, with --top-p 1, tokens are drawn from the
    model's own probabilities, which are what prices measure. Below 0.001 the likeliest token is always taken, and the
    seed decides only lengths."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw from the likeliest tokens that together have this probability only; 1 draws from all."""


class Continuation(Request):
    """How to continue a prompt."""

    path: str | None = None
    """Order in which the noise is removed, such as bounded, uniform or blocks:4. By default blocks:1 (left to right),
    which reads best; but bounded (the surest words first, several at once) with options that mean nothing there
    (--steps, --length, --solver, --halt, --self-guidance and the like), or if the model is not good at it. An
    autoregressive model knows no other path than blocks:1."""
    length: int | None = None
    """Length of a text in tokens, both ends included. By default the model itself ends the text, and on paths other
    than blocks:1 the length is drawn from those of the training text."""
    max_length: PositiveInt | None = None
    """Most tokens in a text, by default the longest length that the model was trained on. Only paths of blocks can go
    beyond that, and blocks of more than one token then need --length."""


class Infilling(Request):
    """How to fill in blanks."""

    blank: Annotated[str, Field(min_length=1)] = "____"
    """Sign that stands for a blank; the default means four underscores or more. A backslash before a sign makes it
    text."""
    blank_tokens: PositiveInt | None = None
    """Tokens in each blank; by default --blank-words decides."""
    blank_words: PositiveInt | None = None
    """Words of letters and digits in each blank; by default one to three. Where words are not separated by spaces, by
    default as many tokens as make the whole text about as long as those of training."""
    repair: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Doubt the given text too: put noise of this level (between 0 and 1) on all of it and write it anew, by default
    along the path uniform. The text then needs no blank, and nothing in it is sure to come back."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.blank_tokens is not None and self.blank_words is not None:
            raise ValueError("give either blank tokens or blank words, not both")
        return self


class Pricing(Options):
    """How to measure what texts cost."""

    path: str | None = None
    """Order of writing that is measured. ordered (left to right), reverse, bounded and surest are exact; uniform (the
    default), ramp:SLOPE and blocks:SIZE are upper bounds in the limit of small steps; random is an upper bound, the
    mean over some orders. With --steps, any path of scorelm sample but remask: an upper bound, but for bounded, surest
    and a single step."""
    steps: PositiveInt | None = None
    """Measure what texts cost when they are written in N evaluations of the network. By default 64, but on uniform,
    ramp and blocks the limit of small steps."""
    draws: PositiveInt = 16
    """Noise levels (or orders, on random) that are averaged over for each text."""
    lossy: bool = False
    """Leave out characters that the tokenizer cannot spell, and count bits per character over the text that comes back
    from it. By default a text with such characters is refused, and bits per character are left out where a text does
    not come back as it was."""
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

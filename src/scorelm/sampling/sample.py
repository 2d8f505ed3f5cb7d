"""Text in, text out: prompts and blanks become templates, `generate` fills them, the tokenizer reads the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scorelm.model.scorelm import ScoreLM
from scorelm.noise.path import make_path
from scorelm.sampling.generate import Options, StepRecord, generate
from scorelm.sampling.solver import make_solver
from scorelm.text.conditioning import Template, blank_template, prompt_template


@dataclass(frozen=True)
class Sample:
    """A generated text."""

    text: str
    ids: list[int]
    """Token ids, ``<s>`` and ``</s>`` included."""
    seed: int
    """Seed of this row: the same request with it gives the same text."""
    nfe: int
    """Evaluations of the denoiser that the row took."""


Watch = Callable[[StepRecord], object]


def run(
    lm: ScoreLM, templates: Sequence[Template], seeds: Sequence[int], options: Options, watch: Watch | None
) -> list[Sample]:
    """Generate to the end and decode."""
    record: StepRecord | None = None
    for record in generate(lm.denoiser, lm.schedule, templates, seeds, options):
        if watch is not None:
            watch(record)
    if record is None:  # nothing was free
        rows, nfe = [[token for token in t if token is not None] for t in templates], [0] * len(templates)
    else:
        rows = [ids[:n] for ids, n in zip(record.ids_BL.tolist(), record.length_B.tolist(), strict=True)]
        nfe = record.nfe_B.tolist()
    decoded = [lm.tokenizer.decode(ids).strip() for ids in rows]
    return [Sample(*parts) for parts in zip(decoded, rows, seeds, nfe, strict=True)]


DEFAULT_PATH, DEFAULT_SOLVER, DEFAULT_STEPS = "uniform", "posterior", 64


def sample(
    lm: ScoreLM,
    prompts: Sequence[str] = ("",),
    n: int = 1,
    *,
    length: int | None = None,
    steps: int = DEFAULT_STEPS,
    path: str = DEFAULT_PATH,
    solver: str = DEFAULT_SOLVER,
    temperature: float = 1.0,
    seed: int = 0,
    watch: Watch | None = None,
) -> list[Sample]:
    """Continue each prompt `n` times.

    Args:
        lm: the model.
        prompts: texts to begin with; "" for none.
        n: samples for each prompt.
        length: tokens with both ends; by default drawn from the lengths of the training documents, except on
            ``blocks:1``, where the model ends the text itself.
        steps: evaluations of the denoiser; ``blocks`` takes at least one a block.
        path: ``uniform``, ``ramp:SLOPE`` or ``blocks:SIZE``.
        solver: ``posterior``, ``ancestral:ETA`` or ``euler``.
        temperature: divides the logits.
        seed: row i has seed + i.
        watch: called with every `StepRecord`.

    Raises:
        ValueError: a prompt that doesn't fit, or a bad option.
    """
    options = Options(make_path(path), make_solver(solver), steps, temperature)
    closed = options.path.block != 1 or length is not None
    repeated = [prompt for prompt in prompts for _ in range(n)]
    seeds = [seed + i for i in range(len(repeated))]
    templates = [
        prompt_template(prompt, lm.tokenizer, lm.lengths, length, closed, np.random.default_rng(s))
        for prompt, s in zip(repeated, seeds, strict=True)
    ]
    return run(lm, templates, seeds, options, watch) if templates else []


def infill(
    lm: ScoreLM,
    text: str,
    n: int = 1,
    *,
    blank_tokens: int | None = None,
    steps: int = DEFAULT_STEPS,
    path: str = "uniform",
    solver: str = DEFAULT_SOLVER,
    temperature: float = 1.0,
    seed: int = 0,
    watch: Watch | None = None,
) -> list[Sample]:
    """Fill every ``____`` in `text` in `n` ways; the options are those of `sample`.

    Args:
        lm: the model.
        text: text with blanks.
        n: number of ways.
        blank_tokens: tokens in each blank; by default the length is drawn from those of the training documents.
        steps: evaluations of the denoiser.
        path: as for `sample`; on ``blocks`` a blank does not see what is given in later blocks.
        solver: as for `sample`.
        temperature: divides the logits.
        seed: row i has seed + i.
        watch: called with every `StepRecord`.

    Raises:
        ValueError: no blank, a text that doesn't fit, or a bad option.
    """
    options = Options(make_path(path), make_solver(solver), steps, temperature)
    seeds = [seed + i for i in range(n)]
    templates = [blank_template(text, lm.tokenizer, lm.lengths, blank_tokens, np.random.default_rng(s)) for s in seeds]
    return run(lm, templates, seeds, options, watch) if templates else []

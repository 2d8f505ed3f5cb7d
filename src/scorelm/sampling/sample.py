"""Text in, text out: prompts and blanks become templates, `generate` fills them, the tokenizer reads the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scorelm.model.scorelm import ScoreLM
from scorelm.noise.path import make_path
from scorelm.sampling.choose import CHOICES
from scorelm.sampling.generate import Options, StepRecord, generate
from scorelm.sampling.guidance import Guidance
from scorelm.sampling.halting import make_halting
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


def options(
    path: str = "uniform",
    solver: str = "posterior",
    steps: int = 64,
    halt: str | None = None,
    guidance: float = 1.0,
    self_guidance: float = 1.0,
    **filters: float,
) -> Options:
    """How to generate, in words and numbers: the keyword options of `sample` and `infill`.

    Args:
        path: ``uniform``, ``ramp:SLOPE``, ``blocks:SIZE``, ``shuffled``, ``confidence:NATS`` or ``entropy:NATS``.
        solver: ``posterior:TOP_K,TOP_P``, ``renoise``, ``ancestral:ETA``, ``sde:CHURN,S_NOISE,S_MIN,S_MAX``, ``euler``,
            ``heun`` or ``dpmpp_2m``; numbers may be left out.
        steps: evaluations of the denoiser; ``blocks`` takes at least one a block, and guidance more.
        halt: ``entropy:NATS``, ``patience:STEPS`` or ``kl:NATS`` ends rows early; None for not.
        guidance: weight of classifier-free guidance by what is given; 1 is none.
        self_guidance: weight of self-conditioning guidance; 1 is none.
        filters: ``temperature``, ``top_k``, ``top_p``, ``score_temperature``; see
            `scorelm.sampling.guidance.Guidance`.

    Raises:
        ValueError: a bad option.
    """
    halting = make_halting(halt) if halt else None
    try:
        guide = Guidance(guidance, self_guidance, **filters)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"no such option: {str(error).rpartition(' ')[2]}") from None
    return Options(make_path(path), make_solver(solver), steps, guide, halting)


def best(samples: Sequence[Sample], of: int, choose: str) -> list[Sample]:
    """One out of every `of` samples in a row, at the price of all of them.

    Raises:
        ValueError: an unknown way to choose, or `of` below 1.
    """
    if of < 1 or choose not in CHOICES:
        raise ValueError(f"choose the best of 1 or more by {' or '.join(CHOICES)}, got {of} by {choose!r}")
    if of == 1:
        return list(samples)
    chosen = []
    for start in range(0, len(samples), of):
        group = samples[start : start + of]
        one = group[CHOICES[choose]([sample.text for sample in group])]
        chosen.append(replace(one, nfe=sum(sample.nfe for sample in group)))
    return chosen


def sample(
    lm: ScoreLM,
    prompts: Sequence[str] = ("",),
    n: int = 1,
    *,
    length: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    best_of: int = 1,
    choose: str = "mbr",
    watch: Watch | None = None,
    **how: Any,
) -> list[Sample]:
    """Continue each prompt `n` times.

    Args:
        lm: the model.
        prompts: texts to begin with; "" for none.
        n: samples for each prompt.
        length: tokens with both ends; by default drawn from the lengths of the training documents, except on
            ``blocks:1``, where the model ends the text itself.
        max_length: most tokens that ``blocks`` may write, by default the model's own longest; beyond it each block
            sees as many positions back as the model was trained on.
        seed: row i has seed + i.
        best_of: draw so many for each sample and keep one.
        choose: by minimum Bayes risk (``mbr``), or the most frequent text (``vote``).
        watch: called with every `StepRecord`.
        how: see `options`.

    Raises:
        ValueError: a prompt that doesn't fit, or a bad option.
    """
    chosen = options(**how)
    closed = chosen.path.block != 1 or length is not None
    longest = lm.max_length if max_length is None else max_length
    if longest > lm.max_length:
        if not chosen.path.block or chosen.guidance.weight != 1 or chosen.guidance.self_weight != 1:
            raise ValueError(
                f"the model was trained on at most {lm.max_length} tokens: only blocks, without guidance, go beyond"
            )
        chosen = replace(chosen, window=lm.max_length)
    repeated = [prompt for prompt in prompts for _ in range(n * best_of)]
    seeds = [seed + i for i in range(len(repeated))]
    templates = [
        prompt_template(prompt, lm.tokenizer, lm.lengths, length, longest, closed, np.random.default_rng(s))
        for prompt, s in zip(repeated, seeds, strict=True)
    ]
    return best(run(lm, templates, seeds, chosen, watch) if templates else [], best_of, choose)


def infill(
    lm: ScoreLM,
    texts: str | Sequence[str],
    n: int = 1,
    *,
    blank_tokens: int | None = None,
    seed: int = 0,
    best_of: int = 1,
    choose: str = "mbr",
    watch: Watch | None = None,
    **how: Any,
) -> list[Sample]:
    """Fill every ``____`` in each text in `n` ways.

    Args:
        lm: the model.
        texts: one text with blanks, or several.
        n: number of ways.
        blank_tokens: tokens in each blank; by default the length is drawn from those of the training documents.
        seed: row i has seed + i.
        best_of: draw so many for each sample and keep one.
        choose: by minimum Bayes risk (``mbr``), or the most frequent text (``vote``).
        watch: called with every `StepRecord`.
        how: see `options`; on ``blocks`` a blank does not see what is given in later blocks.

    Raises:
        ValueError: no blank, a text that doesn't fit, or a bad option.
    """
    chosen = options(**how)
    repeated = [text for text in ([texts] if isinstance(texts, str) else texts) for _ in range(n * best_of)]
    seeds = [seed + i for i in range(len(repeated))]
    templates = [
        blank_template(text, lm.tokenizer, lm.lengths, blank_tokens, np.random.default_rng(s))
        for text, s in zip(repeated, seeds, strict=True)
    ]
    return best(run(lm, templates, seeds, chosen, watch) if templates else [], best_of, choose)

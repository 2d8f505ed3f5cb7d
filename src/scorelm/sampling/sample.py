"""Text in, text out: prompts and blanks become templates, `generate` fills them, the tokenizer reads the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scorelm.model.scorelm import ScoreLM
from scorelm.sampling.choose import CHOICES
from scorelm.sampling.generate import Sampler, StepRecord, generate
from scorelm.sampling.options import Options, make_options
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
    lm: ScoreLM,
    requests: str | Sequence[str],
    template: Callable[[str, np.random.Generator], Template],
    n: int,
    seed: int,
    options: Options,
    watch: Watch | None,
) -> list[Sample]:
    """Answer every request `n` times: make its template, generate to the end and decode."""
    repeated = [request for request in ([requests] if isinstance(requests, str) else requests) for _ in range(n)]
    if n < 0 or not 0 <= seed < 2**63 - len(repeated):
        raise ValueError(f"n must be 0 or more and the seed from 0 to below 2^63, got {n} and {seed}")
    seeds = [seed + i for i in range(len(repeated))]
    templates = [template(text, np.random.default_rng(s)) for text, s in zip(repeated, seeds, strict=True)]
    if not templates:
        return []
    record: StepRecord | None = None
    for record in generate(lm.denoiser, lm.schedule, templates, seeds, options, sampler(lm, options)):
        if watch is not None:
            watch(record)
    if record is None:  # nothing was free
        rows, nfe = [[token for token in t if token is not None] for t in templates], [0] * len(templates)
    else:
        rows = [ids[:n] for ids, n in zip(record.ids_BL.tolist(), record.length_B.tolist(), strict=True)]
        nfe = record.nfe_B.tolist()
    decoded = [lm.tokenizer.decode(ids).strip() for ids in rows]
    return [Sample(*parts) for parts in zip(decoded, rows, seeds, nfe, strict=True)]


def sampler(lm: ScoreLM, options: Options) -> type[Sampler]:
    """What makes the steps of a model: every path for a score model, one for each of its peers.

    Raises:
        ValueError: a path that the model was not trained for.
    """
    if lm.objective == "masked" and not options.path.jumps:
        raise ValueError(f"a masked model knows no noise but all or none: use bounded, not {options.path.name}")
    if lm.objective != "autoregressive":
        return Sampler
    if options.path.block != 1:
        raise ValueError(f"an autoregressive model writes left to right: use blocks:1, not {options.path.name}")
    if not options.guidance.one_pass:
        raise ValueError("an autoregressive model has no unconditional pass: it takes no guidance")
    from scorelm.baselines.autoregressive import AutoregressiveSampler

    return AutoregressiveSampler


def own_path(lm: ScoreLM, path: str | None) -> str:
    """The path asked for, or the one that suits the model."""
    return path or ("blocks:1" if lm.objective == "autoregressive" else "bounded")


def check_choice(of: int, choose: str) -> None:
    """Refuse, before a long generation, what `best` could not do.

    Raises:
        ValueError: an unknown way to choose, `of` below 1, or sacrebleu is missing.
    """
    if of < 1 or choose not in CHOICES:
        raise ValueError(f"choose the best of 1 or more by {' or '.join(CHOICES)}, got {of} by {choose!r}")
    if of > 1:
        CHOICES[choose](["", ""])


def best(samples: Sequence[Sample], of: int, choose: str) -> list[Sample]:
    """One out of every `of` samples in a row, at the price of all of them."""
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
    prompts: str | Sequence[str] = ("",),
    n: int = 1,
    *,
    length: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    best_of: int = 1,
    choose: str = "mbr",
    watch: Watch | None = None,
    path: str | None = None,
    **how: Any,
) -> list[Sample]:
    """Continue each prompt `n` times.

    Args:
        lm: the model.
        prompts: a text to begin with, or several; "" for none.
        n: samples for each prompt.
        length: tokens with both ends; by default drawn from the lengths of the training documents, except on
            ``blocks:1``, where the model ends the text itself.
        max_length: most tokens, by default the model's own longest. Beyond that only ``blocks`` goes, each block seeing
            at most as many positions as the model was trained on; sizes above 1 go there with a `length` alone.
        seed: row i has seed + i.
        best_of: draw so many rows for each sample and keep one.
        choose: by minimum Bayes risk (``mbr``), or the most frequent text (``vote``).
        watch: called with every `StepRecord`.
        path: see `scorelm.sampling.options.make_options`, as for the rest; by default ``bounded``, and for an
            autoregressive model ``blocks:1``.
        how: solver, steps, temperature and so on.

    Raises:
        ValueError: a prompt that doesn't fit, or a bad option.
    """
    check_choice(best_of, choose)
    chosen = make_options(own_path(lm, path), **how)
    closed = chosen.path.block != 1 or length is not None
    longest = lm.max_length if max_length is None else max_length
    if longest > lm.max_length:
        if not chosen.path.block or not chosen.guidance.one_pass:
            raise ValueError(
                f"the model was trained on at most {lm.max_length} tokens: only blocks, without guidance, go beyond"
            )
        chosen = replace(chosen, window=lm.max_length)

    def template(prompt: str, rng: np.random.Generator) -> Template:
        return prompt_template(prompt, lm.tokenizer, lm.lengths, length, longest, closed, rng)

    return best(run(lm, prompts, template, n * best_of, seed, chosen, watch), best_of, choose)


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
    path: str | None = None,
    repair: float | None = None,
    **how: Any,
) -> list[Sample]:
    """Fill every ``____`` in each text in `n` ways.

    Args:
        lm: the model.
        texts: one text with blanks, or several.
        n: number of ways.
        blank_tokens: tokens in each blank; by default the length is drawn from those of the training documents.
        seed: row i has seed + i.
        best_of: draw so many rows for each sample and keep one.
        choose: by minimum Bayes risk (``mbr``), or the most frequent text (``vote``).
        watch: called with every `StepRecord`.
        path: see `scorelm.sampling.options.make_options`, as for the rest; on ``blocks`` a blank does not see what is
            given in later blocks.
        repair: doubt the given tokens too: noise of this level u (0 to 1) is put on them and the whole text denoised,
            by default along ``uniform``; a text then needs no blank.
        how: solver, steps, temperature and so on.

    Raises:
        ValueError: no blank, a text that doesn't fit, a bad option, or an autoregressive model.
    """
    if lm.objective == "autoregressive":
        raise ValueError("an autoregressive model sees only what stands before a blank: it can't fill it in")

    def template(text: str, rng: np.random.Generator) -> Template:
        return blank_template(text, lm.tokenizer, lm.lengths, blank_tokens, rng, needed=repair is None)

    check_choice(best_of, choose)
    if repair is not None and lm.objective == "masked":
        raise ValueError("a masked model knows no noise between none and all: it can't repair")
    doubted = path or (own_path(lm, None) if repair is None else "uniform")
    chosen = replace(make_options(doubted, **how), repair=repair)
    return best(run(lm, texts, template, n * best_of, seed, chosen, watch), best_of, choose)

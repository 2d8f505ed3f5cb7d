"""A generated text, and one text chosen out of several for the same request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from scorelm.config.generation import Generation
from scorelm.errors import InputError


@dataclass(frozen=True)
class Sample:
    """A generated text."""

    text: str
    """Exactly what the ids decode to; but where blanks were filled in, what was given is as it was given."""
    ids: list[int]
    """Token ids, ``<s>`` and ``</s>`` included."""
    seed: int
    """Seed of this row: the same request with it gives the same text."""
    nfe: int
    """Evaluations of the denoiser that the row took."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """The (start, end) of what was filled in, in characters of the text; none where there were no blanks."""

    def _repr_html_(self) -> str:
        """The text as a notebook shows it, with its seed and evaluations below."""
        return (
            f'<div style="margin:.4em 0"><div style="white-space:pre-wrap">{escape(self.text)}</div>'
            f'<small style="opacity:.6">seed {self.seed}, {self.nfe} evaluations, {len(self.ids)} tokens</small></div>'
        )


def check_choice(options: Generation) -> None:
    """Refuse, before a long generation, what `best_of_each` could not do.

    Raises:
        InputError: sacrebleu is missing.
    """
    if options.best_of > 1:
        CHOICES[options.choose](["", ""])


def best_of_each(samples: Sequence[Sample], options: Generation) -> list[Sample]:
    """One out of every `options.best_of` samples in a row, at the price of all of them."""
    if options.best_of == 1:
        return list(samples)
    chosen = []
    for start in range(0, len(samples), options.best_of):
        group = samples[start : start + options.best_of]
        one = group[CHOICES[options.choose]([sample.text for sample in group])]
        chosen.append(replace(one, nfe=sum(sample.nfe for sample in group)))
    return chosen


def minimum_bayes_risk(texts: Sequence[str]) -> int:
    """Index of the text that is most like the others: highest mean sentence BLEU (Kumar and Byrne 2004).

    The choice that AR-Diffusion (arXiv 2305.09515) reports with.

    Raises:
        InputError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise InputError("sacrebleu is not installed: pip install 'scorelm[eval]'") from None
    bleu = BLEU(effective_order=True)
    gain = [
        sum(bleu.sentence_score(text, [other]).score for k, other in enumerate(texts) if k != i)
        for i, text in enumerate(texts)
    ]
    return max(range(len(texts)), key=gain.__getitem__)


def most_common(texts: Sequence[str]) -> int:
    """Index of the first of the texts that occur most often: self-consistency (arXiv 2203.11171)."""
    counts = Counter(texts)
    return max(range(len(texts)), key=lambda i: counts[texts[i]])


CHOICES: dict[str, Callable[[Sequence[str]], int]] = {"mbr": minimum_bayes_risk, "vote": most_common}
"""Every way to choose, by name."""

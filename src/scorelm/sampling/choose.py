"""Best of n: one text chosen out of several for the same request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence


def minimum_bayes_risk(texts: Sequence[str]) -> int:
    """Index of the text that is most like the others: highest mean sentence BLEU (Kumar and Byrne 2004).

    The choice that AR-Diffusion (arXiv 2305.09515) reports with.

    Raises:
        ValueError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ValueError("sacrebleu is not installed: pip install 'scorelm[eval]'") from None
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

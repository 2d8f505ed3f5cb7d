"""Texts to be completed, made ready for the loop: templates, seeds and settings go in, samples come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from scorelm.errors import InputError
from scorelm.sampling.request import Settings
from scorelm.sampling.sample import Sample, best_of_each, check_choice
from scorelm.text.templates import Draft, Template
from scorelm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """What a request comes to.

    Attributes:
        drafts: one for each row, `best_of` in a row for each sample.
        seeds: one for each row.
        settings: of all of them.
        tokenizer: that reads what is written.
    """

    drafts: list[Draft]
    seeds: list[int]
    settings: Settings
    tokenizer: Tokenizer

    @classmethod
    def of(
        cls,
        texts: Sequence[str] | Sequence[Sequence[int]],
        n: int,
        draft: Callable[[Any, np.random.Generator], Draft],
        settings: Settings,
        tokenizer: Tokenizer,
    ) -> Self:
        """Draft each text for each of its `n` samples; row i has the seed ``seed + i``.

        Raises:
            InputError: what `draft` refuses, a number or a seed out of range, or no package to choose the best with.
        """
        options = settings.options
        check_choice(options)
        rows = [text for text in texts for _ in range(n * options.best_of)]
        if n < 0 or options.seed + len(rows) > 2**63:
            raise InputError(f"n must be 0 or more and the seed below 2^63 - n, got {n} and {options.seed}")
        seeds = [options.seed + i for i in range(len(rows))]
        drafts = [draft(text, np.random.default_rng(seed)) for text, seed in zip(rows, seeds, strict=True)]
        return cls(drafts, seeds, settings, tokenizer)

    @property
    def templates(self) -> list[Template]:
        """What the loop is given."""
        return [draft.template for draft in self.drafts]

    def recording(self, candidates: int) -> Self:
        """The same, with the likeliest tokens of every position in the record of each step."""
        return replace(self, settings=replace(self.settings, candidates=candidates))

    def read(self, rows: Iterable[tuple[list[int], int]]) -> list[Sample]:
        """The samples, from the ids and evaluations of every row in order."""
        made = [
            Sample(text, ids, seed, nfe, spans)
            for draft, seed, (ids, nfe) in zip(self.drafts, self.seeds, rows, strict=True)
            for text, spans in [draft.read(ids, self.tokenizer)]
        ]
        return best_of_each(made, self.settings.options)

"""Masked (absorbing-state) diffusion: the objective of MDLM (arXiv 2406.07524) for the same denoiser.

A masked token is a position without evidence (sigma inf), so the denoiser reads a mask as the prior's soft token, and
its paths are those on which every position goes from no evidence to finished at once.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from scorelm.config.recipe import NoiseConfig, ObjectiveName
from scorelm.errors import InputError
from scorelm.model.layout import Layout, number_blocks
from scorelm.noise.levels import Uniform, runs
from scorelm.noise.schedule import Schedule
from scorelm.objectives.objective import Batch, Draw
from scorelm.objectives.score import Score
from scorelm.sampling.paths import Path
from scorelm.sampling.request import Settings
from scorelm.text.tokenizer import Special

LEAST = 1e-3
"""Smallest share of a document that is masked on average; it bounds the weights."""


class Masked(Score):
    """Score diffusion at the levels 0 and inf only, weighted so that the loss is MDLM's bound."""

    name: ClassVar[ObjectiveName] = "masked"
    title: ClassVar[str] = "A masked diffusion"
    priced_path: ClassVar[str] = "random"
    tables: ClassVar[int] = 3
    self_conditions: ClassVar[bool] = False
    watched: ClassVar[tuple[str, ...]] = ("random", "bounded")
    shown_prices: ClassVar[tuple[tuple[str, int | None], ...]] = (("random", None), ("bounded", 64), ("bounded", 16))
    shown_paths: ClassVar[tuple[str, ...]] = ("shuffled", "bounded")
    sampled_paths: ClassVar[tuple[str, ...]] = ("bounded",)

    def asks_next(self, config: NoiseConfig) -> bool:
        """There are no clean copies."""
        return False

    def copies(self, config: NoiseConfig) -> int:
        """One."""
        return 1

    def draw(self, batch: Batch, config: NoiseConfig, schedule: Schedule, special: Special, random_TBS: Tensor) -> Draw:
        """Mask every position of a document with probability t, t uniform and low-discrepancy over documents.

        The weights 1 / t make the mean of the weighted cross-entropies the bound of MDLM (eq. 10, with a linear
        schedule) in nats per token that is not given. ``<s>`` is always given, and ``</s>`` half of the time, as it is
        in generation; noise options other than the seed mean nothing here.
        """
        starts_BL = (batch.ids == special.bos) & (batch.segment > 0)
        document, uniform = runs(batch.segment), Uniform(random_TBS)
        t_BL = LEAST + (1 - LEAST) * uniform.spread(document)
        closed_BL = uniform.each(document) < 0.5
        free_BL = (batch.segment > 0) & ~starts_BL & ~(closed_BL & (batch.ids == special.eos))
        masked_BL = free_BL & (uniform.table() < t_BL)
        block_BL = number_blocks(batch.position, document.having(starts_BL).long(), 0)
        layout = Layout.one_stream(batch.segment, batch.position, block_BL)
        weight_BL = torch.where(masked_BL, masked_BL.sum() / (t_BL * free_BL.sum()), 0.0)
        sigma_BL = torch.where(masked_BL, torch.inf, 0.0)
        return Draw(batch.ids, sigma_BL, torch.zeros_like(masked_BL), layout, weight_BL.float())

    def allows(self, settings: Settings) -> Settings:
        """Paths on which every position finishes at once.

        Raises:
            InputError: another path.
        """
        if not settings.path.jumps:
            raise InputError(f"a masked model knows no noise but all or none: use bounded instead of {settings.path}")
        return settings

    def allows_infilling(self, settings: Settings) -> None:
        """Blanks, but no repair.

        Raises:
            InputError: a repair.
        """
        if settings.repair is not None:
            raise InputError("a masked model knows no noise between none and all: it cannot repair")

    def allows_price(self, name: str, path: Path | None) -> None:
        """Random order, and paths on which every position finishes at once.

        Raises:
            InputError: another path or order.
        """
        if not (path.jumps if path is not None else name == "random"):
            raise InputError(
                f"a masked model knows no noise but all or none: use random, shuffled or bounded instead of {name}"
            )

"""An autoregressive model in the denoiser's own trunk: next-token cross-entropy under a causal mask.

Position i reads the token before it and gives the posterior over its own, so logits stand where the denoiser's do.
Generation is the path of one-token blocks with every key and value computed once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.config.recipe import NoiseConfig, ObjectiveName, TrainingConfig
from scorelm.errors import InputError
from scorelm.model.denoiser import Denoiser, Places
from scorelm.model.layout import Layout
from scorelm.model.prediction import Prediction, places_of
from scorelm.noise.schedule import Schedule
from scorelm.objectives.objective import Batch, Draw, Objective, Outcome
from scorelm.sampling.evaluator import Cached, Evaluator, Network, Reader
from scorelm.sampling.paths import Path
from scorelm.sampling.query import Placed, Query
from scorelm.sampling.request import Settings
from scorelm.text.tokenizer import Special


class Autoregressive(Objective):
    """The next token, given those before it."""

    name: ClassVar[ObjectiveName] = "autoregressive"
    title: ClassVar[str] = "An autoregressive"
    default_path: ClassVar[str] = "blocks:1"
    priced_path: ClassVar[str] = "ordered"
    watched: ClassVar[tuple[str, ...]] = ("ordered",)
    watched_path: ClassVar[str] = "ordered"
    judges: ClassVar[bool] = True
    shown_prices: ClassVar[tuple[tuple[str, int | None], ...]] = (("ordered", None),)
    shown_paths: ClassVar[tuple[str, ...]] = ("blocks:1",)
    sampled_paths: ClassVar[tuple[str, ...]] = ("blocks:1",)
    shown_budgets: ClassVar[tuple[int, ...]] = (1,)

    def draw(self, batch: Batch, config: NoiseConfig, schedule: Schedule, special: Special, random_TBS: Tensor) -> Draw:
        """Every real token but ``<s>`` is a target (sigma inf); the noise options mean nothing here."""
        target_BL = (batch.segment > 0) & (batch.ids != special.bos)
        sigma_BL = torch.where(target_BL, torch.inf, 0.0)
        layout = Layout.causal(batch.segment, batch.position)
        return Draw(batch.ids, sigma_BL, torch.zeros_like(target_BL), layout)

    def loss(
        self,
        denoiser: Denoiser,
        draw: Draw,
        schedule: Schedule,
        config: TrainingConfig,
        *,
        live: Tensor,
        special: Special,
        self_conditioned: bool = False,
    ) -> Outcome:
        """Cross-entropy of every target given the tokens before it."""
        places = draw.places or Places.of(draw.sigma_BS, draw.layout)
        before_BL = token_before(draw.ids_BS, draw.layout.position_BL, special)
        seen = denoiser.predict_next(before_BL, draw.layout, draw.open_BS, open_N=places.open_N)
        ids_N, sigma_N, shared_N = (t.flatten()[places.open_N] for t in (draw.ids_BS, draw.sigma_BS, draw.shared_BS))

        def terms(seen: Prediction, ids_N: Tensor) -> Tensor:
            cross_entropy_N = F.cross_entropy(seen.logits_NV, ids_N, reduction="none")
            return torch.stack([cross_entropy_N, (seen.ids_N == ids_N).float()], 1)

        cross_entropy_N, correct_N = seen.in_chunks(terms, ids_N).unbind(1)
        open_N = draw.open_BS.flatten()[places.open_N]
        loss = (cross_entropy_N * open_N).sum() / live.clamp(min=1)
        return Outcome(loss, open_N, cross_entropy_N.detach(), sigma_N, shared_N, correct_N.detach() > 0)

    def evaluator(self, network: Network, window: int | None) -> Evaluator:
        """One new token in each pass, behind the keys and values of those before it."""
        return Cached(network, window or 0, read_before(network), causal=True)

    def next_tokens(
        self,
        denoiser: Denoiser,
        ids_BL: Tensor,
        real_BL: Tensor,
        position_BL: Tensor,
        open_BL: Tensor,
        special: Special,
    ) -> Prediction:
        """One causal pass."""
        before_BL = token_before(ids_BL, position_BL, special)
        return denoiser.predict_next(before_BL, Layout.causal(real_BL, position_BL), open_BL)

    def allows(self, settings: Settings) -> Settings:
        """Left to right, in one evaluation a token.

        Raises:
            InputError: another path, or guidance.
        """
        if settings.path.block != 1:
            raise InputError(f"an autoregressive model writes left to right: use blocks:1 instead of {settings.path}")
        if not settings.one_pass:
            raise InputError("an autoregressive model has no unconditional pass: it takes no guidance")
        return replace(settings, options=settings.options.model_copy(update={"steps": 1}))

    def allows_infilling(self, settings: Settings) -> None:
        """Nothing.

        Raises:
            InputError: always.
        """
        raise InputError("an autoregressive model sees only what stands before a blank: it cannot fill it in")

    def allows_price(self, name: str, path: Path | None) -> None:
        """Left to right.

        Raises:
            InputError: a path, or another order.
        """
        if name != "ordered":
            raise InputError(f"an autoregressive model is priced left to right: use ordered instead of {name}")


def token_before(ids_BL: Tensor, position_BL: Tensor, special: Special) -> Tensor:
    """The token before each position of its document; ``<s>`` stands before the first."""
    return torch.where(position_BL == 0, special.bos, ids_BL.roll(1, dims=1))


def read_before(network: Network) -> Reader:
    """Reads the token before each position, as an autoregressive model does."""

    def read(query: Query, placed: Placed) -> Tensor:
        before_RW = query.ids_BL.flatten()[(placed.at_there_RW - 1).clamp(min=0)]
        before_RW = torch.where(placed.layout_there.position_BL == 0, network.special.bos, before_RW)
        open_RW = (placed.layout.segment_BL > 0) & (query.sigma_BL.flatten()[placed.at_RW] > 0)
        open_N = places_of(open_RW, network.device)
        with network.autocast:
            found = network.denoiser.predict_next(before_RW, placed.layout_there, open_RW, network.table_VE, open_N)
            logits_NV = found.logits_NV
        return network.answer(logits_NV, open_RW, query, placed)

    return read

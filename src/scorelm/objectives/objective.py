"""What an objective is: all that tells score diffusion and its peers in the same trunk apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scorelm.config.recipe import NoiseConfig, ObjectiveName, TrainingConfig
from scorelm.model.denoiser import Denoiser, Places
from scorelm.model.layout import Layout
from scorelm.model.prediction import Prediction
from scorelm.noise.schedule import Schedule
from scorelm.sampling.evaluator import Evaluator, Network
from scorelm.sampling.paths import Path
from scorelm.sampling.request import Settings
from scorelm.text.tokenizer import Special


class Batch(NamedTuple):
    """Packed rows: three integer tensors [B, L] on the CPU."""

    ids: Tensor
    segment: Tensor
    position: Tensor


class Draw(NamedTuple):
    """A batch with its noise levels drawn: tensors [B, S], S = L with one stream and 2 L with two."""

    ids_BS: Tensor
    sigma_BS: Tensor
    shared_BS: Tensor
    """Where the whole block has one finite level: what the adaptive schedule is fitted to."""
    layout: Layout
    weight_BS: Tensor | None = None
    """Weights of the cross-entropies, where they differ."""
    eps_BSE: Tensor | None = None
    """Standard normal noise for the forward process."""
    places: Places | None = None
    """Where positions of each kind are, if that is decided."""
    asks_next_BS: Tensor | None = None
    """Given positions that are asked for the next token, having seen nothing beyond their own."""

    def with_noise(self, size: int, rng: torch.Generator) -> Draw:
        """The draw with its noise, for embeddings of that size."""
        device = self.sigma_BS.device
        return self._replace(eps_BSE=torch.randn(*self.sigma_BS.shape, size, generator=rng, device=device))

    def take(self, rows: slice) -> Draw:
        """Some rows of the draw."""
        return Draw.merge([self], lambda parts: parts[0][rows])

    @classmethod
    def merge(cls, draws: Sequence[Draw], join: Callable[[list[Tensor]], Tensor]) -> Draw:
        """One draw of several that were made in the same way, without places: each tensor joined from theirs."""

        def part(*values: Any) -> Any:
            if isinstance(values[0], Layout):
                return Layout.merge(values, join)
            return join([*values]) if isinstance(values[0], Tensor) else values[0]

        return cls(*map(part, *draws))

    @property
    def open_BS(self) -> Tensor:
        """Positions that the loss is computed at."""
        noisy_BS = (self.sigma_BS > 0) & (self.layout.segment_BL > 0)
        return noisy_BS if self.asks_next_BS is None else noisy_BS | self.asks_next_BS

    @property
    def target_BS(self) -> Tensor:
        """The token that open positions are asked for: their own, or the next one."""
        ids_BS, asks_next_BS = self.ids_BS, self.asks_next_BS
        return ids_BS if asks_next_BS is None else torch.where(asks_next_BS, ids_BS.roll(-1, 1), ids_BS)

    @property
    def level_BS(self) -> Tensor:
        """The noise level of that token: inf for the next one, of which there is no evidence."""
        return self.sigma_BS if self.asks_next_BS is None else torch.where(self.asks_next_BS, torch.inf, self.sigma_BS)

    @property
    def live(self) -> Tensor:
        """How many positions the loss is computed at."""
        return self.open_BS.sum()

    @property
    def noisy(self) -> Tensor:
        """How many of them have some evidence."""
        return (self.open_BS & (self.level_BS < torch.inf)).sum()


class Outcome(NamedTuple):
    """What a batch gave: the loss to differentiate, and what is logged of N positions, all open ones among them."""

    loss: Tensor
    open_N: Tensor
    """Which of the N are open."""
    cross_entropy_N: Tensor
    sigma_N: Tensor
    shared_N: Tensor
    correct_N: Tensor


class Objective(ABC):
    """What is learned, and how a model that has learned it generates and is priced."""

    name: ClassVar[ObjectiveName]
    title: ClassVar[str]
    """What a model card calls such a model."""
    default_path: ClassVar[str] = "bounded"
    """The path that generation takes unless told otherwise."""
    repair_path: ClassVar[str] = "uniform"
    """The path that a repair takes unless told otherwise."""
    priced_path: ClassVar[str]
    """The path that is priced unless told otherwise."""
    tables: ClassVar[int] = 0
    """How many random numbers a draw takes for every position."""
    self_conditions: ClassVar[bool] = False
    """Whether a first estimate may be fed back, in training and in prices."""
    judges: ClassVar[bool] = False
    """Whether its models price any text exactly in one pass, so that they can judge other models' text."""
    watched: ClassVar[tuple[str, ...]]
    """Paths on which held-out text is priced while a model is trained."""
    watched_path: ClassVar[str] = "bounded"
    """The one that chooses which model is kept, unless told otherwise."""
    shown_prices: ClassVar[tuple[tuple[str, int | None], ...]]
    """Paths and steps whose prices a report shows."""
    shown_paths: ClassVar[tuple[str, ...]]
    """Paths whose quality against effort a report shows."""
    sampled_paths: ClassVar[tuple[str, ...]] = ("bounded",)
    """Paths whose texts a report shows."""
    shown_budgets: ClassVar[tuple[int, ...]] = (8, 16, 32, 64, 128)
    """Steps that it shows them at."""

    def asks_next(self, config: NoiseConfig) -> bool:
        """Whether given tokens are asked for the next one in training."""
        return False

    def copies(self, config: NoiseConfig) -> int:
        """How often a row stands in its draw."""
        return 1

    def random(self, batch: Batch, config: NoiseConfig, rng: torch.Generator) -> Tensor:
        """The random numbers for a draw: uniform in [0, 1), float64, [T, B, S]."""
        (rows, length), device = batch.ids.shape, batch.ids.device
        shape = self.tables, rows, length * self.copies(config)
        return torch.rand(shape, dtype=torch.float64, generator=rng, device=device)

    @abstractmethod
    def draw(self, batch: Batch, config: NoiseConfig, schedule: Schedule, special: Special, random_TBS: Tensor) -> Draw:
        """What is to be predicted from what: noise levels for a batch, as the numbers from `random` say."""

    @abstractmethod
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
        """Loss of a drawn batch, summed over its open positions and divided by `live`.

        Args:
            denoiser: the model.
            draw: tokens, noise levels, noise and layout, on the model's device.
            schedule: that the levels were drawn through.
            config: weights of optional terms.
            live: the number to divide by, a tensor: open positions of all batches of the step.
            special: ids of the special tokens.
            self_conditioned: take a first pass without gradient and feed its estimate back (arXiv 2208.04202).
        """

    @abstractmethod
    def evaluator(self, network: Network, window: int | None) -> Evaluator:
        """What answers the queries of requests.

        Args:
            network: that is asked.
            window: on paths of blocks, how many positions back a block sees, 0 for all: what is finished is then
                computed once. None where any position may be read anew in every step.
        """

    @abstractmethod
    def next_tokens(
        self,
        denoiser: Denoiser,
        ids_BL: Tensor,
        real_BL: Tensor,
        position_BL: Tensor,
        open_BL: Tensor,
        special: Special,
    ) -> Prediction:
        """The posterior over the token at each open position given those before it in its row, in one evaluation."""

    @abstractmethod
    def allows(self, settings: Settings) -> Settings:
        """The settings as a model of this kind takes them.

        Raises:
            InputError: it cannot generate so.
        """

    @abstractmethod
    def allows_infilling(self, settings: Settings) -> None:
        """See that a model of this kind can fill in blanks so; `allows` is asked too.

        Raises:
            InputError: it cannot.
        """

    @abstractmethod
    def allows_price(self, name: str, path: Path | None) -> None:
        """See that text has a price on a path or, where `path` is None, in an order of that name.

        Raises:
            InputError: it has none.
        """

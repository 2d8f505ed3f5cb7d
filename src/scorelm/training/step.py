"""One optimiser step: rows with their noise drawn, their loss, its gradients, and the update of the weights.

Every draw is seeded by (seed, step, shard), so that a run that was interrupted and resumed repeats the uninterrupted
one bit for bit, on however many ranks its rows are shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from scorelm.config.recipe import Recipe
from scorelm.device import check_compiler, pick_device, pick_dtype, send, set_up_compiler
from scorelm.model.denoiser import Denoiser, Places
from scorelm.model.kernels import Dropout
from scorelm.noise.schedule import Schedule
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch, Draw, Objective, Outcome
from scorelm.parallel import Ranks, gather_tensor, gather_weights, hold_gradients, replicate, split
from scorelm.text.tokenizer import Special
from scorelm.training.data import Shard, TrainingData
from scorelm.training.lora import add_adapters, merge_adapters
from scorelm.training.optimizer import make_averages, make_optimizers, move_averages, set_learning_rate, step_if

HELDOUT_BATCHES = 2
"""Held-out batches on which the weights and their averages are compared."""
WHOLE_STEP = 2**31
"""Stands in the place of a shard's number where something is drawn for the whole step."""
CPU = torch.device("cpu")


def make_seed(*words: int) -> int:
    """A seed that depends on nothing but these words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) % 2**63


def seeded_generator(*words: int, device: torch.device = CPU) -> torch.Generator:
    """A generator whose numbers depend on nothing but these words and the kind of device."""
    return torch.Generator(device).manual_seed(make_seed(*words))


@lru_cache(maxsize=2)
def on_device(schedule: Schedule, device: torch.device) -> Schedule:
    """`Schedule.on`, once for each that is fitted."""
    return schedule.on(device)


def to_batch(arrays: dict[str, np.ndarray], device: torch.device) -> Batch:
    """A packed batch as tensors on a device."""
    return Batch(*(send(torch.from_numpy(arrays[name]), device) for name in Batch._fields))


def draw_step(learner: Learner, shards: Sequence[Shard], schedule: Schedule, step: int) -> list[tuple[Batch, Draw]]:
    """This rank's rows of a step's batches, `accumulation` of them, with their noise drawn on the device.

    A shard's noise comes from a generator seeded by (seed, step, shard), for all of its rows, so that a row's noise
    does not depend on which rank computes it.
    """
    config, device = learner.config, learner.device
    rngs = [seeded_generator(config.seed, step, shard.index, device=device) for shard in shards]
    batches = []
    for _ in range(config.accumulation):
        parts = []
        for shard, rng in zip(shards, rngs, strict=True):
            batch = to_batch(next(shard.batches), device)
            parts.append(take_rows(batch, learner.draw(batch, schedule, rng), shard.rows))
        batches.append(concatenate(parts))
    return batches


def draw_heldout(learner: Learner, batches: Iterable[dict[str, np.ndarray]], schedule: Schedule) -> list[Draw]:
    """A few held-out batches with noise that is always the same on one kind of device."""
    device = learner.device
    return [
        learner.draw(to_batch(arrays, device), schedule, seeded_generator(1, k, device=device))
        for k, arrays in enumerate(islice(batches, HELDOUT_BATCHES))
    ]


def draw_first_pass(recipe: Recipe, step: int) -> bool:
    """Whether a step feeds a first estimate back, which is drawn once for all ranks."""
    chance = float(torch.rand((), generator=seeded_generator(recipe.training.seed, step, WHOLE_STEP)))
    return self_conditions(recipe) and chance < recipe.training.self_conditioning


def self_conditions(recipe: Recipe) -> bool:
    """Whether any step of a run feeds a first estimate back."""
    return OBJECTIVES[recipe.training.objective].self_conditions and recipe.training.self_conditioning > 0


def take_rows(batch: Batch, draw: Draw, rows: slice) -> tuple[Batch, Draw]:
    """Some rows of a batch and of its draw."""
    return Batch(*(t_BL[rows] for t_BL in batch)), draw.take(rows)


def concatenate(parts: Sequence[tuple[Batch, Draw]]) -> tuple[Batch, Draw]:
    """One batch of the rows of all parts, which are drawn in the same way."""
    if len(parts) == 1:
        return parts[0]
    batches, draws = zip(*parts, strict=True)
    return Batch(*(torch.cat(t) for t in zip(*batches, strict=True))), Draw.merge(draws, torch.cat)


def find_places(draw: Draw, fixed: bool) -> Draw:
    """The draw with its places: exact ones, which the host waits for on a GPU, or those of its shape."""
    if not fixed:
        return draw._replace(places=Places.of(draw.sigma_BS, draw.layout, draw.asks_next_BS))
    rows, length = draw.ids_BS.shape
    return draw._replace(places=Places.of_shape(rows, length, draw.ids_BS.device))


class Loss(nn.Module):
    """A denoiser with its loss as `forward`, which is what DDP and FSDP watch, and what is compiled."""

    def __init__(self, denoiser: Denoiser, objective: Objective, special: Special) -> None:
        super().__init__()
        self.denoiser, self.objective, self.special = denoiser, objective, special

    def forward(self, draw: Draw, *settings: Any, **how: Any) -> Outcome:
        draw = draw._replace(layout=draw.layout.map(lambda t: t))  # what layers share stays in the graph
        return self.objective.loss(self.denoiser, draw, *settings, special=self.special, **how)


class Learner:
    """What a step changes: the weights, their averages and the optimisers' moments.

    Args:
        recipe: sizes of the model and how it is trained.
        data: for its tokenizer, and for how often each token occurs.
        ranks: who takes part.
        weights: of the denoiser, or as many as a pretrained network has, to start from; None for random ones.
    """

    def __init__(
        self, recipe: Recipe, data: TrainingData, ranks: Ranks, weights: dict[str, Tensor] | None = None
    ) -> None:
        self.config, self.noise = recipe.training, recipe.noise
        self.special, self.ranks = data.tokenizer.special, ranks
        self.objective, self.embedding_dim = OBJECTIVES[recipe.training.objective], recipe.model.embedding_dim
        self.device = pick_device(self.config.device)
        self.dtype = pick_dtype(self.config.precision, self.device)
        self.fixed = self.config.places == "fixed" or (self.config.places == "auto" and self.device.type != "cpu")
        torch.manual_seed(self.config.seed)
        self.denoiser = Denoiser(recipe.model, data.tokenizer.vocab_size)
        for module in self.denoiser.modules():
            if isinstance(module, Dropout):
                module.p = self.config.dropout
        self.denoiser.set_prior(data.token_counts())
        self.denoiser.set_embeddings(data.neighbour_counts())
        if weights is not None:
            self.denoiser.start_from(weights)
        if self.config.lora:
            add_adapters(self.denoiser, self.config.lora)
        self.denoiser.to(self.device)
        self.averages = make_averages(self.denoiser, self.config.ema, share=not self._divided)
        self.losses = {name: self._spread(average, trained=False) for name, average in self.averages.items()}
        self.losses["weights"] = self._spread(self.denoiser, trained=True)
        self.optimizers = make_optimizers(self.denoiser, self.config, self.dtype)

    def _spread(self, denoiser: Denoiser, trained: bool) -> nn.Module:
        """What computes a model's loss on this rank; only weights that are trained need to agree on gradients."""
        loss = Loss(denoiser, self.objective, self.special)
        if trained and self.config.compile:
            check_compiler(self.device)
            set_up_compiler()
            if self.fixed and not self._divided:
                loss.compile(fullgraph=True, dynamic=False)
            else:
                for layer in denoiser.backbone.layers:
                    layer.compile()
        if self._divided:
            split(loss, denoiser.backbone.layers, self.dtype)
        elif trained:
            return replicate(loss, self.ranks, unused=not self.objective.self_conditions)
        return loss

    @property
    def _divided(self) -> bool:
        return self.config.parallel == "fsdp" and self.ranks.world > 1

    def draw(self, batch: Batch, schedule: Schedule, rng: torch.Generator) -> Draw:
        """A batch with its noise drawn.

        It is not compiled: PyTorch 2.11 takes minutes to compile its sorts for a GPU.
        """
        random_TBS = self.objective.random(batch, self.noise, rng)
        drawn = self.objective.draw(batch, self.noise, on_device(schedule, self.device), self.special, random_TBS)
        return drawn.with_noise(self.embedding_dim, rng)

    def loss(self, name: str, draw: Draw, schedule: Schedule, *, live: Tensor, self_conditioned: bool) -> Outcome:
        """The loss of the ``weights``, or of an average by its name; see `Objective.loss`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outcome: Outcome = self.losses[name](
                find_places(draw, self.fixed), on_device(schedule, self.device), self.config,
                live=live, self_conditioned=self_conditioned,
            )  # fmt: skip
        return outcome

    def compute_gradients(
        self, draws: Sequence[Draw], schedule: Schedule, step: int, *, live: Tensor, self_conditioned: bool
    ) -> tuple[list[Outcome], Tensor]:
        """Gradients of the sum of the draws' losses over all ranks, clipped to `clip`.

        The losses are scaled up because DDP and FSDP take means over ranks. What dropout takes away is seeded by (seed,
        step, rank), so it is the same in a run that was resumed, but not on another number of ranks.

        Returns:
            What each draw gave, and the gradients' norm before clipping.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        outcomes = []
        torch.manual_seed(make_seed(self.config.seed, step, WHOLE_STEP, self.ranks.rank))
        for k, draw in enumerate(draws):
            with hold_gradients(self.losses["weights"], k < len(draws) - 1):
                outcome = self.loss("weights", draw, schedule, live=live, self_conditioned=self_conditioned)
                (outcome.loss * self.ranks.world).backward()  # type: ignore[no-untyped-call]
            outcomes.append(outcome)
        norm = gather_tensor(nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.clip))
        return outcomes, norm

    def update(self, lr: float, finite: Tensor) -> None:
        """Move the weights along their gradients if these are finite, and their averages towards them."""
        set_learning_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            step_if(finite, optimizer)
        move_averages(self.averages, self.denoiser)

    def weights(self, name: str) -> dict[str, Tensor]:
        """All of the ``weights``, or of an average by its name, with adapters merged, on the main rank's CPU.

        Every rank must call it.
        """
        return merge_adapters(gather_weights(self.averages.get(name, self.denoiser)))

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint keeps: weights, averages of those that are trained and moments, only this rank's part."""
        trained = [name for name, p in self.denoiser.named_parameters() if p.requires_grad]
        averages = {name.replace(".", "_"): average.state_dict() for name, average in self.averages.items()}
        return {
            "model": self.denoiser.state_dict(),
            "optimizer": get_optimizer_state_dict(self.denoiser, self.optimizers),
            "ema": {name: {part: state[part] for part in trained} for name, state in averages.items()},
        }

    def load_tensors(self, tensors: dict[str, Any]) -> None:
        """Go on from what `tensors` gave; rates and decay are the recipe's, and the code's that reads it."""
        self.denoiser.load_state_dict(tensors["model"])
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        set_optimizer_state_dict(self.denoiser, self.optimizers, tensors["optimizer"])
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, options, strict=True):
            group |= own
        for name, average in self.averages.items():
            average.load_state_dict(tensors["model"] | tensors["ema"][name.replace(".", "_")])

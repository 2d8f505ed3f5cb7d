"""The state of a run: what a step changes, what a checkpoint keeps, and the model that comes of it."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorelm.config.recipe import Recipe
from scorelm.config.toml import to_toml
from scorelm.errors import DivergedError, InputError
from scorelm.lm import ScoreLM
from scorelm.model.denoiser import Denoiser
from scorelm.model.directory import Provenance
from scorelm.noise.fit import EntropyCurve
from scorelm.noise.schedule import Gumbel, Schedule, make_schedule, schedule_from_dict, schedule_to_dict
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch, Draw, Outcome
from scorelm.parallel import ALONE, Ranks
from scorelm.training.checkpoint import read_state, read_tensors
from scorelm.training.data import TrainingData
from scorelm.training.heldout import choose_rows, decide, price_heldout
from scorelm.training.initial import Initial
from scorelm.training.metrics import Sums, Window
from scorelm.training.optimizer import learning_rate
from scorelm.training.progress import Cooling, Progress, Unread, Watch
from scorelm.training.step import Learner, draw_first_pass, draw_heldout, draw_step, self_conditions

REFIT_EVERY = 10
"""Steps between fits of an adaptive schedule."""


def count(
    denoiser: Denoiser, curve: EntropyCurve | None, batch: Batch, draw: Draw, outcome: Outcome, passes: Tensor
) -> Tensor:
    """What a batch gave, for metrics.jsonl and for the adaptive schedule: `Sums` and [2, BINS] in one vector."""
    counted = Sums.of(denoiser, batch, draw, outcome, passes).flatten()
    by_noise = outcome.loss.new_zeros(2, EntropyCurve.BINS)
    if curve is not None:
        fitted_N = outcome.open_N & outcome.shared_N & outcome.sigma_N.isfinite()
        by_noise = curve.binned(outcome.sigma_N, outcome.cross_entropy_N, fitted_N)
    return torch.cat([counted, by_noise.flatten()])


class Trainer:
    """The state of a run and the step that changes it.

    Args:
        recipe: what to do.
        data: tokenised text and its tokenizer.
        ranks: who takes part; every rank has a trainer of its own.
        initial: the model to start from; None where there is none, or a checkpoint is restored.
    """

    def __init__(
        self, recipe: Recipe, data: TrainingData, ranks: Ranks = ALONE, initial: Initial | None = None
    ) -> None:
        self.recipe, self.data, self.ranks = recipe, data, ranks
        self.before = None if initial is None else initial.provenance
        """How the model came about that the run has started from."""
        asked = OBJECTIVES[recipe.training.objective].asks_next(recipe.noise)
        self.tells_next_token = asked and (initial is None or initial.tells_next_token)
        """Whether given tokens have been asked for the next one all along."""
        self.learner = Learner(recipe, data, ranks, None if initial is None else initial.weights)
        noise, size = recipe.noise, recipe.model.embedding_dim
        self.schedule: Schedule = make_schedule(
            noise.schedule, size, data.tokenizer.vocab_size, noise.sigma_min, noise.sigma_max
        )
        if initial is not None:
            self.schedule = initial.start_schedule(self.schedule, noise)
        self.curve = EntropyCurve(self.schedule, self.learner.device) if isinstance(self.schedule, Gumbel) else None
        self.shards = data.shards(recipe, ranks)
        self.progress = Progress()
        self.unread = Unread.after(self.progress, self.learner.device)
        self.window = Window(self.learner.device)

    def step(self) -> None:
        """One optimiser step over `accumulation` batches; skipped where the loss or a gradient is not finite.

        The device is only waited for every `log_every` steps, and where the schedule is fitted.

        Raises:
            DivergedError: more than `skip_limit` steps in a row were skipped.
        """
        config, progress = self.recipe.training, self.progress
        batches = draw_step(self.learner, self.shards, self.schedule, progress.step)
        first_pass = draw_first_pass(self.recipe, progress.step)
        live = self.ranks.sum(torch.stack([draw.live for _, draw in batches]).sum())
        outcomes, norm = self.learner.compute_gradients(
            [draw for _, draw in batches], self.schedule, progress.step, live=live, self_conditioned=first_pass
        )
        found, observed = self._sum(batches, outcomes, first_pass)
        finite = found.loss.isfinite() & norm.isfinite()
        self.learner.update(learning_rate(config, progress.step, *progress.cooled(config)), finite)
        self.window.add(found)
        self.unread = self.unread.add(found, norm, finite)
        progress.step += 1
        if self.curve is not None:
            self.curve.add(observed, finite)
            if progress.step % REFIT_EVERY == 0:
                self.schedule = self.curve.fit()
        if progress.step % config.log_every == 0:
            self.read()

    def _sum(self, batches: list[tuple[Batch, Draw]], outcomes: list[Outcome], first_pass: bool) -> tuple[Sums, Tensor]:
        """What a step's batches gave on all ranks: for metrics.jsonl, and for the adaptive schedule, [2, BINS]."""
        passes = torch.full((), 4 if first_pass else 3, device=self.learner.device)
        sums = [
            count(self.learner.denoiser, self.curve, batch, draw, outcome, passes)
            for (batch, draw), outcome in zip(batches, outcomes, strict=True)
        ]
        found = self.ranks.sum(torch.stack(sums).sum(0))
        bins = 2 * EntropyCurve.BINS
        return Sums.unflatten(found[:-bins]), found[-bins:].view(2, -1)

    def read(self) -> None:
        """Take over what the device has counted, and wait for it.

        Raises:
            DivergedError: more than `skip_limit` steps in a row were skipped.
        """
        progress, (tokens, skipped, in_a_row, newest, loss, norm) = self.progress, (t.item() for t in self.unread)
        progress.tokens, progress.skipped = progress.tokens + int(tokens), progress.skipped + int(skipped)
        progress.skipped_in_a_row, progress.gradient_norm = int(in_a_row), newest
        self.unread = Unread.after(progress, self.learner.device)
        if in_a_row > self.recipe.training.skip_limit:
            which = f"the loss is {loss:g} and the gradient norm {norm:g}, in {in_a_row} steps in a row"
            raise DivergedError(f"step {progress.step}: {which}; the last checkpoint is kept")

    def measure_heldout(self) -> None:
        """Training loss on held-out text at fixed noise, for the weights and each of their averages."""
        draws = draw_heldout(self.learner, self.data.heldout_batches(self.recipe), self.schedule)
        live = sum((draw.live for draw in draws), torch.zeros((), dtype=torch.long, device=self.learner.device))
        first_pass = self_conditions(self.recipe)
        losses = dict.fromkeys(self.learner.losses, 0.0)
        self.learner.denoiser.eval()
        for name in losses:
            for draw in draws:
                rows = self.ranks.part(len(draw.ids_BS))
                own = draw.take(rows)
                with torch.no_grad():
                    outcome = self.learner.loss(name, own, self.schedule, live=live, self_conditioned=first_pass)
                losses[name] += float((outcome.cross_entropy_N.double() * outcome.open_N).sum() / live.clamp(min=1))
        self.learner.denoiser.train()
        totals = self.ranks.sum(torch.tensor(list(losses.values()), dtype=torch.float64)).tolist()
        found = zip(losses, totals, strict=True)
        self.progress.heldout = {name: loss for name, loss in found if live and math.isfinite(loss)}

    def look(self) -> None:
        """Price held-out text with the model as it is now; the main rank does, and the others wait for it."""
        self.read()
        self.measure_heldout()
        watch, lm, prices = self.progress.watch, self.model(), dict[str, float]()
        if lm is not None:
            rows = choose_rows(self.data, self.recipe.data.max_length, watch.tokens)
            prices = price_heldout(lm, rows, self.recipe.training.precision)
        prices = self.ranks.gather(prices)[0]
        watch.note(prices, decide(prices, self.recipe), self.progress, self.epoch)

    @property
    def epoch(self) -> float | None:
        """Passes over the training text so far; None where nobody knows how long it is."""
        return None if self.data.stream else self.progress.tokens / self.data.tokens

    def cool(self, checkpoint: Path | None) -> None:
        """Go back to the weights of a checkpoint, if it is sound, and let the learning rate fall from here."""
        if checkpoint is not None:
            tensors, _ = self.snapshot()
            read_tensors(checkpoint, tensors, self.ranks)
            self.learner.load_tensors(tensors)
        progress = self.progress
        share = progress.share(self.recipe.training)
        progress.cooling = Cooling(progress.step, max(1, progress.watch.best_step // 10), share)

    def model(self) -> ScoreLM | None:
        """The weights, or their average, that are best on held-out text, as a model; None but on the main rank."""
        heldout = self.progress.heldout
        untested = next(iter(self.learner.averages), "weights")
        best = min(heldout, key=lambda name: heldout[name]) if heldout else untested
        weights = self.learner.weights(best)
        if not self.ranks.main:
            return None
        text, watch, start = self.recipe.data, self.progress.watch, self.recipe.training.init_from
        prices = watch.prices if watch.step == self.progress.step else {}
        made = Provenance(
            data=text.source, field=text.field, csv_separator=text.csv_separator, split=text.split,
            hub_split=text.hub_split, hub_config=text.hub_config, streaming=text.streaming,
            normalize=text.normalize, holdout=text.holdout, fingerprint=self.data.text_fingerprint,
            steps=self.progress.step, tokens=self.progress.tokens, tells_next_token=self.tells_next_token,
            heldout_loss=heldout.get(best), prices=prices, init_from=None if start is None else str(start),
            before=self.before,
        )  # fmt: skip
        lengths, objective = self.data.lengths(self.recipe), self.recipe.training.objective
        lm = ScoreLM(self.recipe.model, self.data.tokenizer, self.schedule, lengths, made, objective)
        lm.denoiser.load_state_dict(weights)
        lm.recipe = to_toml(self.recipe)
        return lm.to(self.learner.device).eval()

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds: the tensors of this rank, and all else as JSON values."""
        self.read()
        tensors, progress = self.learner.tensors(), self.progress
        if self.curve is not None:
            tensors["curve"] = self.curve.sums
        owned = [(str(shard.index), shard.batches.get_state()) for shard in self.shards if shard.owned]
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "skipped": [progress.skipped, progress.skipped_in_a_row],
            "heldout": progress.heldout,
            "watch": asdict(progress.watch),
            "cooling": progress.cooling,
            "schedule": schedule_to_dict(self.schedule),
            "batches": {index: kept for part in self.ranks.gather(owned) for index, kept in part},
            "fingerprint": self.data.fingerprint,
            "before": None if self.before is None else self.before.model_dump(),
            "tells_next_token": self.tells_next_token,
        }
        return tensors, state

    def restore(self, checkpoint: Path, longer: bool = False) -> None:
        """Go on from a checkpoint that `find_checkpoint` has found, as if the run had never stopped.

        A run that goes on `longer` than it would have does not end because it had stopped improving before.

        Raises:
            InputError: the text is not what the run was started with, or the checkpoint does not fit.
        """
        (tensors, _), state = self.snapshot(), read_state(checkpoint)
        if state["fingerprint"] != self.data.fingerprint:
            raise InputError(f"{self.recipe.data.source} has changed since {checkpoint} was written; start a new run")
        read_tensors(checkpoint, tensors, self.ranks)
        self.learner.load_tensors(tensors)
        self.schedule = schedule_from_dict(state["schedule"])
        before = state.get("before")  # not in earlier checkpoints
        self.before = None if before is None else Provenance.model_validate(before)
        self.tells_next_token = state.get("tells_next_token", False)  # not in earlier checkpoints
        if self.curve is not None and isinstance(self.schedule, Gumbel):
            self.curve.schedule, self.curve.sums = self.schedule, tensors["curve"].clone()
        skipped, in_a_row = state["skipped"]
        watch = Watch(**state["watch"] | {"times": state["watch"]["times"] or None})
        watch.since = 0 if longer else watch.since
        cooling = None if state["cooling"] is None or longer else Cooling(*state["cooling"])
        self.progress = Progress(
            state["step"], state["tokens"], state["seconds"], skipped, in_a_row, state["heldout"],
            watch=watch, cooling=cooling,
        )  # fmt: skip
        self.unread = Unread.after(self.progress, self.learner.device)
        for shard in self.shards:
            shard.batches.set_state(state["batches"][str(shard.index)])

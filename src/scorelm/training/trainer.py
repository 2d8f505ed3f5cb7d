"""The training loop and its state: from a recipe and tokenised text to metrics, checkpoints and a model."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorelm.config.recipe import Recipe
from scorelm.device import matmul_peak
from scorelm.errors import DivergedError, InputError
from scorelm.lm import ScoreLM
from scorelm.model.directory import Provenance
from scorelm.noise.fit import EntropyCurve
from scorelm.noise.schedule import Gumbel, Schedule, make_schedule, schedule_from_dict, schedule_to_dict
from scorelm.objectives.objective import Batch, Draw, Outcome
from scorelm.parallel import ALONE, Ranks
from scorelm.training.checkpoint import Saver, read_state, read_tensors, write_model
from scorelm.training.data import TrainingData
from scorelm.training.metrics import Sums, Window, anisotropy, parameter_norm
from scorelm.training.optimizer import learning_rate
from scorelm.training.progress import Progress, Unread
from scorelm.training.runlog import RunLog, Say, append_samples, speak
from scorelm.training.signals import Interrupted, deferred_signals
from scorelm.training.step import Learner, draw_first_pass, draw_heldout, draw_step, self_conditions

REFIT_EVERY = 10
"""Steps between fits of an adaptive schedule."""


class Trainer:
    """The state of a run and the step that changes it.

    Args:
        recipe: what to do.
        data: tokenised text and its tokenizer.
        ranks: who takes part; every rank has a trainer of its own.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, ranks: Ranks = ALONE) -> None:
        self.recipe, self.data, self.ranks = recipe, data, ranks
        self.learner = Learner(recipe, data, ranks)
        noise, size = recipe.noise, recipe.model.embedding_dim
        self.schedule: Schedule = make_schedule(
            noise.schedule, size, data.tokenizer.vocab_size, noise.sigma_min, noise.sigma_max
        )
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
        batches = draw_step(self.shards, self.data, self.recipe, self.schedule, progress.step, self.learner.device)
        first_pass = draw_first_pass(self.recipe, progress.step)
        live = self.ranks.sum(torch.stack([draw.live for _, draw in batches]).sum())
        outcomes, norm = self.learner.compute_gradients(
            [draw for _, draw in batches], self.schedule, progress.step, live=live, self_conditioned=first_pass
        )
        found, observed = self._sum(batches, outcomes, first_pass)
        finite = found.loss.isfinite() & norm.isfinite()
        self.learner.update(learning_rate(config, progress.step, progress.share(config)), finite)
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
        sums = []
        for (batch, draw), outcome in zip(batches, outcomes, strict=True):
            counted = Sums.of(self.learner.denoiser, batch, draw, outcome, first_pass).flatten()
            sums.append(torch.cat([counted, self._bin_by_noise(outcome).flatten()]))
        found = self.ranks.sum(torch.stack(sums).sum(0))
        bins = 2 * EntropyCurve.BINS
        return Sums.unflatten(found[:-bins]), found[-bins:].view(2, -1)

    def _bin_by_noise(self, outcome: Outcome) -> Tensor:
        """What a batch says of cross-entropy against noise, for the adaptive schedule: sums, [2, BINS]."""
        if self.curve is None:
            return outcome.loss.new_zeros(2, EntropyCurve.BINS)
        fitted_N = outcome.open_N & outcome.shared_N & outcome.sigma_N.isfinite()
        return self.curve.binned(outcome.sigma_N, outcome.cross_entropy_N, fitted_N)

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
        draws = draw_heldout(self.data, self.recipe, self.schedule, self.learner.device)
        live = sum((draw.live for draw in draws), torch.zeros((), dtype=torch.long, device=self.learner.device))
        first_pass = self_conditions(self.recipe)
        losses = dict.fromkeys(self.learner.losses, 0.0)
        self.learner.denoiser.eval()
        for name in losses:
            for draw in draws:
                rows = self.ranks.part(len(draw.ids_BS))
                own = draw.map(lambda t: t[rows])  # noqa: B023
                with torch.no_grad():
                    outcome = self.learner.loss(name, own, self.schedule, live=live, self_conditioned=first_pass)
                losses[name] += float((outcome.cross_entropy_N.double() * outcome.open_N).sum() / live.clamp(min=1))
        self.learner.denoiser.train()
        totals = self.ranks.sum(torch.tensor(list(losses.values()), dtype=torch.float64)).tolist()
        found = zip(losses, totals, strict=True)
        self.progress.heldout = {name: loss for name, loss in found if live and math.isfinite(loss)}

    def model(self) -> ScoreLM | None:
        """The weights, or their average, that are best on held-out text, as a model; None but on the main rank."""
        heldout = self.progress.heldout
        untested = next(iter(self.learner.averages), "weights")
        best = min(heldout, key=lambda name: heldout[name]) if heldout else untested
        weights = self.learner.weights(best)
        if not self.ranks.main:
            return None
        text = self.recipe.data
        made = Provenance(
            data=text.source, field=text.field, csv_separator=text.csv_separator, split=text.split,
            holdout=text.holdout, fingerprint=self.data.text_fingerprint, steps=self.progress.step,
            tokens=self.progress.tokens, heldout_loss=heldout.get(best),
        )  # fmt: skip
        lengths, objective = self.data.lengths(self.recipe), self.recipe.training.objective
        lm = ScoreLM(self.recipe.model, self.data.tokenizer, self.schedule, lengths, made, objective)
        lm.denoiser.load_state_dict(weights)
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
            "schedule": schedule_to_dict(self.schedule),
            "batches": {index: kept for part in self.ranks.gather(owned) for index, kept in part},
            "fingerprint": self.data.fingerprint,
        }
        return tensors, state

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that `find_checkpoint` has found, as if the run had never stopped.

        Raises:
            InputError: the text is not what the run was started with, or the checkpoint does not fit.
        """
        (tensors, _), state = self.snapshot(), read_state(checkpoint)
        if state["fingerprint"] != self.data.fingerprint:
            raise InputError(f"{self.recipe.data.source} has changed since {checkpoint} was written; start a new run")
        read_tensors(checkpoint, tensors, self.ranks)
        self.learner.load_tensors(tensors)
        self.schedule = schedule_from_dict(state["schedule"])
        if self.curve is not None and isinstance(self.schedule, Gumbel):
            self.curve.schedule, self.curve.sums = self.schedule, tensors["curve"].clone()
        skipped, in_a_row = state["skipped"]
        self.progress = Progress(state["step"], state["tokens"], state["seconds"], skipped, in_a_row, state["heldout"])
        self.unread = Unread.after(self.progress, self.learner.device)
        for shard in self.shards:
            shard.batches.set_state(state["batches"][str(shard.index)])


def run(trainer: Trainer, out: Path, begin: Callable[[], object], say: Say = speak) -> None:
    """Train to the end of the budget; write metrics, samples, checkpoints and the model to a run directory.

    The main rank calls `begin` after the first step, before anything is written.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        DivergedError: too many steps in a row whose loss or gradient is not finite.
        DiskError: a file could not be written.
    """
    config, ranks, progress, learner = trainer.recipe.training, trainer.ranks, trainer.progress, trainer.learner
    peak = matmul_peak(learner.device, learner.dtype) * ranks.world
    log = RunLog(out, progress.step, config.tensorboard, ranks.main, say)
    saver = Saver(out / "checkpoints", config.keep, ranks, config.async_save, config.save_minutes)
    with log, deferred_signals() as received, saver:
        if progress.share(config) >= 1:  # killed between the last checkpoint and its model
            save_model(trainer, out)
        stopping = False
        while progress.share(config) < 1 and not stopping:
            started = time.perf_counter()
            trainer.step()
            stopping, due = agree(trainer, time.perf_counter() - started, len(received), saver.due)
            if ranks.main and log.file is None:
                begin()
                log.open()
            saver.poll()
            share = progress.share(config)
            log.advance(progress.step, share)
            if progress.step % config.log_every == 0 or share >= 1:
                log.write(measure(trainer, peak), share)
            if config.sample_every and progress.step % config.sample_every == 0:
                save_samples(trainer, out)
            if progress.step % config.save_every == 0 or share >= 1 or due:
                trainer.measure_heldout()
                save(trainer, saver, out)
        if stopping:
            signum = max(max(ranks.gather(received), default=[]), default=signal.SIGTERM)
            log.say(f"{signal.Signals(signum).name}: saving step {progress.step:,}")
            save(trainer, saver, out)
            raise Interrupted(signum)


def agree(trainer: Trainer, seconds: float, signals: int, due: bool) -> tuple[bool, bool]:
    """Count the time that the main rank took for a step.

    Returns:
        Whether any rank was told to stop, and whether the main rank finds a checkpoint due.
    """
    main = trainer.ranks.main
    own = torch.tensor([seconds * main, signals, due and main], dtype=torch.float64)
    elapsed, received, waited = trainer.ranks.sum(own).tolist()
    trainer.progress.seconds += elapsed
    trainer.window.seconds += elapsed
    return bool(received), bool(waited)


def measure(trainer: Trainer, peak: float) -> dict[str, Any]:
    """A line of metrics.jsonl for the steps since the last one; `peak` is the FLOP/s of all ranks at best."""
    trainer.read()
    window, progress, learner = trainer.window, trainer.progress, trainer.learner
    trainer.window = Window(learner.device)
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        **window.summary(peak),
        "skipped_steps": progress.skipped,
        "gradient_norm": progress.gradient_norm,
        "parameter_norm": parameter_norm(learner.denoiser),
        "embedding_anisotropy": anisotropy(learner.denoiser),
        "lr": learner.optimizers[0].param_groups[0]["lr"],
        "seconds": progress.seconds,
    }


def save(trainer: Trainer, saver: Saver, out: Path) -> None:
    """Write a checkpoint, and the model as it is now."""
    saver.save(trainer.progress.step, *trainer.snapshot())
    save_model(trainer, out)


def save_model(trainer: Trainer, out: Path) -> None:
    """Put the model as it is now in the place of the last one."""
    lm = trainer.model()
    if lm is not None:
        write_model(lm, out / "model")


def save_samples(trainer: Trainer, out: Path) -> None:
    """Append a few samples of the model as it is now to samples.txt."""
    lm = trainer.model()
    if lm is not None:
        append_samples(out / "samples.txt", trainer.progress.step, [s.text for s in lm.generate(n=4, steps=32)])

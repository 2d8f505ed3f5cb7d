"""The training loop: from a recipe to a run directory with metrics, checkpoints and a model.

Every draw is seeded by (seed, step), so that a run that was interrupted and resumed repeats the uninterrupted one bit
for bit. Run it with ``scorelm train --data FILE --out DIR``.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from scorelm.config import Recipe, TrainingConfig
from scorelm.device import matmul_peak, pick_device, pick_dtype
from scorelm.model.denoiser import Denoiser
from scorelm.model.scorelm import Provenance, ScoreLM
from scorelm.noise.levels import runs
from scorelm.noise.schedule import EntropyCurve, Gumbel, Schedule, make_schedule, schedule_from_dict, schedule_to_dict
from scorelm.training import checkpoint
from scorelm.training.data import TrainingData
from scorelm.training.ema import averages
from scorelm.training.logging import RunLog, Window, anisotropy, useful_flops
from scorelm.training.loss import Batch, Draw, Outcome
from scorelm.training.objective import OBJECTIVES
from scorelm.training.signals import Interrupted, deferred_signals

HELDOUT_BATCHES = 4


class Trainer:
    """The state of a run and the step that changes it.

    Args:
        recipe: what to do.
        out: the run directory.
        data: tokenised text and its tokenizer.
    """

    def __init__(self, recipe: Recipe, out: Path, data: TrainingData) -> None:
        self.recipe, self.config, self.out, self.data = recipe, recipe.training, out, data
        self.objective = OBJECTIVES[self.config.objective]
        self.device = pick_device(self.config.device)
        self.dtype = pick_dtype(self.config.precision, self.device)
        torch.manual_seed(self.config.seed)
        self.denoiser = Denoiser(recipe.model, data.tokenizer.vocab_size)
        self.denoiser.set_prior(data.token_counts())
        self.denoiser.to(self.device)
        self.optimizer = make_optimizer(self.denoiser, self.config)
        self.averages = averages(self.denoiser, self.config.ema)
        noise, size = recipe.noise, recipe.model.embedding_dim
        self.schedule: Schedule = make_schedule(
            noise.schedule, size, data.tokenizer.vocab_size, noise.sigma_min, noise.sigma_max
        )
        self.curve = EntropyCurve(self.schedule) if isinstance(self.schedule, Gumbel) else None
        self.batches = data.batches(recipe)
        self.step, self.tokens, self.seconds, self.gradient_norm = 0, 0, 0.0, 0.0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.heldout: dict[str, float] = {}
        self.window = Window()

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        if self.config.minutes:
            return min(1.0, self.seconds / (60 * self.config.minutes))
        return self.step / (self.config.steps or 20_000)

    @property
    def self_conditions(self) -> bool:
        """Whether some steps feed a first estimate back."""
        return self.objective.self_conditions and self.config.self_conditioning > 0

    def learning_rate(self) -> float:
        """Warm-up, constant, then linear decay to 0 over the last share of the run (DESIGN: training)."""
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup))
        cool = min(1.0, (1 - self.share) / self.config.decay) if self.config.decay else 1.0
        return self.config.lr * warm * cool

    def train_step(self) -> None:
        """One optimiser step over `accumulation` batches; skipped where the loss or a gradient is not finite.

        Raises:
            FloatingPointError: more than `skip_limit` steps in a row were skipped.
        """
        started = time.perf_counter()
        sums = None if self.curve is None else self.curve.sums.copy()
        rng = generator(self.config.seed, self.step)
        batches = [to_batch(next(self.batches)) for _ in range(self.config.accumulation)]
        drawn = [self.objective.draw(batch, self.recipe.noise, self.schedule, rng) for batch in batches]
        live = sum(draw.live for draw in drawn)
        first_pass = self.self_conditions and float(torch.rand((), generator=rng)) < self.config.self_conditioning
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch, draw in zip(batches, drawn, strict=True):
            loss += self._backward(batch, draw, rng, live, first_pass)
        norm = float(nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.clip))
        if math.isfinite(loss) and math.isfinite(norm):
            self._update(norm)
        else:
            self._skip(loss, norm, sums)
        self.step += 1
        if self.curve is not None and self.step % 10 == 0:
            self.schedule = self.curve.fit()
        if math.isfinite(loss):
            self.window.loss += loss
            self.window.steps += 1
        self.window.seconds += time.perf_counter() - started
        self.seconds += time.perf_counter() - started

    def _update(self, norm: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        for average in self.averages.values():
            average.update_parameters(self.denoiser)
        self.gradient_norm, self.skipped_in_a_row = norm, 0

    def _skip(self, loss: float, norm: float, sums: np.ndarray | None) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.curve is not None and sums is not None:
            self.curve.sums = sums
        if self.skipped_in_a_row > self.config.skip_limit:
            which = f"the loss is {loss:g} and the gradient norm {norm:g}, in {self.skipped_in_a_row} steps in a row"
            raise FloatingPointError(f"step {self.step + 1}: {which}; the last checkpoint is kept")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _loss(self, model: Denoiser, draw: Draw, rng: torch.Generator, live: int, first_pass: bool) -> Outcome:
        draw = to_device(draw, self.device)
        return self.objective.loss(model, draw, rng, self.schedule, self.config, live=live, self_conditioned=first_pass)

    def _backward(self, batch: Batch, draw: Draw, rng: torch.Generator, live: int, first_pass: bool) -> float:
        with self._autocast():
            outcome = self._loss(self.denoiser, draw, rng, live, first_pass)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        if self.curve is not None:
            fitted = outcome.shared_N & torch.isfinite(outcome.sigma_N)
            self.curve.update(outcome.sigma_N[fitted], outcome.cross_entropy_N[fitted])
        documents = runs(batch.segment)
        lengths = torch.bincount(documents.index_BL[batch.segment > 0])
        self.window.add(outcome, self.denoiser.embedding.norm)
        streams = draw.ids_BS.shape[1] // batch.ids.shape[1]
        self.window.flops += useful_flops(self.denoiser, lengths, streams, draw.live, first_pass)
        tokens = int((batch.segment > 0).sum())
        self.tokens += tokens
        self.window.tokens += tokens
        self.window.positions += batch.segment.numel()
        return float(outcome.loss.detach())

    def metrics(self, peak: float) -> dict[str, Any]:
        """A line of metrics.jsonl for the steps since the last one."""
        w, self.window = self.window, Window()
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": w.loss / w.steps if w.steps else None,
            "accuracy": w.correct / max(1, w.live),
            "loss_by_snr": w.by_band(),
            "skipped_steps": self.skipped,
            "gradient_norm": self.gradient_norm,
            "parameter_norm": float(torch.stack([p.detach().norm() for p in self.denoiser.parameters()]).norm()),
            "embedding_anisotropy": anisotropy(self.denoiser),
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": w.tokens / w.seconds,
            "packing_efficiency": w.tokens / w.positions,
            "mfu": w.flops / w.seconds / peak,
            "seconds": self.seconds,
        }

    def evaluate(self) -> dict[str, float]:
        """Training loss on held-out text at fixed noise, nats, for the weights and each of their averages."""
        models: dict[str, Any] = {"weights": self.denoiser, **{k: a.module for k, a in self.averages.items()}}
        losses = dict.fromkeys(models, 0.0)
        batches = [to_batch(arrays) for arrays in islice(self.data.heldout_batches(self.recipe), HELDOUT_BATCHES)]
        drawn = [
            self.objective.draw(b, self.recipe.noise, self.schedule, generator(1, k)) for k, b in enumerate(batches)
        ]
        live = sum(draw.live for draw in drawn)
        for name, model in models.items():
            for k, draw in enumerate(drawn):
                with torch.no_grad(), self._autocast():
                    outcome = self._loss(model, draw, generator(2, k), live, self.self_conditions)
                losses[name] += float(outcome.cross_entropy_N.double().sum()) / live
        self.heldout = {name: loss for name, loss in losses.items() if math.isfinite(loss)} if live else {}
        return self.heldout

    def model(self) -> ScoreLM:
        """The weights or average that is best on held-out text, as a model of its own."""
        untested = next(iter(self.averages), "weights")
        best = min(self.heldout, key=lambda name: self.heldout[name]) if self.heldout else untested
        chosen = self.averages[best].module if best in self.averages else self.denoiser
        made = Provenance(
            data=self.recipe.data.source, steps=self.step, tokens=self.tokens, heldout_loss=self.heldout.get(best)
        )
        lengths, objective = self.data.lengths(self.recipe), self.config.objective
        lm = ScoreLM(self.recipe.model, self.data.tokenizer, self.schedule, lengths, made, objective)
        lm.denoiser.load_state_dict(chosen.state_dict())
        return lm.to(self.device).eval()

    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            "model": self.denoiser.state_dict(),
            "optimizer": get_optimizer_state_dict(self.denoiser, self.optimizer),
            "ema": {name.replace(".", "_"): average.state_dict() for name, average in self.averages.items()},
        }
        if self.curve is not None:
            tensors["curve"] = torch.from_numpy(self.curve.sums)
        return tensors

    def save(self) -> None:
        """Write a checkpoint, and the model as it is now."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "heldout": self.heldout,
            "schedule": schedule_to_dict(self.schedule),
            "batches": self.batches.get_state(),
            "fingerprint": self.data.fingerprint,
        }
        checkpoint.save(self.out / "checkpoints", self.step, self._tensors(), state, self.config.keep)
        self.write_model()

    def write_model(self) -> None:
        """Put the model as it is now in the place of the last one."""
        draft, final = self.out / ".model-writing", self.out / "model"
        shutil.rmtree(draft, ignore_errors=True)
        lm = self.model()
        with checkpoint.all_or_nothing(draft, final):
            lm.save_pretrained(draft)
            replace_directory(draft, final)

    def resume(self, start: Path | None = None) -> None:
        """Continue from a checkpoint that `checkpoint.find` has found, by default the newest of the run directory.

        Raises:
            ValueError: the text is not what the run was started with, or the checkpoint does not fit.
        """
        newest = start or checkpoint.find(self.out / "checkpoints")
        state, tensors = checkpoint.read_state(newest), self._tensors()
        if state["fingerprint"] != self.data.fingerprint:
            raise ValueError(f"{self.recipe.data.source} has changed since {newest} was written; start a new run")
        checkpoint.read_tensors(newest, tensors)
        self.denoiser.load_state_dict(tensors["model"])
        set_optimizer_state_dict(self.denoiser, self.optimizer, tensors["optimizer"])
        for name, average in self.averages.items():
            average.load_state_dict(tensors["ema"][name.replace(".", "_")])
        self.schedule = schedule_from_dict(state["schedule"])
        if self.curve is not None and isinstance(self.schedule, Gumbel):
            self.curve.schedule, self.curve.sums = self.schedule, tensors["curve"].numpy().copy()
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.heldout, (self.skipped, self.skipped_in_a_row) = state["heldout"], state["skipped"]
        self.batches.set_state(state["batches"])

    def run(self) -> None:
        """Train to the end of the budget; on SIGINT or SIGTERM save and raise `Interrupted`."""
        peak = matmul_peak(self.device, self.dtype)
        with RunLog(self.out, self.recipe, self.step) as log, deferred_signals() as received:
            if self.share >= 1:  # killed between the last checkpoint and its model
                self.write_model()
            while self.share < 1 and not received:
                self.train_step()
                log.advance(self.step, self.share)
                done = self.share >= 1
                if self.step % self.config.log_every == 0 or done:
                    log.write(self.metrics(peak), self.share)
                if self.config.sample_every and self.step % self.config.sample_every == 0:
                    self.write_samples()
                if done or self.step % self.config.save_every == 0:
                    self.evaluate()
                    self.save()
            if received:
                log.say(f"{signal.Signals(received[0]).name}: saving step {self.step:,}")
                self.save()
                raise Interrupted(received[0])

    def write_samples(self) -> None:
        """Append a few samples to samples.txt."""
        samples = self.model().generate(n=4, steps=32)
        with (self.out / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"step {self.step}\n" + "".join(f"  {s.text}\n" for s in samples))


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """A packed batch as tensors."""
    return Batch(*(torch.from_numpy(arrays[name]) for name in Batch._fields))


def to_device(draw: Draw, device: torch.device) -> Draw:
    """The same draw on another device."""
    ids, sigma, shared, layout, weight = draw
    weight = None if weight is None else weight.to(device)
    return Draw(ids.to(device), sigma.to(device), shared.to(device), layout.to(device), weight)


def generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator whose numbers depend on (seed, step) alone."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def make_optimizer(denoiser: Denoiser, config: TrainingConfig) -> torch.optim.Optimizer:
    """Fused AdamW with decay on the trunk's matrices only."""
    decayed = {id(p) for p in denoiser.trunk.parameters() if p.ndim == 2}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in denoiser.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in denoiser.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
    for p in denoiser.parameters():  # moments for every parameter from the start, so that every checkpoint has them
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def replace_directory(draft: Path, final: Path) -> None:
    """Put `draft` in the place of `final`."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)

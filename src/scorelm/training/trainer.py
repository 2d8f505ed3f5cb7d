"""The training loop: from a recipe to a run directory with metrics, checkpoints and a model.

Every draw is seeded by (seed, step), so that a run that was interrupted and resumed repeats the uninterrupted one bit
for bit. Run it with ``scorelm train --data FILE --out DIR``.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from scorelm.config import Recipe
from scorelm.device import check_compiler, matmul_peak, pick_device, pick_dtype
from scorelm.model.denoiser import Denoiser
from scorelm.model.scorelm import Provenance, ScoreLM
from scorelm.noise.schedule import EntropyCurve, Gumbel, Schedule, make_schedule
from scorelm.training import checkpoint, snapshot
from scorelm.training.data import TrainingData
from scorelm.training.distributed import ALONE, Ranks, gradients_stay, share_out, whole, whole_state
from scorelm.training.draws import SHARED, draw_heldout, draw_step, generator, sent
from scorelm.training.ema import averages
from scorelm.training.logging import RunLog, Window, anisotropy
from scorelm.training.loss import Draw, Outcome
from scorelm.training.objective import OBJECTIVES, Loss
from scorelm.training.optimizer import make_optimizers, set_learning_rate
from scorelm.training.signals import Interrupted, deferred_signals


class Trainer:
    """The state of a run and the step that changes it.

    Args:
        recipe: what to do.
        out: the run directory.
        data: tokenised text and its tokenizer.
        ranks: who takes part; every rank has a trainer of its own.
    """

    def __init__(self, recipe: Recipe, out: Path, data: TrainingData, ranks: Ranks = ALONE) -> None:
        self.recipe, self.config, self.out, self.data, self.ranks = recipe, recipe.training, out, data, ranks
        self.objective = OBJECTIVES[self.config.objective]
        self.device = pick_device(self.config.device)
        self.dtype = pick_dtype(self.config.precision, self.device)
        torch.manual_seed(self.config.seed)
        self.denoiser = Denoiser(recipe.model, data.tokenizer.vocab_size)
        self.denoiser.set_prior(data.token_counts())
        self.denoiser.to(self.device)
        self.averages = averages(self.denoiser, self.config.ema)
        self.losses = {
            name: self._share_out(cast(Denoiser, average.module), False) for name, average in self.averages.items()
        }
        if self.config.compile:
            check_compiler(self.device)
            for block in self.denoiser.trunk.blocks:
                block.compile()
        self.losses["weights"] = self._share_out(self.denoiser, True)
        self.optimizers = make_optimizers(self.denoiser, self.config)
        noise, size = recipe.noise, recipe.model.embedding_dim
        self.schedule: Schedule = make_schedule(
            noise.schedule, size, data.tokenizer.vocab_size, noise.sigma_min, noise.sigma_max
        )
        self.curve = EntropyCurve(self.schedule) if isinstance(self.schedule, Gumbel) else None
        self.shards = data.shards(recipe, ranks)
        self.saver = checkpoint.Saver(out / "checkpoints", self.config.keep, ranks, self.config.async_save)
        self.step, self.tokens, self.seconds, self.update_seconds, self.gradient_norm = 0, 0, 0.0, 0.0, 0.0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.received: list[int] = []
        self.stopping = False
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
        drawn = draw_step(self.shards, self.objective.draw, self.recipe, self.schedule, self.step)
        live = int(self.ranks.sum(torch.tensor(sum(draw.live for _, draw in drawn))))
        chance = float(torch.rand((), generator=generator(self.config.seed, self.step, SHARED)))
        first_pass = self.self_conditions and chance < self.config.self_conditioning
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        outcomes = []
        for k, (_, draw) in enumerate(drawn):
            with gradients_stay(self.losses["weights"], k < len(drawn) - 1):
                outcomes.append(self._backward(draw, live, first_pass))
        norm = float(whole(nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.clip)))
        loss, tokens, observed = 0.0, 0, np.zeros((2, EntropyCurve.BINS))
        for (batch, draw), outcome in zip(drawn, (o.on_host() for o in outcomes), strict=True):
            loss += float(outcome.loss)
            tokens += int((batch.segment > 0).sum())
            observed += self._observed(outcome)
            self.window.add(self.denoiser, batch, draw, outcome, first_pass)
        mine = [
            loss,
            tokens,
            (time.perf_counter() - started + self.update_seconds) * self.ranks.main,
            len(self.received),
            *observed.flatten(),
        ]
        loss, tokens, elapsed, stop, *sums = self.ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        started = time.perf_counter()
        if math.isfinite(loss) and math.isfinite(norm):
            self._update(norm, np.array(sums).reshape(observed.shape))
        else:
            self._skip(loss, norm)
        self.update_seconds = time.perf_counter() - started  # counted with the next step
        self.step += 1
        if self.curve is not None and self.step % 10 == 0:
            self.schedule = self.curve.fit()
        self.tokens += int(tokens)
        self.seconds += elapsed
        self.stopping = stop > 0
        self.window.advance(loss, int(tokens), elapsed)

    def _update(self, norm: float, observed: np.ndarray) -> None:
        set_learning_rate(self.optimizers, self.learning_rate())
        for optimizer in self.optimizers:
            optimizer.step()
        for average in self.averages.values():
            average.update_parameters(self.denoiser)
        if self.curve is not None:
            self.curve.add(observed)
        self.gradient_norm, self.skipped_in_a_row = norm, 0

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.skip_limit:
            which = f"the loss is {loss:g} and the gradient norm {norm:g}, in {self.skipped_in_a_row} steps in a row"
            raise FloatingPointError(f"step {self.step + 1}: {which}; the last checkpoint is kept")

    def _backward(self, draw: Draw, live: int, first_pass: bool) -> Outcome:
        """Gradients of a batch; DDP and FSDP take means over ranks, where a sum is wanted."""
        outcome = self._loss("weights", draw, live, first_pass)
        (outcome.loss * self.ranks.world).backward()  # type: ignore[no-untyped-call]
        return outcome

    def _loss(self, name: str, draw: Draw, live: int, first_pass: bool) -> Outcome:
        """The loss of the weights, or of one of their averages."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outcome: Outcome = self.losses[name](
                sent(draw, self.device), self.schedule, self.config, live=live, self_conditioned=first_pass
            )
        return outcome

    def _observed(self, outcome: Outcome) -> np.ndarray:
        """What a batch says of cross-entropy against noise, for the adaptive schedule."""
        if self.curve is None:
            return np.zeros((2, EntropyCurve.BINS))
        fitted = outcome.shared_N & torch.isfinite(outcome.sigma_N)
        return self.curve.binned(outcome.sigma_N[fitted], outcome.cross_entropy_N[fitted])

    def _share_out(self, denoiser: Denoiser, trained: bool) -> nn.Module:
        """What computes the loss of a model on this rank's part of a batch."""
        ranks, loss = self.ranks if trained else ALONE, Loss(denoiser, self.objective)
        return share_out(
            loss, denoiser.trunk.blocks, self.config.parallel, ranks, self.dtype, not self.objective.self_conditions
        )

    def metrics(self, peak: float) -> dict[str, Any]:
        """A line of metrics.jsonl for the steps since the last one."""
        w, self.window = self.window.summed(self.ranks), Window()
        norms = [whole(p.detach().norm()) for p in self.denoiser.parameters()]
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": w.loss / w.steps if w.steps else None,
            "accuracy": w.correct / max(1, w.live),
            "loss_by_snr": w.by_band(),
            "skipped_steps": self.skipped,
            "gradient_norm": self.gradient_norm,
            "parameter_norm": float(torch.stack(norms).norm()),
            "embedding_anisotropy": anisotropy(self.denoiser),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": w.tokens / w.seconds,
            "packing_efficiency": w.tokens / w.positions,
            "mfu": w.flops / w.seconds / (peak * self.ranks.world),
            "seconds": self.seconds,
        }

    def evaluate(self) -> dict[str, float]:
        """Training loss on held-out text at fixed noise, nats, for the weights and each of their averages."""
        losses = dict.fromkeys(self.losses, 0.0)
        drawn = draw_heldout(self.data, self.objective.draw, self.recipe, self.schedule)
        live = sum(draw.live for draw in drawn)
        for name in losses:
            for draw in drawn:
                rows = self.ranks.part(len(draw.ids_BS))
                own = draw.map(lambda t: t[rows])  # noqa: B023
                with torch.no_grad():
                    outcome = self._loss(name, own, live, self.self_conditions)
                losses[name] += float(outcome.cross_entropy_N.double().sum()) / max(live, 1)
        totals = self.ranks.sum(torch.tensor(list(losses.values()), dtype=torch.float64)).tolist()
        self.heldout = {name: loss for name, loss in zip(losses, totals, strict=True) if live and math.isfinite(loss)}
        return self.heldout

    def model(self) -> ScoreLM | None:
        """The weights or average that is best on held-out text, as a model of its own, on the main rank."""
        untested = next(iter(self.averages), "weights")
        best = min(self.heldout, key=lambda name: self.heldout[name]) if self.heldout else untested
        weights = whole_state(self.averages[best].module if best in self.averages else self.denoiser)
        if not self.ranks.main:
            return None
        made = Provenance(
            data=self.recipe.data.source, steps=self.step, tokens=self.tokens, heldout_loss=self.heldout.get(best)
        )
        lengths, objective = self.data.lengths(self.recipe), self.config.objective
        lm = ScoreLM(self.recipe.model, self.data.tokenizer, self.schedule, lengths, made, objective)
        lm.denoiser.load_state_dict(weights)
        return lm.to(self.device).eval()

    def save(self) -> None:
        """Write a checkpoint, and the model as it is now."""
        tensors, state = snapshot.tensors(self), snapshot.state(self)
        self.saver.save(self.step, tensors, state)
        self.write_model()

    def write_model(self) -> None:
        """Put the model as it is now in the place of the last one."""
        lm, draft, final = self.model(), self.out / ".model-writing", self.out / "model"
        if lm is None:
            return
        shutil.rmtree(draft, ignore_errors=True)
        with checkpoint.all_or_nothing(draft, final):
            lm.save_pretrained(draft)
            checkpoint.replace_directory(draft, final)

    def run(self) -> None:
        """Train to the end of the budget; on SIGINT or SIGTERM save and raise `Interrupted`."""
        peak = matmul_peak(self.device, self.dtype)
        log, signals = RunLog(self.out, self.recipe, self.step, self.ranks.main), deferred_signals()
        with log, signals as self.received, self.saver:
            if self.share >= 1:  # killed between the last checkpoint and its model
                self.write_model()
            while self.share < 1 and not self.stopping:
                self.train_step()
                self.saver.poll()
                log.advance(self.step, self.share)
                done = self.share >= 1
                if self.step % self.config.log_every == 0 or done:
                    log.write(self.metrics(peak), self.share)
                if self.config.sample_every and self.step % self.config.sample_every == 0:
                    self.write_samples()
                if done or self.step % self.config.save_every == 0:
                    self.evaluate()
                    self.save()
            if self.stopping:
                signum = max(max(self.ranks.gather(self.received), default=[]), default=signal.SIGTERM)
                log.say(f"{signal.Signals(signum).name}: saving step {self.step:,}")
                self.save()
                raise Interrupted(signum)

    def write_samples(self) -> None:
        """Append a few samples to samples.txt."""
        lm = self.model()
        if lm is None:
            return
        samples = lm.generate(n=4, steps=32)
        with (self.out / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"step {self.step}\n" + "".join(f"  {s.text}\n" for s in samples))

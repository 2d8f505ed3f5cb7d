"""The loop of a run: steps, and between them lines of metrics, prices of held-out text, samples and checkpoints."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scorelm.config.recipe import TrainingConfig
from scorelm.device import matmul_peak
from scorelm.errors import InputError, brief
from scorelm.lm import ScoreLM
from scorelm.model.directory import read_manifest
from scorelm.training.checkpoint import PREFIX, Saver, find_damage, write_model
from scorelm.training.heldout import decide, plan, times_of, verdict
from scorelm.training.metrics import Window, anisotropy, parameter_norm
from scorelm.training.progress import Progress, point
from scorelm.training.runlog import RunLog, Say, speak
from scorelm.training.signals import Interrupted, deferred_signals
from scorelm.training.trainer import Trainer

MakeFilm = Callable[[ScoreLM], str]
"""Shows a model at work, on a web page."""
PLAN_AT = 0.02
"""Share of a run after which it is clear how many tokens it will train on, and prices can be planned."""
MARKS = (1, 2, 4, 8, 16)
"""Steps of a process after which its pace is taken: the first ones may compile, which takes as long as hundreds."""
FIRST_SAMPLES = 60.0
"""Seconds of training before the first texts in samples.txt."""


def run(
    trainer: Trainer, out: Path, begin: Callable[[], object], say: Say = speak, film: MakeFilm | None = None
) -> None:
    """Train to the end of the budget; write metrics, samples, checkpoints and the model to a run directory.

    The main rank calls `begin` after the first step, before anything is written, and `film` at the end, if there are
    trackers to show it.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        DivergedError: too many steps in a row whose loss or gradient is not finite.
        DiskError: a file could not be written.
    """
    config, progress = trainer.recipe.training, trainer.progress
    ranks, learner = trainer.ranks, trainer.learner
    peak = matmul_peak(learner.device, learner.dtype) * ranks.world
    log = RunLog(out, progress.step, trainer.recipe, ranks.main, say)
    saver = Saver(out / "checkpoints", config.keep, ranks, config.async_save, config.save_minutes)
    with log, deferred_signals() as received, saver:
        saver.pinned = progress.watch.best_step
        if progress.step and progress.watch.keeps(progress.step) and not holds_model(out / "model", progress.step):
            save_model(trainer, out)  # killed before it was written
        stopping, first, marks = False, progress.step, list[Progress]()
        while progress.share(config) < 1 and not stopping:
            started, before = time.perf_counter(), replace(progress)
            trainer.step()
            if marked := progress.step - first in MARKS:
                trainer.read()  # which waits for all that these steps have begun
            stopping, due = agree(trainer, time.perf_counter() - started, len(received), saver.due)
            if ranks.main and log.file is None:
                begin()
                log.open()
            saver.poll()
            share = progress.share(config)
            log.advance(progress.step, share)
            marks += [replace(progress)] if marked else []
            looked = look(trainer, marks, saver, log)
            if progress.step % config.log_every == 0 or share >= 1 or looked:
                log.write(measure(trainer, peak, looked), share)
            if progress.step % config.save_every == 0 or share >= 1 or due or looked:
                save(trainer, saver, out)
            if looked or samples_due(before, progress, config):
                save_samples(trainer, log)
        if film is not None and log.feeds and not stopping:
            show(film, trainer, out, log)
        if stopping:
            signum = max(max(ranks.gather(received), default=[]), default=signal.SIGTERM)
            log.say(f"{signal.Signals(signum).name}: saving step {progress.step:,}")
            save(trainer, saver, out)
            raise Interrupted(signum)


def show(film: MakeFilm, trainer: Trainer, out: Path, log: RunLog) -> None:
    """Let trackers have a film of the model that is kept."""
    step, page = trainer.progress.step, film(ScoreLM.from_pretrained(out / "model").to(trainer.learner.device))
    log.tell(lambda tracker: tracker.page(step, "film", page))


def samples_due(before: Progress, now: Progress, config: TrainingConfig) -> bool:
    """Whether texts are shown that no prices go with: after a minute, and at every fifth of a run that has none."""
    if before.seconds < FIRST_SAMPLES <= now.seconds:
        return True
    return not now.watch.times and int(5 * before.share(config)) < int(5 * now.share(config))


def can_plan(progress: Progress, marks: Sequence[Progress], config: TrainingConfig) -> bool:
    """Whether it is clear how many tokens the run will read: of minutes, that takes its pace."""
    share = progress.share(config)
    if config.minutes and len(marks) < len(MARKS):
        return share >= (0.5 if len(marks) > 1 else 1)
    return share >= PLAN_AT


def forecast(progress: Progress, marks: Sequence[Progress], config: TrainingConfig) -> float:
    """Tokens that a run will have read at its end: of minutes, at the pace between the last two `marks`."""
    if not config.minutes or len(marks) < 2:
        return progress.tokens / progress.share(config)
    begun, then = marks[-2:]
    pace = (then.tokens - begun.tokens) / (then.seconds - begun.seconds)
    return progress.tokens + pace * max(0.0, 60 * config.minutes - progress.seconds)


def look(trainer: Trainer, marks: Sequence[Progress], saver: Saver, log: RunLog) -> bool:
    """Price held-out text where it is time for it, say how the run goes, and let it end if it has stopped improving.

    Returns:
        Whether there are new prices.
    """
    config, progress = trainer.recipe.training, trainer.progress
    watch, share = progress.watch, progress.share(config)
    if watch.times is None and can_plan(progress, marks, config):
        trainer.read()
        plan(watch, trainer.recipe, trainer.data, forecast(progress, marks, config))
        if not watch.times:
            log.say("held-out text is not priced (a short run, or nothing held out), so the run keeps its last weights")
        elif config.patience and watch.times <= config.patience:
            log.say(f"held-out text is priced {watch.times} times, so --patience {config.patience} can't end the run")
    if not progress.watch_due(config, times_of(watch, config.minutes)):
        return False
    started = time.perf_counter()
    trainer.look()
    if config.minutes:
        watch.took = trainer.ranks.gather(time.perf_counter() - started)[0]
    saver.pinned = watch.best_step
    log.show_price(decide(watch.prices, trainer.recipe))
    log.say(verdict(watch, trainer.epoch))
    if config.patience and watch.since >= config.patience and progress.cooling is None and share < 1:
        saver.finish()
        trainer.ranks.wait()  # until the main rank has sealed it
        best = saver.directory / f"{PREFIX}{watch.best_step:08d}"
        damage = find_damage(best)
        back = f"going back to {point(watch.best_epoch, watch.best_step)}, the best, to end from there"
        log.say(f"{damage}: the run ends from its weights as they are" if damage else back)
        trainer.cool(None if damage else best)
    return True


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


def measure(trainer: Trainer, peak: float, looked: bool) -> dict[str, Any]:
    """A line of metrics.jsonl for the steps since the last one; `peak` is the FLOP/s of all ranks at best.

    Prices of held-out text stand in the line of the step that they were taken at.
    """
    trainer.read()
    window, progress, learner = trainer.window, trainer.progress, trainer.learner
    trainer.window = Window(learner.device)
    return {
        "step": progress.step,
        "epoch": trainer.epoch,
        "tokens": progress.tokens,
        "heldout": {"step": progress.step, **progress.watch.prices} if looked else None,
        **window.summary(peak),
        "skipped_steps": progress.skipped,
        "gradient_norm": progress.gradient_norm,
        "parameter_norm": parameter_norm(learner.denoiser),
        "embedding_anisotropy": anisotropy(learner.denoiser),
        "lr": learner.optimizers[0].param_groups[0]["lr"],
        "seconds": progress.seconds,
    }


def save(trainer: Trainer, saver: Saver, out: Path) -> None:
    """Write a checkpoint, and the model if it is the best so far or none has been priced."""
    watch, step = trainer.progress.watch, trainer.progress.step
    if watch.best is None:
        trainer.measure_heldout()
    saver.save(step, *trainer.snapshot())
    if watch.keeps(step):
        save_model(trainer, out)


def holds_model(directory: Path, step: int) -> bool:
    """Whether a directory has the model as it was after that step."""
    try:
        return read_manifest(directory / "config.json").provenance.steps == step
    except (InputError, OSError):
        return False


def save_model(trainer: Trainer, out: Path) -> None:
    """Put the model as it is now in the place of the last one."""
    lm = trainer.model()
    if lm is not None:
        write_model(lm, out / "model")


def save_samples(trainer: Trainer, log: RunLog) -> None:
    """Append a few samples of the model as it is now to samples.txt, and show one."""
    config, lm = trainer.recipe.training, trainer.model()
    if lm is not None and config.samples:
        texts = lm.generate(n=config.samples, precision=config.precision)
        log.write_samples(trainer.progress.step, [sample.text for sample in texts])
        log.say(f"a text of step {trainer.progress.step:,}: {brief(texts[0].text, 200)}")

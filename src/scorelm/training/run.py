"""A run from a recipe to a model: what `scorelm.train` and ``scorelm train`` do in a run directory.

A run directory holds ``recipe.toml``, ``tokenizer.model``, ``metrics.jsonl``, ``samples.txt``, ``checkpoints/`` and
``model/``.
"""

from __future__ import annotations

import math
from pathlib import Path

from scorelm.config.recipe import Recipe
from scorelm.config.toml import load_recipe, to_toml
from scorelm.device import pick_device
from scorelm.errors import InputError, writing
from scorelm.parallel import ALONE, Ranks, were_restarted
from scorelm.training.checkpoint import find_checkpoint, list_checkpoints
from scorelm.training.data import prepare
from scorelm.training.durable import replace_file
from scorelm.training.runlog import Say, drop, speak
from scorelm.training.trainer import Trainer, run


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    fall_back: bool = False,
    ranks: Ranks = ALONE,
    say: Say = speak,
) -> Path:
    """Train a model on text, from the start or from the newest checkpoint of an earlier run.

    >>> from scorelm.config.recipe import DataConfig, Recipe, TrainingConfig
    >>> train(Recipe(data=DataConfig(source="my.txt"), training=TrainingConfig(minutes=10)), "runs/mine")

    Processes that torchrun starts again after one of them has died resume by themselves.

    Args:
        recipe: the text, the model, the noise and how long to train; `scorelm.config.toml.load_recipe` reads one.
        out: run directory to create, or to continue.
        resume: continue the run in `out`; data, model, noise, objective, optimiser and averages must be the run's own.
        fall_back: where the newest checkpoint is damaged, continue from the newest sound one; the damaged one is kept
            as ``checkpoints/damaged-STEP``.
        ranks: who takes part, from `scorelm.parallel.launched`.
        say: takes lines for people; by default they go to stderr, with a progress bar in a terminal.

    Returns:
        The model directory, for `ScoreLM.from_pretrained`.

    Raises:
        InputError: text, tokenizer, device or run directory that cannot be used, or a run that cannot be resumed.
        DiskError: a file could not be written; earlier checkpoints are whole.
        DivergedError: too many steps in a row whose loss or gradient is not finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    out, say = Path(out), say if ranks.main else drop
    pick_device(recipe.training.device)  # refused before the text is read
    with writing(out):
        if were_restarted() and list_checkpoints(out / "checkpoints"):
            recipe, resume = load_recipe(str(out / "recipe.toml")), True
        check_run_directory(recipe, out, resume, fall_back)
        out.mkdir(parents=True, exist_ok=True)
    recipe, start = with_shards(recipe, ranks.world), None
    if resume:
        found = find_checkpoint(out / "checkpoints", fall_back, say) if ranks.main else None
        start = ranks.gather(found)[0]
    data = prepare(recipe.data, out, resume, say, ranks)
    trainer = Trainer(recipe, data, ranks)
    if start is not None:
        trainer.restore(start)
    if ranks.main:
        replace_file(out / "recipe.toml", to_toml(recipe))
    say(describe(trainer))
    run(trainer, out, say)
    return out / "model"


def check_run_directory(recipe: Recipe, out: Path, resume: bool, fall_back: bool) -> None:
    """Refuse to overwrite a run that has a checkpoint, or to resume one with other data, model, noise or optimiser.

    Raises:
        InputError: says which.
    """
    begun, kept = list_checkpoints(out / "checkpoints"), out / "recipe.toml"
    if not resume:
        if begun:
            raise InputError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
        if fall_back:
            raise InputError("--fall-back needs --resume")
        return
    if not begun:
        raise InputError(f"nothing to resume: {out} has no checkpoint yet")
    old = load_recipe(str(kept))
    for room in ("data", "model", "noise"):
        if getattr(old, room) != getattr(recipe, room):
            raise InputError(f"the {room} options of a run can't change when it is resumed; {kept} has them")
    for name in ("objective", "optimizer", "ema"):
        if getattr(old.training, name) != getattr(recipe.training, name):
            raise InputError(f"the {name} of a run can't change when it is resumed; {kept} has it")


def with_shards(recipe: Recipe, world: int) -> Recipe:
    """The recipe with its number of shards decided: as many as ranks, as far as they divide a batch's rows evenly."""
    shards = recipe.training.shards or math.gcd(recipe.training.rows, world)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"shards": shards})})


def describe(trainer: Trainer) -> str:
    """Size of the model, amount of text, and where and how it is computed, in one line."""
    recipe, documents, learner, world = trainer.recipe, trainer.data.documents, trainer.learner, trainer.ranks.world
    size, count = recipe.model.size, sum(p.numel() for p in learner.denoiser.parameters())
    return (
        f"{count / 1e6:.1f}M parameters ({size.layers} layers of width {size.dim}), "
        f"{len(documents.train):,} examples, {len(documents.heldout):,} held out, "
        f"{str(learner.dtype).removeprefix('torch.')} on {learner.device}"
        + (f", {world} ranks ({recipe.training.parallel})" if world > 1 else "")
    )

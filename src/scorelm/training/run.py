"""A run from a recipe to a model: what `scorelm.train` and ``scorelm train`` do in a run directory.

A run directory holds ``recipe.toml``, a tokenizer, ``metrics.jsonl``, ``samples.txt``, ``checkpoints/`` and
``model/``. What was there before changes only when the first step has been made.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from scorelm.config.recipe import Recipe, check_end, kept_on_resume
from scorelm.config.toml import load_recipe, to_toml
from scorelm.device import pick_device
from scorelm.errors import InputError, writing
from scorelm.parallel import ALONE, Ranks
from scorelm.text.tokenizer import find_tokenizer
from scorelm.training.checkpoint import find_checkpoint, list_checkpoints, read_state
from scorelm.training.data import prepare
from scorelm.training.durable import replace_file
from scorelm.training.heldout import check_select
from scorelm.training.initial import Initial, adopt, check_held_out, read_initial
from scorelm.training.loop import MakeFilm, holds_model, run
from scorelm.training.lora import check_lora
from scorelm.training.progress import Progress, Watch, has_cooled
from scorelm.training.run_directory import DIRECTORIES, DRAFT, Hold, hold, list_files, remove_run
from scorelm.training.runlog import Say, drop, speak
from scorelm.training.trackers import check_trackers
from scorelm.training.trainer import Trainer


class Start(NamedTuple):
    """What a run starts from."""

    recipe: Recipe
    home: Path
    """Where its tokenizer is, or is to be written."""
    checkpoint: Path | None = None
    initial: Initial | None = None
    """The model that a new run starts from."""
    finished: bool = False
    longer: bool = False
    """Whether it goes on beyond the end that it had."""
    replace: bool = False
    """Whether an earlier run has to go."""


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    fall_back: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    say: Say = speak,
    film: MakeFilm | None = None,
) -> Path:
    """Train a model on text, from the start or from the newest checkpoint of an earlier run.

    >>> from scorelm.config.recipe import Recipe, TrainingConfig
    >>> from scorelm.config.text import DataConfig
    >>> train(Recipe(data=DataConfig(source="my.txt"), training=TrainingConfig(minutes=10)), "runs/mine")

    One process at a time trains in a run directory. Processes that torchrun starts again after one of them has died
    resume by themselves.

    Args:
        recipe: the text, the model, the noise and how long to train; `scorelm.config.toml.load_recipe` reads one.
        out: run directory to create, or to continue.
        resume: continue the run in `out`. The recipe must be the run's own but for the options of training that can
            change (`scorelm.config.recipe.kept_on_resume`); its `minutes` are added to those already trained, its
            `steps` are those of the whole run, and without either the run goes on to the end that it had.
        fall_back: where the newest checkpoint is damaged, continue from the newest sound one; the damaged one is kept
            as ``checkpoints/damaged-STEP``.
        overwrite: replace an earlier run in `out`; files that are no part of it stay.
        ranks: who takes part, from `scorelm.parallel.launched`.
        say: takes lines for people; by default they go to stderr, with a progress bar in a terminal.
        film: shows the model at work on a web page, which trackers get at the end of the run.

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
    check_select(recipe)
    check_trackers(recipe.training.track)
    check_lora(recipe.training.lora)
    if not resume and fall_back:
        raise InputError("--fall-back needs --resume")
    if resume and overwrite:
        raise InputError("--overwrite does not go with --resume: the one replaces a run, the other goes on with it")
    with ExitStack() as stack:
        held: list[Hold] = []

        def find_start() -> Start:
            held.append(stack.enter_context(hold(out, say)))
            with writing(out):
                if held[0].again and list_checkpoints(out / "checkpoints"):
                    return find_resumed(None, out, fall_back, say)
                if resume:
                    return find_resumed(recipe, out, fall_back, say)
                return find_new(recipe, out, overwrite or held[0].again)

        start = from_main(find_start, ranks)
        if start.finished:
            return out / "model"
        data = prepare(start.recipe.data, start.home, start.checkpoint is not None, say, ranks)
        start = start._replace(recipe=with_shards(start.recipe, ranks.world))
        if start.initial is not None:
            check_held_out(start.recipe, data.text_fingerprint, start.initial.provenance)
        trainer = Trainer(start.recipe, data, ranks, start.initial)
        if start.checkpoint is not None:
            trainer.restore(start.checkpoint, start.longer)
        say(describe(trainer))
        run(trainer, out, lambda: begin(start, out, held[0], say), say, film)
    return out / "model"


def from_main(find: Callable[[], Start], ranks: Ranks) -> Start:
    """What the main rank finds, on every rank; what it refuses, all of them refuse."""
    found: Start | InputError | None = None
    if ranks.main:
        try:
            found = find()
        except InputError as refused:
            found = refused
    found = ranks.share(found)
    if not isinstance(found, Start):
        raise found
    return found


def check_free(out: Path, replace: bool, given: Path | None = None) -> None:
    """Refuse a run directory with files that a run would replace, unless it may.

    Args:
        out: the run directory.
        replace: whether it may.
        given: a tokenizer, which may be there.

    Raises:
        InputError: it holds such files, or something that is in the way.
    """
    there = [path for path in list_files(out) if given is None or not (given.exists() and path.samefile(given))]
    if list_checkpoints(out / "checkpoints") and not replace:
        raise InputError(
            f"{out} already holds a run: go on with it by scorelm train --out {out} --resume, add --overwrite to "
            "replace it, or choose another --out"
        )
    if there and not replace:
        names = ", ".join(str(path.relative_to(out)) for path in there[:3])
        raise InputError(
            f"{out} already holds files that a run writes ({names}), but no checkpoint to resume from: "
            "add --overwrite to replace them, or choose another --out"
        )
    for path in (out / name for name in DIRECTORIES):
        if path.exists() and not path.is_dir():
            raise InputError(f"cannot write {path}: not a directory")


def find_new(recipe: Recipe, out: Path, replace: bool) -> Start:
    """The start of a new run.

    Raises:
        InputError: the directory has files that a run would replace, and `replace` does not allow it; a model to start
            from that does not suit; or a stream without an end.
    """
    check_end(recipe)
    check_free(out, replace, recipe.data.tokenizer)
    initial, name = None, recipe.training.init_from
    if name is not None:
        recipe, initial = read_initial(recipe, name)
    home = out / DRAFT
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    return Start(recipe, home, initial=initial, replace=replace)


def find_resumed(given: Recipe | None, out: Path, fall_back: bool, say: Say) -> Start:
    """The newest checkpoint of a run, and the recipe to go on with: the run's own with the options that are given.

    Raises:
        InputError: there is no sound checkpoint, an option that is not the run's own, or no step is left to be made.
    """
    kept = out / "recipe.toml"
    if not list_checkpoints(out / "checkpoints"):
        raise InputError(f"nothing to resume: {out} has no checkpoint yet")
    old = load_recipe(str(kept))
    if given is not None and given.training.init_from is not None:
        given = adopt(given, old)
    if given is not None and (changed := kept_on_resume(old, given)):
        raise InputError(
            f"{', '.join(changed)} can't change when a run is resumed, and {kept} has another value: leave it out, or "
            "start a new run in another --out"
        )
    checkpoint = find_checkpoint(out / "checkpoints", fall_back, say)
    state = read_state(checkpoint)
    done, watch = Progress(step=state["step"], seconds=state["seconds"]), Watch(**state["watch"])
    recipe = old if given is None else with_budget(given, old, done)
    asked = given is not None and (given.training.steps or given.training.minutes)
    over = done.share(recipe.training) >= 1 or (has_cooled(state) and not asked)
    finished = over and holds_model(out / "model", done.step if watch.best is None else watch.best_step)
    if finished:
        say(
            f"the run in {out} is finished, after {done.step:,} steps: nothing is changed. To train on, add "
            f"--minutes 10 (that many more) or --steps {2 * done.step} (in all)"
        )
    return Start(recipe, out, checkpoint, finished=finished, longer=bool(asked))


def with_budget(recipe: Recipe, old: Recipe, done: Progress) -> Recipe:
    """The recipe with the shards of the run, and with its end: the given one, or the run's own.

    Raises:
        InputError: the given number of steps is already made.
    """
    steps, minutes = recipe.training.steps, recipe.training.minutes
    if steps and steps <= done.step:
        raise InputError(f"--steps {steps}: the run has made {done.step:,}, which count too; give a larger number")
    if minutes:
        minutes += done.seconds / 60
    elif not steps:
        steps, minutes = old.training.steps, old.training.minutes
    changes = {"steps": steps, "minutes": minutes, "shards": old.training.shards}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def begin(start: Start, out: Path, held: Hold, say: Say) -> None:
    """Make a run directory that of this run, which has made its first step."""
    if start.replace:
        remove_run(out, say)
    with writing(out):
        if start.checkpoint is None:
            made = find_tokenizer(start.home)
            made.rename(out / made.name)
    replace_file(out / "recipe.toml", to_toml(start.recipe))
    held.begin()


def with_shards(recipe: Recipe, world: int) -> Recipe:
    """The recipe with its number of shards decided, unless it is: one for each rank, as far as they divide a batch."""
    training = recipe.training
    if training.shards is not None:
        return recipe
    shards = math.gcd(training.rows, world)
    return recipe.model_copy(update={"training": training.model_copy(update={"shards": shards})})


def describe(trainer: Trainer) -> str:
    """Size of the model, amount of text, what it starts from, and where and how it is computed, in one line."""
    documents, learner, world = trainer.data.documents, trainer.learner, trainer.ranks.world
    size, training = trainer.recipe.model.size, trainer.recipe.training
    weights = list(learner.denoiser.parameters())
    count = sum(p.numel() for p in weights) / 1e6
    trained = sum(p.numel() for p in weights if p.requires_grad) / 1e6
    return (
        f"{count:.1f}M parameters ({size.layers} layers of width {size.dim}), "
        + (f"{trained:.1f}M of them trained, " if training.lora else "")
        + (f"from {training.init_from} at a learning rate of {training.lr:g}, " if training.init_from else "")
        + f"{len(documents.train):,} examples, {len(documents.heldout):,} held out, "
        f"{str(learner.dtype).removeprefix('torch.')} on {learner.device}"
        + (f", {world} ranks ({training.parallel})" if world > 1 else "")
    )

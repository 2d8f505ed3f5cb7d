"""``scorelm train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import tyro
from tyro.conf import arg

from scorelm.cli.verb import Verb, asks_for_help, read
from scorelm.config.recipe import Recipe, check_end
from scorelm.config.toml import load_recipe
from scorelm.errors import InputError, at_home, exists

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM

Overwrite = Annotated[
    bool, arg(help="Replace the run that --out holds. Files in there that are no part of a run stay.")
]


class TrainVerb(Verb):
    """Options of ``scorelm train``.

    Makes a run directory with recipe.toml (every option), metrics.jsonl, samples.txt, checkpoints and the model. A run
    that was stopped, even by kill -9, goes on with: scorelm train --out OUT --resume
    """

    less_memory: ClassVar[str] = "lower --rows, --max-length or --model.dim"

    out: Annotated[Path, arg(aliases=("-mdir",))]
    """Run directory to make, or to go on with."""
    recipe: str | None = None
    """Options to start from, which flags override: the name of a recipe, such as demo, or a .toml file. By default the
    size of the model, its dropout, the training time and some more are chosen for the text and this machine, and said;
    scorelm info TEXT shows them."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint, with the options of its recipe.toml. The text, the model,
    the noise, --objective, --init-from, --lora, --rows, --shards, --optimizer, --warmup, --weight-decay, --ema,
    --select and --seed stay; other options can be given, and are kept in recipe.toml from the first step on."""
    fall_back: bool = False
    """With --resume: where the newest checkpoint is damaged, go on from the newest sound one, and keep the damaged one
    as checkpoints/damaged-STEP."""
    overwrite: Overwrite = False
    options: Annotated[Recipe, arg(name="")] = Recipe()

    @classmethod
    def before(cls, words: Sequence[str]) -> Self | None:
        """The options of --recipe, or of the run that --resume goes on with, and what the model of --init-from decides.

        Raises:
            InputError: no such recipe, run or model, or a recipe that contradicts the model.
        """
        out, source = value(words, "--out", "-mdir"), value(words, "--recipe")
        resume = out is not None and "--resume" in words
        if out is not None and resume:
            if source is not None:
                raise InputError("--recipe does not go with --resume: a run goes on with its own recipe.toml")
            source = str(Path(out) / "recipe.toml")
            if not exists(Path(source)):
                raise InputError(f"nothing to resume: {out} has no recipe.toml")
        if source is None:
            return None if asks_for_help(words) else cls.proposed(words)
        recipe = load_recipe(source) if resume else cls.initial(words, load_recipe(source))
        replaced = {"--steps": "minutes", "--minutes": "steps"}
        dropped = {other: None for flag, other in replaced.items() if resume or value(words, flag) is not None}
        training = recipe.training.model_copy(update=dropped)
        return cls.model_construct(out=tyro.MISSING, options=recipe.model_copy(update={"training": training}))

    @classmethod
    def initial(cls, words: Sequence[str], recipe: Recipe) -> Recipe:
        """A recipe with the sizes and the tokenizer of the model that a run starts from, if it starts from one."""
        name = value(words, "--init-from")
        start = recipe.training.init_from if name is None else at_home(Path(name))
        if start is None:
            return recipe
        from scorelm.training.initial import adopt, describe_model

        return adopt(recipe, describe_model(recipe, start))

    @classmethod
    def proposed(cls, words: Sequence[str]) -> Self:
        """Options that suit the text and the machine, wherever the words give none.

        The defaults under torchrun, and where the run will be refused, for the reason that training itself gives.

        Raises:
            InputError: a stream without an end.
        """
        from scorelm.parallel import were_launched
        from scorelm.training.checkpoint import list_checkpoints
        from scorelm.training.proposal import propose
        from scorelm.training.runlog import speak

        defaults = cls.model_construct(out=tyro.MISSING, options=cls.initial(words, Recipe()))
        plain = read(cls, words, defaults, "scorelm train")
        check_end(plain.options)
        if were_launched() or (list_checkpoints(plain.out / "checkpoints") and not plain.overwrite):
            return defaults
        given = [name for name, flag in PROPOSED.items() if flag in words or value(words, flag) is not None]
        try:
            proposal = propose(plain.options, given)
        except InputError:
            return defaults
        speak("\n".join(proposal.lines))
        return cls.model_construct(out=tyro.MISSING, options=proposal.recipe)

    def run(self) -> int:
        """Train, and say where the model is."""
        from scorelm.parallel import launched
        from scorelm.training import Interrupted, train
        from scorelm.training.runlog import drop, speak

        with launched() as ranks:
            say = speak if ranks.main else drop
            try:
                model = train(
                    self.options, self.out, resume=self.resume, fall_back=self.fall_back, overwrite=self.overwrite,
                    ranks=ranks, film=film,
                )  # fmt: skip
            except Interrupted as stop:
                say(f"{stop}; go on with: scorelm train --out {self.out} --resume")
                return 128 + stop.signum
            say(f"model: {model}   (try: scorelm sample {model})")
        return 0


def film(lm: ScoreLM) -> str:
    """A web page on which the model writes four texts."""
    from scorelm.viz.film import Film

    made = Film(lm.tokenizer, norm=lm.norm, title="From nothing", subtitle=f"after {lm.provenance.steps:,} steps")
    lm.generate(n=4, path=lm.objective.default_path, watch=made)
    return made.page()


PROPOSED = {
    "vocab_size": "--vocab-size", "max_length": "--max-length", "dim": "--model.dim", "layers": "--model.layers",
    "block_sizes": "--noise.block-sizes", "hidden": "--noise.hidden", "rows": "--rows", "optimizer": "--optimizer",
    "dropout": "--dropout", "patience": "--patience", "minutes": "--minutes", "steps": "--steps",
    "compile": "--no-compile",
}  # fmt: skip
"""What is proposed where it is not given, with its flag; see `scorelm.training.proposal`."""


def value(words: Sequence[str], *names: str) -> str | None:
    """The value of an option, read ahead of the parser."""
    for k, given in enumerate(words):
        flag, sign, rest = given.partition("=")
        word = (flag.replace("_", "-") if flag.startswith("--") else flag) + sign + rest
        for name in names:
            if word == name and k + 1 < len(words):
                return words[k + 1]
            if word.startswith(f"{name}="):
                return word.removeprefix(f"{name}=")
    return None

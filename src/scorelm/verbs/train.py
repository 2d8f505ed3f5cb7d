"""The verbs that train: ``train``, ``demo`` and ``tokenizer``."""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from scorelm.config import Recipe, TrainingConfig, load_recipe, to_toml

if TYPE_CHECKING:
    from scorelm.training.distributed import Ranks


@dataclass(frozen=True)
class Train:
    """Train a model on text; a run directory holds recipe.toml, metrics.jsonl, checkpoints/ and model/."""

    out: Annotated[Path, arg(aliases=("-mdir",))]
    """Run directory to create, or to continue with --resume."""
    options: Annotated[Recipe, arg(name="")] = field(default_factory=Recipe)
    recipe: str | None = None
    """Options to start from: a recipe's name or a .toml file; flags override it."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with its own recipe."""
    fall_back: bool = False
    """With --resume: if a file of the newest checkpoint is damaged, continue from the newest sound one, and keep the
    damaged one as checkpoints/damaged-STEP."""


@dataclass(frozen=True)
class Demo:
    """Train on the embedded King James Bible for a few minutes, then print verses, fill in blanks and write a film."""

    out: Path = Path("runs/demo")
    """Run directory; one that is there already is replaced."""
    minutes: float = 4.0
    """Training time."""


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a SentencePiece tokenizer and write tokenizer.model."""

    out: Annotated[Path, arg(aliases=("-mdir",))]
    """Directory to write tokenizer.model to."""
    data: Annotated[str, arg(aliases=("-d",))] = "kjv"
    """Text: kjv, a .txt/.jsonl/.csv/.parquet file, a directory of them, or a Hugging Face name."""
    field: str = "text"
    """Column that holds the text, in files with columns."""
    vocab_size: int = 2048
    """Tokens, the special ones and digits included."""
    byte_fallback: bool = True
    """Spell unknown characters in bytes, so that any text round-trips."""


def train(options: Train) -> int:
    """Run the training loop in a new or an old run directory; ranks that torchrun starts again resume by themselves."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and begun(options.out):
        options = replace(options, resume=True, options=load_recipe(str(options.out / "recipe.toml")))
    check_run_directory(options)
    from scorelm.training.distributed import launched

    with launched() as ranks:
        return train_with(options, ranks)


def train_with(options: Train, ranks: Ranks) -> int:
    """`train` as one of some ranks; the main one speaks and writes."""
    from scorelm.training import checkpoint
    from scorelm.training.data import prepare
    from scorelm.training.logging import say as speak
    from scorelm.training.signals import Interrupted
    from scorelm.training.snapshot import restore
    from scorelm.training.trainer import Trainer

    def say(text: str) -> None:
        if ranks.main:
            speak(text)

    options.out.mkdir(parents=True, exist_ok=True)
    recipe, start = with_shards(options.options, ranks.world), None
    if options.resume:
        kept = options.out / "checkpoints"
        start = ranks.gather(checkpoint.find(kept, options.fall_back, say) if ranks.main else None)[0]
    data = prepare(recipe.data, options.out, options.resume, say, ranks)
    trainer = Trainer(recipe, options.out, data, ranks)
    if start is not None:
        restore(trainer, start)
    if ranks.main:
        checkpoint.replace_file(options.out / "recipe.toml", to_toml(recipe))
    size = recipe.model.size
    count = sum(p.numel() for p in trainer.denoiser.parameters())
    say(
        f"{count / 1e6:.1f}M parameters ({size.layers} layers of width {size.dim}), {len(data.documents.train):,} "
        f"examples, {len(data.documents.heldout):,} held out, "
        f"{str(trainer.dtype).removeprefix('torch.')} on {trainer.device}"
        + (f", {ranks.world} ranks ({recipe.training.parallel})" if ranks.world > 1 else "")
    )
    try:
        trainer.run()
    except Interrupted as stop:
        say(f"{stop}; continue with: scorelm train --out {options.out} --resume")
        return 128 + stop.signum
    say(f"model: {options.out / 'model'}   (try: scorelm sample {options.out / 'model'})")
    return 0


def with_shards(recipe: Recipe, world: int) -> Recipe:
    """The recipe with its number of shards decided: as many as ranks, as far as they divide a batch's rows evenly."""
    shards = recipe.training.shards or math.gcd(recipe.training.rows, world)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"shards": shards})})


def begun(out: Path) -> bool:
    """Whether a run directory holds a checkpoint."""
    return any((out / "checkpoints").glob("step-*"))


def check_run_directory(options: Train) -> None:
    """Refuse to overwrite a run that has a checkpoint, or to resume one with another model, data or optimiser."""
    if begun(options.out) and not options.resume:
        raise ValueError(f"{options.out} already holds a run: add --resume to continue it, or choose another --out")
    if options.fall_back and not options.resume:
        raise ValueError("--fall-back is for --resume")
    if options.resume:
        if not begun(options.out):
            raise ValueError(f"nothing to resume: {options.out} has no checkpoint yet")
        kept = options.out / "recipe.toml"
        old, new = load_recipe(str(kept)), options.options
        for room in ("data", "model", "noise"):
            if getattr(old, room) != getattr(new, room):
                raise ValueError(f"the {room} options of a run can't change when it is resumed; {kept} has them")
        for name in ("objective", "optimizer", "ema"):
            if getattr(old.training, name) != getattr(new.training, name):
                raise ValueError(f"the {name} of a run can't change when it is resumed; {kept} has it")


def demo(options: Demo) -> int:
    """Train on the embedded corpus, then show what the model can do."""
    recipe = load_recipe("demo")
    training = TrainingConfig.model_validate({**recipe.training.model_dump(), "minutes": options.minutes})
    recipe = recipe.model_copy(update={"training": training})
    kept = options.out / "recipe.toml"
    if kept.exists():
        if load_recipe(str(kept)).model_copy(update={"training": training}) != recipe:
            raise ValueError(f"{options.out} holds another run than a demo: choose another --out")
        shutil.rmtree(options.out)
    code = train(Train(out=options.out, options=recipe))
    if code:
        return code
    from scorelm.model.scorelm import ScoreLM
    from scorelm.viz.film import Film

    lm = ScoreLM.from_pretrained(options.out / "model")
    film = Film(lm.tokenizer, norm=lm.denoiser.embedding.norm, title=DEMO_SAMPLES[-1][0])
    for title, settings in DEMO_SAMPLES:
        print(f"\n{title}\n  scorelm sample {options.out / 'model'} {flags(settings)}")
        for sample in lm.generate(**settings, watch=film):  # each starts the film over: the last one stays
            print(f"    {sample.text}")
    film.save(options.out / "film.html")
    print(f"\nFilling in blanks\n  scorelm infill {options.out / 'model'} 'TEXT WITH ____ BLANKS'")
    for text in DEMO_BLANKS:
        print(f"    {text}\n    {lm.infill(text, temperature=0.8)[0].text}")
    model = options.out / "model"
    print(f"\nA film of the last {DEMO_SAMPLES[-1][1]['n']} verses, for a browser: {options.out / 'film.html'}")
    print(f"The model is in {model}. Try:\n  scorelm sample {model} --prompt 'And God said'")
    print(f"  scorelm train --out {options.out} --resume --minutes 60   # go on training")
    return 0


DEMO_SAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Word by word, left to right", {"n": 4, "path": "blocks:1", "temperature": 0.7}),
    ("The surest words first, several at once (the default)", {"n": 3, "path": "bounded", "temperature": 0.7}),
    ("All words together", {"n": 3, "path": "uniform", "temperature": 0.7}),
)
DEMO_BLANKS = ("And God said, Let there be ____: and there was light.", "And ____ went up to Jerusalem ____.")


def flags(settings: dict[str, Any]) -> str:
    """Settings as they are typed on the command line."""
    return " ".join(f"-{k} {v}" if len(k) == 1 else f"--{k} {v}" for k, v in settings.items())


def train_tokenizer(options: TrainTokenizer) -> int:
    """Train a tokenizer on all of the text."""
    from scorelm.text.corpus import load_corpus
    from scorelm.text.tokenizer import Tokenizer

    corpus = load_corpus(options.data, field=options.field, holdout=0)
    texts = (text for batch in corpus.train.iter(1000) for text in batch["text"])
    tokenizer = Tokenizer.train(texts, options.vocab_size, byte_fallback=options.byte_fallback)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(options.out / "tokenizer.model")
    print(f"{options.out / 'tokenizer.model'}: {tokenizer.vocab_size:,} tokens", file=sys.stderr)
    return 0

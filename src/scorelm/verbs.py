"""The verbs of the command line: the options of each, and what it does with them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from scorelm.config import Recipe, load_recipe, named, to_toml

if TYPE_CHECKING:
    from scorelm.model.scorelm import ScoreLM

DEFAULT_MODEL = Path("runs/demo/model")
Model = Annotated[Path, Positional, arg(metavar="MODEL")]


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


@dataclass(frozen=True)
class Demo:
    """Train on the embedded King James Bible for a few minutes, then print verses and infilled sentences."""

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


@dataclass(frozen=True)
class Generation:
    """How to generate."""

    n: Annotated[int, named("n", "-n")] = 4
    """Samples."""
    steps: int = 64
    """Evaluations of the model; blocks takes at least one a block."""
    path: str = "uniform"
    """Order in which noise is removed: uniform, ramp:SLOPE (earlier first) or blocks:SIZE (left to right)."""
    solver: str = "posterior"
    """posterior, ancestral:ETA or euler."""
    temperature: float = 1.0
    """Divides the logits: below 1 is safer and less varied."""
    seed: int = 0
    """Sample i uses seed + i."""
    json: bool = False
    """Print a JSON list of {text, ids, seed, nfe}."""


@dataclass(frozen=True)
class Sample:
    """Generate texts, from nothing or from a prompt."""

    model: Model = DEFAULT_MODEL
    """Model directory or hub name."""
    prompt: str = ""
    """Text that every sample starts with."""
    length: int | None = None
    """Tokens with both ends; by default drawn from the lengths of the training text."""
    how: Annotated[Generation, arg(name="")] = Generation()


@dataclass(frozen=True)
class Infill:
    """Fill the blanks in a text, each written as four underscores."""

    model_and_text: Annotated[tuple[str, ...], Positional, arg(metavar="[MODEL] TEXT")]
    """Model directory or hub name (runs/demo/model when left out), then the text with ____ blanks."""
    blank_tokens: int | None = None
    """Tokens in each blank; by default drawn so that the length suits the training text."""
    how: Annotated[Generation, arg(name="")] = Generation()


@dataclass(frozen=True)
class Info:
    """Say what a model or a run is."""

    model: Model = DEFAULT_MODEL
    """Model directory, hub name or run directory."""
    json: bool = False
    """Print JSON."""


def train(options: Train) -> int:
    """Run the training loop in a new or an old run directory."""
    check_run_directory(options)
    from scorelm.training.data import prepare
    from scorelm.training.signals import Interrupted
    from scorelm.training.trainer import Trainer

    say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    options.out.mkdir(parents=True, exist_ok=True)
    data = prepare(options.options.data, options.out, options.resume, say)
    trainer = Trainer(options.options, options.out, data)
    if options.resume:
        trainer.resume()
    (options.out / "recipe.toml").write_text(to_toml(options.options), encoding="utf-8")
    size = options.options.model.size
    count = sum(p.numel() for p in trainer.denoiser.parameters())
    say(
        f"{count / 1e6:.1f}M parameters ({size.layers} layers of width {size.dim}), {len(data.documents.train):,} "
        f"examples, {len(data.documents.heldout):,} held out, "
        f"{str(trainer.dtype).removeprefix('torch.')} on {trainer.device}"
    )
    try:
        trainer.run()
    except Interrupted as stop:
        say(f"{stop}; continue with: scorelm train --out {options.out} --resume")
        return 128 + stop.signum
    say(f"model: {options.out / 'model'}   (try: scorelm sample {options.out / 'model'})")
    return 0


def check_run_directory(options: Train) -> None:
    """Refuse to overwrite a run that has a checkpoint, or to resume one with another model or other data."""
    begun = any((options.out / "checkpoints").glob("step-*"))
    if begun and not options.resume:
        raise ValueError(f"{options.out} already holds a run: add --resume to continue it, or choose another --out")
    if options.resume:
        if not begun:
            raise ValueError(f"nothing to resume: {options.out} has no checkpoint yet")
        kept = options.out / "recipe.toml"
        old, new = load_recipe(str(kept)), options.options
        for room in ("data", "model", "noise"):
            if getattr(old, room) != getattr(new, room):
                raise ValueError(f"the {room} options of a run can't change when it is resumed; {kept} has them")


def demo(options: Demo) -> int:
    """Train on the embedded corpus, then show what the model can do."""
    recipe = load_recipe("demo")
    recipe = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"minutes": options.minutes, "steps": None})}
    )
    if (options.out / "recipe.toml").exists():  # an earlier demo's
        shutil.rmtree(options.out)
    code = train(Train(out=options.out, options=recipe))
    if code:
        return code
    from scorelm.model.scorelm import ScoreLM

    lm = ScoreLM.from_pretrained(options.out / "model")
    for title, settings in DEMO_SAMPLES:
        print(f"\n{title}\n  scorelm sample {options.out / 'model'} {flags(settings)}")
        for sample in lm.generate(**settings):
            print(f"    {sample.text}")
    print(f"\nFilling in blanks\n  scorelm infill {options.out / 'model'} 'TEXT WITH ____ BLANKS'")
    for text in DEMO_BLANKS:
        print(f"    {text}\n    {lm.infill(text, temperature=0.8)[0].text}")
    model = options.out / "model"
    print(f"\nThe model is in {model}. Try:\n  scorelm sample {model} --prompt 'And God said'")
    print(f"  scorelm train --out {options.out} --resume --minutes 60   # go on training")
    return 0


DEMO_SAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Word by word, left to right", {"n": 4, "path": "blocks:1", "temperature": 0.7}),
    ("Four tokens at a time, left to right", {"n": 3, "path": "blocks:4", "temperature": 0.7}),
    ("All tokens together", {"n": 3, "path": "uniform", "temperature": 0.7}),
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


def open_model(path: Path | str) -> ScoreLM:
    """A model by directory or hub name; a run directory stands for its model."""
    from scorelm.model.scorelm import ScoreLM

    if path == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        raise ValueError(f"{DEFAULT_MODEL} is not there yet: name a model, or run scorelm demo")
    inside = Path(path) / "model"
    return ScoreLM.from_pretrained(inside if (inside / "config.json").is_file() else path)


def settings(how: Generation) -> dict[str, Any]:
    """The options of generation that the Python API takes under the same names."""
    return {k: v for k, v in asdict(how).items() if k != "json"}


def show(samples: list[Any], as_json: bool) -> int:
    """Print samples on stdout, a line each or as JSON."""
    if as_json:
        print(json.dumps([asdict(sample) for sample in samples], ensure_ascii=False, indent=2))
    else:
        print("\n".join(sample.text for sample in samples))
    return 0


def sample(options: Sample) -> int:
    """Generate and print."""
    lm = open_model(options.model)
    return show(lm.generate([options.prompt], length=options.length, **settings(options.how)), options.how.json)


def infill(options: Infill) -> int:
    """Fill in blanks and print."""
    words = options.model_and_text
    if len(words) not in (1, 2):
        raise ValueError("give [MODEL] and one text in quotes")
    lm = open_model(words[0] if len(words) == 2 else DEFAULT_MODEL)
    return show(lm.infill(words[-1], blank_tokens=options.blank_tokens, **settings(options.how)), options.how.json)


def info(options: Info) -> int:
    """Describe a model."""
    lm = open_model(options.model)
    size = lm.config.size
    facts = {
        "parameters": lm.parameters_count,
        **size._asdict(),
        "embedding_dim": lm.config.embedding_dim,
        "noise_conditioning": lm.config.noise_conditioning,
        "vocab_size": lm.tokenizer.vocab_size,
        "max_length": lm.max_length,
        "schedule": type(lm.schedule).__name__.lower(),
        "sigma_min": lm.schedule.sigma_min,
        "sigma_max": lm.schedule.sigma_max,
        **lm.provenance.model_dump(),
    }
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(
                f"{name.replace('_', ' '):<20} {value:,}"
                if isinstance(value, int)
                else f"{name.replace('_', ' '):<20} {value}"
            )
    return 0


VERBS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "demo": (Demo, demo),
    "train": (Train, train),
    "tokenizer": (TrainTokenizer, train_tokenizer),
    "sample": (Sample, sample),
    "infill": (Infill, infill),
    "info": (Info, info),
}
"""The options and the action of every verb; an action returns the exit code."""

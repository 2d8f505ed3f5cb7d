"""The command line: parse, call, print.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 bad input, 130 or 143
interrupted after a checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import ValidationError
from tyro.conf import Positional, arg

from scorelm.config import Recipe, explain, load_recipe, named, to_toml
from scorelm.memory import keep_freed_memory

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


VERBS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "tokenizer": TrainTokenizer,
    "sample": Sample,
    "infill": Infill,
    "info": Info,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``scorelm`` command; exits with the code that the module's docstring gives."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if words[0] == "--version":
        from scorelm import __version__

        print(__version__)
        sys.exit(0)
    if words[0] not in VERBS:
        fail(f"no verb {words[0]!r}: choose {', '.join(VERBS)}", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    try:
        code = ACTIONS[words[0]](parse(words[0], words[1:]))
        sys.stdout.flush()
    except ValidationError as error:
        fail(explain(error), 2)
    except (ValueError, FloatingPointError) as error:
        fail(str(error), 1 if isinstance(error, FloatingPointError) else 2)
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fail(str(error), 2 if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) else 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    sys.exit(code)


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    print("scorelm: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def overview() -> str:
    """What ``scorelm --help`` prints."""
    verbs = "\n".join(f"  {name:<10} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items())
    return (
        "usage: scorelm VERB [OPTIONS]\n\nScore-based diffusion language models: train, sample, fill in blanks.\n\n"
        f"{verbs}\n\nscorelm VERB --help lists a verb's options. Start with: scorelm demo"
    )


def parse(verb: str, words: list[str]) -> Any:
    """The verb's options; for ``train`` on top of the recipe or the run to be resumed."""
    default: Any = tyro.MISSING_NONPROP
    if verb == "train":
        base = option(words, "--recipe")
        out = option(words, "--out", "-mdir")
        if "--resume" in words and out is not None:
            base = str(Path(out) / "recipe.toml")
            if not Path(base).is_file():
                raise ValueError(f"nothing to resume: {out} has no recipe.toml")
        if base is not None:
            default = Train(out=tyro.MISSING, options=load_recipe(base))
    return tyro.cli(VERBS[verb], args=words, default=default, prog=f"scorelm {verb}")


def option(words: list[str], *names: str) -> str | None:
    """The value of an option, read ahead of the parser."""
    for k, word in enumerate(words):
        for name in names:
            if word == name and k + 1 < len(words):
                return words[k + 1]
            if word.startswith(f"{name}="):
                return word.removeprefix(f"{name}=")
    return None


def train(options: Train) -> int:
    """Run the training loop in a new or an old run directory."""
    check_run_directory(options)
    from scorelm.training.data import prepare
    from scorelm.training.trainer import Interrupted, Trainer

    say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    options.out.mkdir(parents=True, exist_ok=True)
    data = prepare(options.options.data, options.out, say)
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
    """Refuse to overwrite a run, or to resume one with another model or other data."""
    kept = options.out / "recipe.toml"
    if not options.resume:
        if kept.exists():
            raise ValueError(f"{options.out} already holds a run: add --resume to continue it, or choose another --out")
        return
    old, new = load_recipe(str(kept)), options.options
    for room in ("data", "model", "noise"):
        if getattr(old, room) != getattr(new, room):
            raise ValueError(f"the {room} options of a run can't change when it is resumed; {kept} has them")
    if not any((options.out / "checkpoints").glob("step-*")):
        raise ValueError(f"nothing to resume: {options.out} has no checkpoint yet")


def demo(options: Demo) -> int:
    """Train on the embedded corpus, then show what the model can do."""
    import shutil

    recipe = load_recipe("demo")
    recipe = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"minutes": options.minutes, "steps": None})}
    )
    if (options.out / "recipe.toml").exists():
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


ACTIONS: dict[str, Callable[[Any], int]] = {
    "demo": demo,
    "train": train,
    "tokenizer": train_tokenizer,
    "sample": sample,
    "infill": infill,
    "info": info,
}

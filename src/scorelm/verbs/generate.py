"""The verbs that use a model: ``sample``, ``infill`` and ``info``."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from scorelm.config import named
from scorelm.untrusted import brief, exists

if TYPE_CHECKING:
    from scorelm.model.scorelm import ScoreLM

DEFAULT_MODEL = Path("runs/demo/model")
Model = Annotated[Path, Positional, arg(metavar="MODEL")]


@dataclass(frozen=True)
class Generation:
    """How to generate."""

    n: Annotated[int, named("n", "-n")] = 4
    """Samples."""
    steps: int = 64
    """Most evaluations of the model; blocks takes one a block or more, and guidance as many again."""
    path: str | None = None
    """Order in which noise is removed: bounded or bounded:NATS (the surest at once, as many as an entropy bound
    allows; the default), surest (equally many a step), shuffled (random), remask:SHARE, uniform (all together),
    ramp:SLOPE (earlier first), blocks:SIZE (left to right), confidence:NATS (the sure ones faster) or entropy:NATS."""
    nats_per_step: float | None = None
    """On confidence and entropy: what a step may spend in each text; the number of steps is then an outcome."""
    solver: str = "posterior"
    """posterior:TOP_K,TOP_P, renoise, ancestral:ETA, sde:CHURN,S_NOISE,S_MIN,S_MAX, euler, heun or dpmpp_2m."""
    temperature: float = 1.0
    """Divides the logits: below 1 is safer and less varied."""
    top_k: int = 0
    """Keep the likeliest tokens alone; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that make up this probability alone."""
    guidance: float = 1.0
    """Weight of classifier-free guidance by the given text; 1 is none."""
    self_guidance: float = 1.0
    """Weight of self-conditioning guidance; 1 is none."""
    score_temperature: float = 1.0
    """Divides the score, for solvers that follow it."""
    halt: str | None = None
    """End a text (with blocks, a block) early: entropy:NATS, patience:STEPS or kl:NATS."""
    best_of: int = 1
    """Draw so many for each sample and keep one."""
    choose: str = "mbr"
    """By minimum Bayes risk (mbr), or the most frequent text (vote)."""
    precision: str = "float32"
    """Of matrix products: float32, bfloat16, or auto: bfloat16 where the processor has it natively."""
    seed: int = 0
    """The first row's; the next rows have the next ones."""
    film: Path | None = None
    """Write a film of the denoising: .html (plays in a browser), .gif or .png."""
    watch: bool = False
    """Show the denoising live in the terminal."""
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
    max_length: int | None = None
    """Most tokens; beyond the model's own length blocks alone go, sizes above 1 with --length."""
    how: Annotated[Generation, arg(name="")] = Generation()


@dataclass(frozen=True)
class Infill:
    """Fill the blanks in a text, each written as four underscores."""

    model_and_text: Annotated[tuple[str, ...], Positional, arg(metavar="[MODEL] TEXT")]
    """Model directory or hub name (runs/demo/model when left out), then the text with ____ blanks."""
    blank_tokens: int | None = None
    """Tokens in each blank; by default drawn so that the length suits the training text."""
    repair: float | None = None
    """Doubt the rest of the text too: noise of this level, above 0 and below 1, is put on it before all is written
    anew; the text then needs no blank."""
    how: Annotated[Generation, arg(name="")] = Generation()


@dataclass(frozen=True)
class Info:
    """Say what a model or a run is."""

    model: Model = DEFAULT_MODEL
    """Model directory, hub name or run directory."""
    json: bool = False
    """Print JSON."""


def open_model(path: Path | str) -> ScoreLM:
    """A model by directory or hub name; a run directory stands for its model."""
    from scorelm.model.scorelm import ScoreLM

    if path == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        raise ValueError(f"{DEFAULT_MODEL} is not there yet: name a model, or run scorelm demo")
    inside = Path(path) / "model"
    return ScoreLM.from_pretrained(inside if exists(inside / "config.json") else path)


def produce(lm: ScoreLM, how: Generation, title: str, request: Callable[..., list[Any]]) -> int:
    """Run a request with whatever watches it, then print the samples: a line each, or as JSON.

    Under torchrun each rank makes its part of the rows; the main one watches its own and prints them all.
    """
    from scorelm.sampling.sample import own_path
    from scorelm.training.distributed import launched
    from scorelm.viz.film import Film, check_suffix
    from scorelm.viz.watch import Watch

    if how.n < 1:
        raise ValueError(f"-n must be 1 or more, got {how.n}")
    film = None
    if how.film is not None:
        check_suffix(how.film)
        subtitle = f"{own_path(lm, how.path)}, {how.solver}, {how.steps} steps"
        film = Film(lm.tokenizer, norm=lm.denoiser.embedding.norm, title=title, subtitle=subtitle)
    with launched() as ranks, Watch(lm.tokenizer) if how.watch and ranks.main else nullcontext() as live:
        watchers = [watcher for watcher in (film, live) if watcher is not None]
        settings = {name: value for name, value in asdict(how).items() if name not in ("film", "watch", "json")}
        own = ranks.part(how.n)
        settings |= {"n": own.stop - own.start, "seed": how.seed + own.start * how.best_of}
        parts = ranks.gather(request(watch=lambda record: [watcher(record) for watcher in watchers], **settings))
        samples = [sample for part in parts for sample in part]
    if not ranks.main:
        return 0
    if how.json:
        print(json.dumps([asdict(sample) for sample in samples], ensure_ascii=False, indent=2))
    else:
        print("\n".join(sample.text for sample in samples))
    if film is not None and how.film is not None:
        film.save(how.film)
    return 0


def sample(options: Sample) -> int:
    """Generate and print."""
    lm = open_model(options.model)

    def request(**settings: Any) -> list[Any]:
        return lm.generate([options.prompt], length=options.length, max_length=options.max_length, **settings)

    return produce(lm, options.how, options.prompt or "Generation", request)


def infill(options: Infill) -> int:
    """Fill in blanks and print."""
    words = options.model_and_text
    if len(words) not in (1, 2):
        raise ValueError("give [MODEL] and one text in quotes")
    lm = open_model(words[0] if len(words) == 2 else DEFAULT_MODEL)

    def request(**settings: Any) -> list[Any]:
        return lm.infill(words[-1], blank_tokens=options.blank_tokens, repair=options.repair, **settings)

    return produce(lm, options.how, words[-1], request)


def info(options: Info) -> int:
    """Describe a model."""
    lm = open_model(options.model)
    size = lm.config.size
    facts = {
        "objective": lm.objective,
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
                else f"{name.replace('_', ' '):<20} {brief(value)}"
            )
    return 0

"""What a run on a text should be, where nobody has said: sizes, dropout and time, from the text and this machine."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch

from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.device import find_compiler, matmul_peak, pick_device, pick_dtype
from scorelm.errors import InputError
from scorelm.model.denoiser import Denoiser
from scorelm.noise.schedule import Log
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch
from scorelm.text.corpus import Corpus, load_corpus
from scorelm.text.normalization import normalize
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.text.source import Reading
from scorelm.text.tokenizer import Special, Tokenizer, load_tokenizer
from scorelm.training.initial import adopt, describe_model

SAMPLE = 1_000_000
"""Characters that tokens are counted in."""
LADDER = ((1024, 16, 300e6), (768, 12, 50e6), (512, 8, 10e6), (384, 6, 1e6), (256, 6, 2e5), (128, 4, 0.0))
"""Width, layers, and the tokens of text that such a model wants at least."""
PER_WEIGHT, MOST_EPOCHS = 5.0, 40.0
"""Tokens that a model should be trained on for each of its layers' weights, unless the text would be read too often."""
STEPS = 2500
"""That a run should have, rather than large batches: the included model had 2,657."""
EXPECT = (
    (15e6, "sentences in its manner"), (3e6, "phrases in its manner, and little sense"),
    (0.0, "words of it, and no sense: more time, or more text, will help"),
)  # fmt: skip
"""What is written after about so many tokens: a rule of thumb, from models of the embedded corpus."""
PATIENCE = 8
WORTH_COMPILING = 300.0
"""Seconds of a run that is worth the minute or two that compiling takes."""
REACHED = 0.2
"""Share of the peak of matrix products that training reaches."""


class Machine(NamedTuple):
    """What a run can count on: see `measure_machine`."""

    device: torch.device
    dtype: torch.dtype
    speed: float
    """FLOP/s of matrix products."""

    @property
    def positions(self) -> tuple[int, int]:
        """Fewest and most of a batch: a GPU works best on many."""
        return (4096, 4096) if self.device.type == "cpu" else (16_384, 65_536)

    @property
    def step_seconds(self) -> float:
        """What a step takes at least, however small: a thousand launches of kernels, on the machines that were seen."""
        return 0.0 if self.device.type == "cpu" else 0.05

    @property
    def minutes(self) -> float:
        """That a run may take unless somebody says otherwise."""
        return 120.0 if self.device.type == "cpu" else 30.0


class Work(NamedTuple):
    """What a run of a model takes, and gives."""

    model: ModelConfig
    rows: int
    minutes: float
    tokens: float
    speed: float
    """Tokens/s."""


class Text(NamedTuple):
    """What is known of a text."""

    name: str
    lengths: np.ndarray
    """Of the training examples, in tokens; of those at its beginning, where it is a stream."""
    vocab_size: int
    streaming: bool = False

    @property
    def tokens(self) -> float:
        """Of all training examples, about; a stream is taken to have no end."""
        return math.inf if self.streaming else int(self.lengths.sum())


class Proposal(NamedTuple):
    """A recipe and why it is what it is, in lines."""

    recipe: Recipe
    lines: list[str]


def measure_machine(name: str, precision: str) -> Machine:
    """The device of that name and how fast it multiplies, in a second."""
    device = pick_device(name)
    dtype = pick_dtype(precision, device)
    return Machine(device, dtype, matmul_peak(device, dtype))


def propose(recipe: Recipe, given: Collection[str] = ()) -> Proposal:
    """Choose what nobody has said of a run.

    Args:
        recipe: what has been said, and defaults elsewhere.
        given: names of the options that stay as they are: ``vocab_size``, ``max_length``, ``dim``, ``layers``,
            ``rows``, ``optimizer``, ``dropout``, ``block_sizes``, ``hidden``, ``patience``, ``compile``, ``minutes``,
            ``steps``. Where the run starts from a model, the sizes stay in any case.

    Raises:
        InputError: text, or a model to start from, that cannot be used.
    """
    name = recipe.training.init_from
    if name is not None:
        recipe, given = adopt(recipe, describe_model(recipe, name)), {*given, "vocab_size", "dim", "layers"}
    corpus = load_corpus(recipe.data.source, Reading.of(recipe.data), holdout=recipe.data.holdout)
    text = measure_text(corpus, recipe.data, "vocab_size" in given)
    machine = measure_machine(recipe.training.device, recipe.training.precision)
    return choose(recipe, given, text, machine)


def measure_text(corpus: Corpus, config: DataConfig, fixed: bool) -> Text:
    """Count the tokens of a sample, all of a short text, with a tokenizer of its own, and the rest in proportion.

    Args:
        corpus: the text.
        config: how it is read.
        fixed: whether the vocabulary is what `config` says.
    """
    every = corpus.train["text"]
    sizes = np.array([len(text) for text in every])
    every_so_many = max(1, int(sizes.sum()) // SAMPLE)
    sample = [normalize(text, config.normalize) for text in every[::every_so_many]]
    tokenizer = make_tokenizer(sample, config, fixed, int(sizes.sum()))
    counted = np.array([len(tokenizer.encode_document(text)) for text in sample])
    lengths = np.ceil(sizes * ((counted - 2).sum() / max(1, sum(map(len, sample))))) + 2
    lengths[::every_so_many] = counted
    return Text(corpus.name, lengths, tokenizer.vocab_size, config.streaming)


def make_tokenizer(sample: list[str], config: DataConfig, fixed: bool, characters: int) -> Tokenizer:
    """The given tokenizer, or one with a vocabulary that suits so many characters, or the largest below it that works.

    Raises:
        InputError: the vocabulary is fixed and does not suit the text, or no tokenizer can be made of it.
    """
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    size = config.vocab_size if fixed else round_power(2048 * (characters / 4e6) ** 0.5, 512, 32_768)
    while True:
        try:
            return SentencePieceTokenizer.train(iter(sample), size, byte_fallback=config.byte_fallback)
        except InputError:
            if isinstance(size, str) or fixed or size <= 270:
                raise
            size = size * 29 // 30


def choose(recipe: Recipe, given: Collection[str], text: Text, machine: Machine) -> Proposal:
    """The recipe for a text on a machine."""
    length = min(512, 64 * -(-int(np.quantile(text.lengths, 0.995)) // 64))
    length = recipe.data.max_length if "max_length" in given else max(64, length)
    size = recipe.data.vocab_size if "vocab_size" in given else text.vocab_size
    data = recipe.data.model_copy(update={"max_length": length, "vocab_size": size})
    model, rows, minutes, trained, speed = choose_size(recipe, given, text, machine, length)
    epochs = trained / max(1, text.tokens)
    training = recipe.training
    found = {
        "rows": rows,
        "optimizer": "muon" if model.network is None and not training.lora else "adamw",
        "dropout": 0.0 if epochs < 2 else 0.1 if epochs < 12 else 0.2,
        "patience": PATIENCE if epochs >= 2 else None,
        "compile": training.compile or worth_compiling(training, machine, trained / speed),
        "minutes": None if "steps" in given else minutes,
    }
    training = training.model_copy(update={name: v for name, v in found.items() if name not in given})
    often = {"block_sizes": (1, 2, 4, 8, 0, 0, 0, 0), "hidden": 0.4} if epochs >= 10 else {}
    noise = recipe.noise.model_copy(update={name: v for name, v in often.items() if name not in given})
    made = Recipe(data=data, model=model, noise=noise, training=training)
    return Proposal(made, explain(made, text, machine, trained, speed))


def worth_compiling(training: TrainingConfig, machine: Machine, seconds: float) -> bool:
    """Whether a run of our own network on a GPU is long enough, and there is what compiles it."""
    on_gpu = machine.device.type == "cuda" and training.init_from is None
    return on_gpu and seconds >= WORTH_COMPILING and find_compiler(machine.device) is not None


def choose_size(recipe: Recipe, given: Collection[str], text: Text, machine: Machine, length: int) -> Work:
    """The largest model that the text is enough for and the time too."""
    training, typical = recipe.training, min(length, int(text.lengths.mean()))
    shares = draw_shares(recipe, typical)
    for dim, layers, wants in LADDER:
        sizes = {"dim": dim, "layers": layers}
        if "dim" in given:
            sizes = {}
        elif "layers" in given:
            sizes = {"dim": dim}
        model = recipe.model.model_copy(update=sizes)
        work, weights = measure_work(model, recipe, text.vocab_size, typical, shares)
        worth = min(PER_WEIGHT * weights, MOST_EPOCHS * text.tokens)
        positions = round_power(worth / STEPS / training.accumulation, *machine.positions)
        rows = training.rows if "rows" in given else max(1, positions // length)
        speed = 1 / max(work / (REACHED * machine.speed), machine.step_seconds / (rows * length))
        minutes = training.minutes or max(1.0, round(min(machine.minutes, max(worth, text.tokens) / speed / 60)))
        trained = float((training.steps or 0) * rows * training.accumulation * length) or minutes * 60 * speed
        if (text.tokens >= wants and trained >= worth / 2) or "dim" in given:
            break
    return Work(model, rows, minutes, trained, speed)


def draw_shares(recipe: Recipe, length: int) -> tuple[float, float, float]:
    """What is drawn in documents of a length: shares of positions that are learned and that are noisy, and copies."""
    row_BL = torch.ones(64, length, dtype=torch.long)
    batch, schedule = Batch(4 * row_BL, row_BL, row_BL.cumsum(1) - 1), Log(0.1, 10.0)
    learned, rng = OBJECTIVES[recipe.training.objective], torch.Generator().manual_seed(0)
    random_TBS = learned.random(batch, recipe.noise, rng)
    draw = learned.draw(batch, recipe.noise, schedule, Special(0, 1, 2, 3), random_TBS)
    return float(draw.live) / row_BL.numel(), float(draw.noisy) / row_BL.numel(), draw.ids_BS.numel() / row_BL.numel()


def measure_work(
    model: ModelConfig, recipe: Recipe, vocab_size: int, length: int, shares: tuple[float, float, float]
) -> tuple[float, int]:
    """FLOPs of training for a token in documents of a length, with `draw_shares`; and the layers' weights."""
    with torch.device("meta"):
        denoiser = Denoiser(model, vocab_size)
    live, noisy, copies = shares
    forward = denoiser.flops(copies, copies * length, noisy, live)
    weights = sum(p.numel() for p in denoiser.backbone.layers.parameters())
    first_pass = recipe.training.self_conditioning if OBJECTIVES[recipe.training.objective].self_conditions else 0.0
    return forward * (3 + first_pass), weights


def explain(recipe: Recipe, text: Text, machine: Machine, trained: float, speed: float) -> list[str]:
    """The recipe in words, with what comes of so many tokens of training."""
    epochs = trained / max(1, text.tokens)
    size, training = recipe.model.size, recipe.training
    time = (
        f"{training.steps:,} steps" if training.steps else f"{training.minutes:g} minute{'s' * (training.minutes != 1)}"
    )
    how_often = f"read about {epochs:,.1f} times" if epochs < 3 else f"read about {epochs:,.0f} times"
    how_often = f"read {epochs:.0%} through" if epochs < 1 else how_often
    how_often = "a stream" if text.streaming else how_often
    known = f"{'the beginning, ' * text.streaming}about {int(text.lengths.sum()):,} tokens"
    number = str(machine.dtype).removeprefix("torch.")
    expect = next(words for least, words in EXPECT if trained >= least)
    noise, learned = recipe.noise, ""
    if noise.hidden and OBJECTIVES[training.objective].asks_next(noise):
        whole = noise.block_sizes.count(0) / len(noise.block_sizes)
        learned = f", {whole:.0%} of the examples are learned as a whole, and of the others up to {noise.hidden:.0%} "
        learned += "is hidden"
    examples = f"{len(text.lengths):,} examples, nearly all of up to {int(np.quantile(text.lengths, 0.995)):,} tokens"
    if len(text.lengths) == 1:
        examples = "one example to learn from: with another --split it could be many"
    return [
        f"{text.name}: {known} of a vocabulary of {text.vocab_size:,}, in {examples}",
        f"model: {size.layers} layers of width {size.dim}, for rows of {recipe.data.max_length} tokens",
        f"training: {time} on {machine.device} in {number}, at some {round(speed, -2):,.0f} tokens/s",
        f"the text is {how_often}, so dropout is {training.dropout:g}{learned}; expect {expect}",
    ]


def round_power(value: float, low: int, high: int) -> int:
    """The power of two nearest to a value, within a range."""
    return int(min(high, max(low, 2 ** round(np.log2(max(1.0, value))))))

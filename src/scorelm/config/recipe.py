"""A training run: every option of it, as one tree of frozen pydantic models.

The attribute docstrings below are the text of ``scorelm train --help``; a recipe is the same tree in TOML.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import tyro
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from scorelm.config import Options, named
from scorelm.config.network import Network
from scorelm.errors import brief

Share = Annotated[float, Field(ge=0, le=1)]
MOST_TOKENS = 32_768  # of a document: the mask of attention holds their square
ObjectiveName = Literal["score", "autoregressive", "masked"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
ScheduleName = Literal["adaptive", "linear", "karras", "log", "cosine", "ddlm", "cdcd"]


def check_vocab_size(value: Any) -> Any:
    """The value, unless it is no size; of a union pydantic would name what its members are called inside."""
    if value == "characters" or (isinstance(value, int) and value > 0):
        return value
    raise ValueError(f"vocab_size: give a number above 0, or characters (got {brief(value)})")


VocabSize = Annotated[PositiveInt | Literal["characters"], BeforeValidator(check_vocab_size)]


class TextOptions(Options):
    """Where text comes from, and what the examples in it are."""

    source: Annotated[str, named("data", "-d")] = "kjv"
    """Text to learn: kjv (embedded), a file (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet; compressed ones too), a
    directory of files, or the name of a Hugging Face dataset."""
    field: Annotated[str, named("field", "--data.field")] = "text"
    """Column that holds the text, in files with columns."""
    csv_separator: Annotated[str | None, named("csv-separator", "--data.csv-separator")] = None
    """Character between the columns of a .csv file, or tab; by default the comma, semicolon or tab that its header
    has."""
    split: Annotated[str | None, named("split", "--data.split")] = None
    """What is one example: line, paragraph, file (or record), or sentence-window:CHARACTERS,OVERLAP for whole sentences
    up to so many characters, a share OVERLAP of which may be repeated from the window before. By default a line of a
    text file, and the whole record in files with columns."""


NormalStep = Literal["lower", "nfc", "nfkc", "numbers", "symbols"]
"""What can be done to a text before its tokens are looked up; see `scorelm.text.normalization`."""


class DataConfig(TextOptions):
    """The text, and how it becomes rows of tokens."""

    holdout: Annotated[float, Field(ge=0, lt=1), named("holdout", "--data.holdout")] = 0.02
    """Share of the examples, chosen by a hash of their text without case and spaces, that no training step sees."""
    tokenizer: Annotated[Path | None, named("tokenizer", "-spm")] = None
    """A SentencePiece .model file, or a tokenizer.json of Hugging Face's library (of the GPT-2, BERT or Llama family);
    by default one is trained on the data."""
    vocab_size: Annotated[VocabSize, named("vocab-size")] = 2048
    """Size of the vocabulary, when a tokenizer is trained; or characters, for a token for each character of the text
    and no others."""
    byte_fallback: Annotated[bool, named("byte-fallback", "--data.byte-fallback")] = True
    """Spell unknown characters in bytes, so that any text comes back as it was, when a tokenizer of that size is
    trained."""
    normalize: Annotated[tuple[NormalStep, ...], named("normalize")] = ()
    """What is done to the text, and later to whatever the model is given, by default nothing: lower (to lower case),
    nfc or nfkc (Unicode's forms), numbers (to English words; needs the extra numbers) and symbols (left out); several
    may be given. The model keeps it."""
    max_length: Annotated[int, Field(ge=4, le=MOST_TOKENS), named("max-length")] = 64
    """Tokens in a packed row; longer examples are cut into windows, at other places in every epoch."""


class Size(NamedTuple):
    """The sizes of a trunk, all resolved."""

    dim: int
    layers: int
    heads: int
    hidden: int


class ModelConfig(Options):
    """The denoiser. One dial, `dim`, sets the rest unless it is given."""

    dim: Annotated[int, Field(ge=8, le=65_536)] = 256
    """Width of the trunk."""
    layers: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Transformer layers; by default dim / 64, at least 4."""
    heads: PositiveInt | None = None
    """Attention heads; by default dim / 64, at least 1."""
    hidden: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Width of the SwiGLU layer; by default 8/3 dim, rounded up to a multiple of 64."""
    embedding_dim: Annotated[int, Field(ge=2, le=65_536)] = 32
    """Size E of the token embeddings that the noise is added to."""
    noise_conditioning: Literal["none", "film"] = "none"
    """none: a position's evidence tells its noise level; film: per-position FiLM of log sigma as well."""
    network: Annotated[Network | None, tyro.conf.Suppress] = None
    """The pretrained network whose weights a model started from; None for our own."""

    @property
    def size(self) -> Size:
        """The trunk's sizes with every default filled in."""
        heads = self.heads or max(1, self.dim // 64)
        hidden = self.hidden or -(-self.dim * 8 // (3 * 64)) * 64
        return Size(self.dim, self.layers or max(4, self.dim // 64), heads, hidden)

    @validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.network is not None and (self.size.heads % self.network.kv_heads or self.noise_conditioning != "none"):
            raise ValueError("a pretrained network has heads in groups of one size, and no noise conditioning")
        if self.dim % (2 * self.size.heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of the number of heads, {self.size.heads}")
        return self


class Mixture(Options):
    """Relative weights of the kinds of per-position noise levels; see `scorelm.noise.levels`."""

    shared: Annotated[float, Field(ge=0)] = 0.35
    """One level for a whole block."""
    independent: Annotated[float, Field(ge=0)] = 0.0
    """A level of its own for every position."""
    spread: Annotated[float, Field(ge=0)] = 0.05
    """A centre for the block plus a spread around it for every position."""
    ramp: Annotated[float, Field(ge=0)] = 0.05
    """A line over positions, earlier ones less noisy (AR-Diffusion)."""
    prefix: Annotated[float, Field(ge=0)] = 0.05
    """A clean prefix, the rest on one level."""
    absorbing: Annotated[float, Field(ge=0)] = 0.45
    """Each position given or without evidence (masked diffusion)."""
    ordered: Annotated[float, Field(ge=0)] = 0.05
    """A clean prefix, the rest without evidence (left to right)."""

    @validator(mode="after")
    def _some_weight(self) -> Self:
        if not sum(self.model_dump().values()) > 0:
            raise ValueError("at least one kind of noise level needs a weight above 0")
        return self


class NoiseConfig(Options):
    """How much noise, where, in training."""

    schedule: ScheduleName = "adaptive"
    """Map from u in [0, 1] to sigma; adaptive spends equal steps of u on equal amounts of cross-entropy."""
    sigma_min: PositiveFloat | None = None
    """Lowest noise level; by default from the embedding and vocabulary sizes (ddlm: 1, cdcd: 1)."""
    sigma_max: PositiveFloat | None = None
    """Highest finite noise level; by default from the embedding size (ddlm: 10, cdcd: 300)."""
    mixture: Mixture = Mixture()
    streams: Literal[1, 2] = 2
    """2: a clean and a noisy copy of each row, cut into blocks (block diffusion); 1: only the noisy copy."""
    block_sizes: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 1, 2, 4, 8, 0)
    """Block sizes drawn per document with two streams; 0 is the whole document."""
    given: Share = 0.5
    """Share of documents that have a random span of tokens given (sigma 0)."""


class TrainingConfig(Options):
    """Optimisation, checkpoints and logging."""

    objective: ObjectiveName = "score"
    """What is learned: score (the diffusion model), or a peer in the same network, autoregressive or masked."""
    init_from: Path | None = None
    """Start from the weights of this model (a directory, a run directory, or a name on the Hugging Face hub), with its
    tokenizer and its sizes, and fit the noise schedule on from its own; by default a run starts from nothing."""
    steps: PositiveInt | None = None
    """Steps of training, instead of --minutes. With --resume, those already made count."""
    minutes: PositiveFloat | None = None
    """Training time; with --resume, so many minutes more. Without --recipe it is chosen for the text; where neither it
    nor --steps is given, a run takes 20,000 steps."""
    rows: PositiveInt = 32
    """Packed rows in a batch, over all processes."""
    shards: PositiveInt | None = None
    """Equal streams that the data is cut into, as far as they divide --rows evenly; by default one for each process, or
    on GPUs four, each of which a process of its own packs into rows."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp keeps a copy of the model in every process, fsdp divides its weights among them."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are added up for one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the layers, at 3 times --lr, and AdamW for the rest. Muon takes fewer steps, but is slow
    on processors without native bfloat16."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate of AdamW."""
    warmup: NonNegativeInt = 50
    """Steps of linear warm-up."""
    decay: Share = 0.4
    """Last share of the run in which the learning rate falls linearly to 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, only on the matrices of the backbone."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of what each layer adds that is left out at random while training: keeps a run of many epochs from learning
    its text by heart."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    skip_limit: NonNegativeInt = 10
    """How many steps in a row may be skipped because the loss or the gradient is not finite; with more, the run ends.
    They are counted on the device and looked at every --log-every steps."""
    self_conditioning: Share = 0.5
    """Share of steps that first make an estimate, without gradient, and feed it back (only for score)."""
    likelihood_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a further term of the loss: the integrand of the likelihood bound."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a further term of the loss: the squared log-partition function of the logits."""
    ema: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.98, 0.995, 0.999)
    """Decays of the averages of the weights; the one that does best on held-out text becomes the model."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of matrix products; auto is bfloat16 where the hardware has it natively, and float32 elsewhere."""
    places: Literal["auto", "exact", "fixed"] = "auto"
    """exact computes only the positions that a step needs, which is the least work; fixed computes every position, so
    that shapes never change and nothing waits. Both give the same loss; auto is exact on a CPU and fixed elsewhere."""
    compile: bool = False
    """Compile with torch.compile: the whole loss where places are fixed, and the layers elsewhere. On a CPU this needs
    a C++ compiler and takes half a minute."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1 or another device of PyTorch; auto takes a GPU if there is one."""
    seed: NonNegativeInt = 0
    """Seed of everything that is drawn: the order of the text, the noise and the first weights."""
    save_every: PositiveInt = 500
    """Most steps between checkpoints."""
    save_minutes: PositiveFloat = 2.0
    """Most minutes between checkpoints; the first one comes after half a minute."""
    keep: PositiveInt = 2
    """How many checkpoints to keep, the newest ones; that of the model which is kept stays too."""
    async_save: bool = False
    """Go on training while a checkpoint is written, from a copy in memory."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    select: Literal["mean", "default", "ordered", "random", "uniform"] = "mean"
    """Which price of held-out text chooses the model that is kept: the mean over the paths that are priced, or that of
    the path which generation takes by default, of writing left to right (ordered), in random order, or of all tokens
    together (uniform)."""
    patience: PositiveInt | None = None
    """End the run when the price has been taken so many times without a better one: then the learning rate falls to 0
    from the best weights, in a tenth of the steps that they took. By default the run goes on to its end."""
    samples: NonNegativeInt = 4
    """Texts that are added to samples.txt after the first minute and each time that held-out text is priced; a run that
    is too short for prices adds them five times."""
    track: tuple[TrackerName, ...] = ()
    """Trackers that the run is told to as well, by default none: tensorboard (files in the run directory), wandb (an
    account, or without a key files in the run directory) and trackio (on this machine); several may be given. Each
    needs the extra of its name."""

    @validator(mode="after")
    def _one_budget(self) -> Self:
        if self.steps and self.minutes:
            raise ValueError("give either steps or minutes, not both")
        return self


class Recipe(Options):
    """A whole training run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    noise: NoiseConfig = NoiseConfig()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()


KEPT = ("objective", "init_from", "rows", "shards", "optimizer", "warmup", "weight_decay", "ema", "select", "seed")
"""Options of training that a run keeps when it is resumed, as it does its data, model and noise."""


def kept_on_resume(old: Recipe, new: Recipe) -> list[str]:
    """The flags of the options that differ and that a resumed run can't change; shards that are not given don't."""
    rooms = [(old.data, new.data, "data"), (old.model, new.model, "model"), (old.noise, new.noise, "noise")]
    found = [flag for room in rooms for flag in differences(*room)]
    training = new.training.model_copy(update={"shards": new.training.shards or old.training.shards})
    changed = [name for name in KEPT if getattr(old.training, name) != getattr(training, name)]
    return found + [f"--{name.replace('_', '-')}" for name in changed]


def differences(old: Options, new: Options, room: str) -> Iterator[str]:
    """The flags of the options that differ."""
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, Options):
            yield from differences(before, after, f"{room}.{name}")
        elif before != after:
            own = [flag for given in field.metadata if (flag := getattr(given, "name", None))]
            yield "--" + next(iter(own), f"{room}.{name}").replace("_", "-")

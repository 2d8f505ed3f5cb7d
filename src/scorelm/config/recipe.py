"""A training run: every option of it, as one tree of frozen pydantic models.

The attribute docstrings below are the text of ``scorelm train --help``; a recipe is the same tree in TOML.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import tyro
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from scorelm.config import Options
from scorelm.config.network import Network
from scorelm.config.text import DataConfig
from scorelm.errors import InputError

Share = Annotated[float, Field(ge=0, le=1)]
ObjectiveName = Literal["score", "autoregressive", "masked"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
ScheduleName = Literal["adaptive", "linear", "karras", "log", "cosine", "ddlm", "cdcd"]


class Size(NamedTuple):
    """The sizes of a trunk, all resolved."""

    dim: int
    layers: int
    heads: int
    hidden: int


class ModelConfig(Options):
    """The denoiser. One dial, `dim`, sets the rest unless it is given."""

    dim: Annotated[int, Field(ge=8, le=65_536)] = 256
    """Width of the network. Chosen for the text, with --model.layers, unless --recipe is given."""
    layers: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Transformer layers. Chosen for the text unless --recipe is given; then by default dim / 64, at least 4."""
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
    """Map from u in [0, 1] to sigma: adaptive spends equal steps of u on equal amounts of cross-entropy; linear goes
    evenly in sigma, log in its logarithm, karras in its seventh root, and cosine in its arctangent; ddlm and cdcd are
    linear in the ranges of those two models."""
    sigma_min: PositiveFloat | None = None
    """Lowest noise level; by default from the embedding and vocabulary sizes (ddlm: 1, cdcd: 1)."""
    sigma_max: PositiveFloat | None = None
    """Highest finite noise level; by default from the embedding size (ddlm: 10, cdcd: 300)."""
    mixture: Mixture = Mixture()
    streams: Literal[1, 2] = 2
    """2: each row stands twice, clean and noisy, the noisy copy in blocks that see the clean tokens before them (block
    diffusion); 1: each row stands once, as whole documents."""
    block_sizes: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 1, 2, 4, 8, 0)
    """Block sizes drawn per document with two streams; 0 is the whole document. Where the text is read ten times or
    more, chosen for it unless --recipe is given."""
    given: Share = 0.5
    """Share of documents that have a random span of tokens given (sigma 0)."""
    hidden: Share = 0.0
    """With two streams: hide tokens of each document's clean copy at random, with a chance drawn from 0 to this, so
    that a text that is read often is not memorised. Hidden tokens have to be guessed. Where the text is read ten times
    or more, 0.4 unless --recipe is given."""


class TrainingConfig(Options):
    """Optimisation, checkpoints and logging."""

    objective: ObjectiveName = "score"
    """What is learned: score (the diffusion model), or to compare with, in the same network: autoregressive (left to
    right, like GPT) or masked (masked diffusion)."""
    init_from: Path | None = None
    """Start from the weights of this model (a directory, a run directory, a name on the Hugging Face hub, a published
    network of the BERT, ModernBERT or Llama family, or a GGUF file), with its tokenizer, its sizes and its noise
    schedule; by default a run starts from nothing."""
    lora: NonNegativeInt = 0
    """With --init-from: leave the matrices of the layers as they are, and train adapters of this rank beside them
    (LoRA; needs the extra lora) and the rest of the model. 0 trains everything."""
    steps: PositiveInt | None = None
    """Steps of training, instead of --minutes, which decides by default. With --resume, those already made count."""
    minutes: PositiveFloat | None = None
    """Training time; with --resume, minutes from now on. By default it is chosen for the text; with --recipe or under
    torchrun, a run that is given neither minutes nor steps takes 20,000 steps."""
    rows: PositiveInt = 32
    """Packed rows in a batch, over all processes. Chosen for the machine unless --recipe is given."""
    shards: PositiveInt | None = None
    """Equal parts that the data is cut into; by default one for each process, as far as they divide --rows evenly."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp keeps a copy of the model in every process, fsdp divides its weights among them."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are added up for one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the layers, at 3 times --lr, and AdamW for the rest. Muon takes fewer steps. Unless
    --recipe is given, muon is chosen, and adamw for a published network or with --lora."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate of AdamW; a run from a published network takes 0.0005 unless this is given."""
    warmup: NonNegativeInt = 50
    """First steps, in which the learning rate rises linearly to its peak; a tenth of the run if that is less."""
    decay: Share = 0.4
    """Last share of the run in which the learning rate falls linearly to 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, only on the matrices of the backbone."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of what each layer adds that is left out at random while training: keeps a run that reads its text many
    times from learning it by heart. Chosen for the text unless --recipe is given."""
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
    """Compile with torch.compile: the whole loss where places are fixed, else the layers. This takes about a minute
    and needs a compiler (g++ for a CPU, gcc for a GPU). On a GPU it is on by default for runs of five minutes or more,
    unless --recipe or --init-from is given."""
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
    """Which price of held-out text (what it costs the model, in nats per token) chooses the model that is kept: the
    mean over all paths that are priced, or the price of writing the surest words first (default; an autoregressive
    model writes left to right), left to right (ordered), in random order, or all tokens together (uniform)."""
    patience: PositiveInt | None = None
    """End the run when held-out text has been measured this many times without a better price: go back to the best
    weights, and let the learning rate fall to 0 from there, in a tenth of the steps that led to them. By default 8
    where the text is read twice or more; with --recipe, the run goes on to its end."""
    samples: NonNegativeInt = 4
    """Texts that are added to samples.txt after the first minute and each time that held-out text is measured; a run
    that is too short for that adds them five times."""
    track: tuple[TrackerName, ...] = ()
    """Trackers that get the metrics of the run as well, by default none: tensorboard (files in the run
    directory), wandb (an account, or without a key files in the run directory) and trackio (on this machine); several
    may be given. Each needs the extra of its name."""

    @validator(mode="after")
    def _something_to_adapt(self) -> Self:
        if self.lora and self.init_from is None:
            raise ValueError("lora adapts a model: name it with init_from")
        return self

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


KEPT = (
    "objective", "init_from", "lora", "rows", "shards", "optimizer", "warmup", "weight_decay", "ema", "select", "seed",
)  # fmt: skip
"""Options of training that a run keeps when it is resumed, as it does its data, model and noise."""


def kept_on_resume(old: Recipe, new: Recipe) -> list[str]:
    """The flags of the options that differ and that a resumed run can't change; shards that are not given don't."""
    rooms = [(old.data, new.data, "data"), (old.model, new.model, "model"), (old.noise, new.noise, "noise")]
    found = [flag for room in rooms for flag in differences(*room)]
    training = new.training.model_copy(update={"shards": new.training.shards or old.training.shards})
    changed = [name for name in KEPT if getattr(old.training, name) != getattr(training, name)]
    return found + [f"--{name.replace('_', '-')}" for name in changed]


def check_end(recipe: Recipe) -> None:
    """Refuse a run without an end on a text whose length nobody knows.

    Raises:
        InputError: says what to give.
    """
    if recipe.data.streaming and not (recipe.training.steps or recipe.training.minutes):
        raise InputError("--streaming needs --steps or --minutes, since nobody knows how long the text is")


def differences(old: Options, new: Options, room: str) -> Iterator[str]:
    """The flags of the options that differ."""
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, Options):
            yield from differences(before, after, f"{room}.{name}")
        elif before != after:
            own = [flag for given in field.metadata if (flag := getattr(given, "name", None))]
            yield "--" + next(iter(own), f"{room}.{name}").replace("_", "-")

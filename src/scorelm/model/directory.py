"""Model directories: ``config.json``, ``model.safetensors``, a tokenizer, ``README.md`` and ``recipe.toml``.

The tokenizer is ``tokenizer.model`` or ``tokenizer.json``.

A directory is untrusted input: nothing in it is unpickled, and sizes are checked before anything is allocated.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from scorelm.config import Options, explain
from scorelm.config.recipe import ModelConfig, ObjectiveName
from scorelm.config.text import MOST_TOKENS, NormalStep
from scorelm.config.toml import MOST_RECIPE_BYTES
from scorelm.errors import InputError, brief, exists, read_bounded
from scorelm.model.denoiser import Denoiser
from scorelm.model.hub import fetch
from scorelm.text import tokenizer

REAL = ("F16", "BF16", "F32", "F64")
FILES = ("config.json", "model.safetensors")
RECIPE = "recipe.toml"
MOST_MANIFEST_BYTES = 1 << 22
MOST_HEADER_BYTES = 1 << 23
LARGEST_WEIGHT = 1e6  # products of larger ones may not be finite in float32


class Provenance(Options):
    """How a model came about."""

    model_config = ConfigDict(allow_inf_nan=True)

    data: str = ""
    """The source of the text, as it was given."""
    field: str = "text"
    csv_separator: str | None = None
    split: str | None = None
    """What an example is; see `scorelm.text.splits`."""
    hub_split: str | None = None
    """Of a dataset on the Hugging Face hub; None for ``train``."""
    hub_config: str | None = None
    streaming: bool = False
    """Whether the dataset was read as a stream; the fingerprint is then that of its beginning."""
    normalize: tuple[NormalStep, ...] = ()
    """What was done to the text, and is done to whatever the model reads; see `scorelm.text.normalization`."""
    holdout: float | None = None
    """Share of the examples that training never saw; None where that is not known."""
    fingerprint: str = ""
    """Of the text, as `scorelm.text.corpus` makes it."""
    steps: int = 0
    tokens: int = 0
    tells_next_token: bool = False
    """Whether given tokens have learned to tell the next one, as those of an autoregressive model do."""
    heldout_loss: float | None = None
    prices: dict[str, float] = Field(default_factory=dict)
    """What held-out text cost, in nats per token by path, and the largest standard error, where it was priced."""
    init_from: str | None = None
    """The model that training started from, by the name that was given; None where it started from nothing."""
    before: Provenance | None = None
    """How that model came about."""


class Manifest(Options):
    """The contents of config.json."""

    format: Literal[1] = 1
    objective: ObjectiveName = "score"
    model: ModelConfig
    vocab_size: int = Field(ge=4, le=10_000_000)
    lengths: list[Annotated[int, Field(ge=0, le=2**53)]] = Field(min_length=4, max_length=MOST_TOKENS + 1)
    schedule: dict[str, Any]
    provenance: Provenance = Provenance()


EMBEDDED = Path(__file__).parents[1] / "assets" / "model"
"""The model that comes with the library."""


def find_directory(path: str | Path | None, hub_options: dict[str, Any]) -> Path:
    """The model directory that a path or a hub name stands for; a run directory stands for its model, None for ours.

    Raises:
        InputError: there is none, or a file is missing; names it.
    """
    if path is None:
        return EMBEDDED
    directory = Path(path)
    if exists(directory / "model" / "config.json"):
        directory = directory / "model"
    elif not (exists(directory) and directory.is_dir()):
        directory = fetch(str(path), [*FILES, *tokenizer.FILES, "README.md", RECIPE], hub_options)
    for name in (*FILES, tokenizer.find_tokenizer(directory).name):
        if not (directory / name).is_file():
            raise InputError(f"{directory} is not a model directory: it has no {name}")
    return directory


def read_manifest(path: Path) -> Manifest:
    """Read and validate config.json; where transformers reads it too, only what it has under ``scorelm``."""
    try:
        contents = json.loads(read_bounded(path, MOST_MANIFEST_BYTES).decode("utf-8"))
        return Manifest.model_validate(contents.get("scorelm", contents) if isinstance(contents, dict) else contents)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {brief(str(error))}") from None


def read_recipe(directory: Path) -> str:
    """The options of the run that a model comes from, as TOML, for people to read; "" where there are none."""
    try:
        text = read_bounded(directory / RECIPE, MOST_RECIPE_BYTES).decode("utf-8")
        tomllib.loads(text)
    except (OSError, ValueError, RecursionError):
        return ""
    return text


def read_weights(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Read model.safetensors after checking every name and shape against the manifest."""
    with torch.device("meta"):
        expected = {k: list(v.shape) for k, v in Denoiser(manifest.model, manifest.vocab_size).state_dict().items()}
    try:
        with path.open("rb") as header:
            if int.from_bytes(header.read(8), "little") > MOST_HEADER_BYTES:
                raise InputError(f"{path} is damaged: its header is larger than {MOST_HEADER_BYTES:,} bytes")
        with safe_open(path, framework="pt") as file:
            check_header({name: file.get_slice(name) for name in file.keys()}, expected, path)  # noqa: SIM118
            weights = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {brief(str(error))}") from None
    for name, weight in weights.items():
        if not weight.abs().max() <= LARGEST_WEIGHT:  # nor is a NaN
            raise InputError(f"{path} is damaged: {name} holds numbers that are not finite or above {LARGEST_WEIGHT:g}")
    return weights


def check_header(parts: dict[str, Any], expected: dict[str, list[int]], path: Path) -> None:
    """Refuse tensors of other names, shapes or kinds of number than are expected, before any is read."""
    for name in sorted(expected.keys() | parts.keys()):
        found, wanted = parts[name].get_shape() if name in parts else "none", expected.get(name, "none")
        if found != wanted:
            raise InputError(
                f"{path} does not fit config.json: {brief(name)} has shape {brief(found)}, expected {wanted}"
            )
        if (kind := parts[name].get_dtype()) not in REAL:
            raise InputError(f"{path} is damaged: {name} holds {kind}, not real numbers")

"""Pretrained networks as they are published: their config.json and safetensors files, read as weights of our denoiser.

A directory is untrusted input, as ours are: nothing is unpickled, and shapes are checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scorelm.config import explain
from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError, brief, read_bounded
from scorelm.model.directory import MOST_MANIFEST_BYTES
from scorelm.model.pretrained_families import NEEDED, READERS, Source


def is_network(directory: Path) -> bool:
    """Whether a directory holds a published network rather than a model of ours; `read_config` says what is raised."""
    values = read_config(directory)
    return "model_type" in values and "scorelm" not in values  # which is there where transformers reads ours, too


def read_network(directory: Path, vocab_size: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The sizes of a published network of one of the families, and its weights under the names of our denoiser.

    Weights are those of the backbone, ``token_in`` (its table of inputs) and, where it has a table of outputs,
    ``context``.

    Args:
        directory: it has config.json and model.safetensors.
        vocab_size: of its tokenizer; what was added behind the network's own vocabulary begins as the mean of that.

    Raises:
        InputError: another family, something in it that is not computed here, or files that are missing or damaged.
    """
    values = read_config(directory)
    family = str(values.get("model_type"))
    if family not in NEEDED:
        known = ", ".join(NEEDED)
        raise InputError(f"{directory} is a network of the family {brief(family)}: only {known} can be read")
    make_config, make_weights = READERS[family]
    for name, wanted in NEEDED[family].items():
        if (said := values.get(name, wanted)) != wanted:
            raise InputError(f"{directory}: {name} is {brief(said)}, and only {wanted} can be computed")
    prefix = "bert." if family == "bert" else "model."
    found = read_tensors(directory / "model.safetensors")
    source = Source(directory, {name.removeprefix(prefix): tensor for name, tensor in found.items()})
    try:
        config = make_config(values, source)
    except ValidationError as error:
        raise InputError(f"{directory}: {explain(error)}") from None
    weights = make_weights(config, source)
    for name in ("token_in", "context.weight", "context.bias"):
        if name in weights:
            weights[name] = with_rows(weights[name], vocab_size)
    return config, weights


def with_rows(table: Tensor, count: int) -> Tensor:
    """A table's first rows, and means of all of them behind these as far as there are too few."""
    mean = table.mean(0, keepdim=True).expand(max(0, count - len(table)), *table.shape[1:])
    return torch.cat([table[:count], mean])


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of config.json."""
    path = directory / "config.json"
    try:
        values = json.loads(read_bounded(path, MOST_MANIFEST_BYTES).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {brief(str(error))}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: no names with values")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in float32."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {brief(str(error))}") from None
    return {name: tensor.float() for name, tensor in found.items() if tensor.is_floating_point()}

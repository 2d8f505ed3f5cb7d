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
from scorelm.config.network import Network
from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError, brief, read_bounded
from scorelm.model.directory import LARGEST_WEIGHT, MOST_MANIFEST_BYTES

BERT = {
    "attention.out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
}  # fmt: skip
"""Our names of what a layer of BERT has, and those of its files."""
LLAMA = {
    "attention_norm": "input_layernorm", "attention.out": "self_attn.o_proj", "norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
}  # fmt: skip
NEEDED = {
    "bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None},
}
"""What we compute; a config.json that says otherwise is refused, one that says nothing means this."""


def is_network(directory: Path) -> bool:
    """Whether a directory holds a published network rather than a model of ours; `read_config` says what is raised."""
    return "model_type" in read_config(directory)


def read_network(directory: Path, vocab_size: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The sizes of a published network of BERT's or Llama's family, and its weights under the names of our denoiser.

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
        known = " and ".join(NEEDED)
        raise InputError(f"{directory} is a network of the family {brief(family)}: only {known} can be read")
    for name, wanted in NEEDED[family].items():
        if (said := values.get(name, wanted)) != wanted:
            raise InputError(f"{directory}: {name} is {brief(said)}, and only {wanted} can be computed")
    prefix = {"bert": "bert.", "llama": "model."}[family]
    found = read_tensors(directory / "model.safetensors")
    source = Source(directory, {name.removeprefix(prefix): tensor for name, tensor in found.items()})
    try:
        config = (bert_config if family == "bert" else llama_config)(values, source)
    except ValidationError as error:
        raise InputError(f"{directory}: {explain(error)}") from None
    weights = (map_bert if family == "bert" else map_llama)(config, source)
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


class Source:
    """The tensors of a network by their names, each of which is checked when it is taken."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor that has to be there, of this shape; -1 is any size.

        Raises:
            InputError: it is not, or holds numbers that are not finite or too large.
        """
        tensor = self.tensors.get(name)
        found = "none" if tensor is None else list(tensor.shape)
        if tensor is None or tensor.ndim != len(shape) or any(n not in (-1, m) for m, n in zip(found, shape)):  # noqa: B905
            raise InputError(f"{self.path} does not fit its config.json: {name} has shape {found}, expected {shape}")
        if not tensor.abs().max() <= LARGEST_WEIGHT:  # nor is a NaN
            raise InputError(f"{self.path} is damaged: {name} holds numbers that are not finite or too large")
        return tensor


SIZES = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"


def numbers(values: dict[str, Any], source: Source) -> list[int]:
    """Width, layers, heads, width of the feed-forward layers, and positions."""
    for name in SIZES:
        if type(found := values.get(name)) is not int or found < 1:
            raise InputError(f"{source.path}: {name} is {brief(found)} in config.json, not a number above 0")
    return [values[name] for name in SIZES]


def bert_config(values: dict[str, Any], source: Source) -> ModelConfig:
    """The sizes in BERT's words."""
    dim, layers, heads, hidden, positions = numbers(values, source)
    network = Network(
        family="bert", kv_heads=heads, norm_eps=values.get("layer_norm_eps", 1e-12),
        positions=positions, head="cls.predictions.transform.dense.weight" in source,
    )  # fmt: skip
    return ModelConfig(dim=dim, layers=layers, heads=heads, hidden=hidden, network=network)


def llama_config(values: dict[str, Any], source: Source) -> ModelConfig:
    """The sizes in Llama's words."""
    dim, layers, heads, hidden, positions = numbers(values, source)
    rotary = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if (kind := rotary.get("rope_type", rotary.get("type", "default"))) != "default":
        raise InputError(f"{source.path}: rotary positions are scaled ({brief(kind)}), which is not computed here")
    if values.get("head_dim") not in (None, dim // heads):
        raise InputError(f"{source.path}: head_dim {values['head_dim']} is not hidden_size / num_attention_heads")
    network = Network(
        family="llama", kv_heads=values.get("num_key_value_heads") or heads, norm_eps=values.get("rms_norm_eps", 1e-6),
        positions=positions,
        rotary_base=values.get("rope_theta") or rotary.get("rope_theta", 10_000.0),
    )  # fmt: skip
    return ModelConfig(dim=dim, layers=layers, heads=heads, hidden=hidden, network=network)


def map_bert(config: ModelConfig, source: Source) -> dict[str, Tensor]:
    """BERT's weights; what it adds for texts of the first kind stands in its positions."""
    (dim, layers, _, hidden), network = config.size, config.network
    assert network is not None
    table = source.take("embeddings.word_embeddings.weight", -1, dim)
    kind = source.take("embeddings.token_type_embeddings.weight", -1, dim)[0]
    weights = {
        "token_in": table,
        "trunk.position.weight": source.take("embeddings.position_embeddings.weight", network.positions, dim) + kind,
        **both("trunk.norm", source, "embeddings.LayerNorm", dim),
    }
    shapes = {"up": (hidden, dim), "down": (dim, hidden), "attention.out": (dim, dim)}
    for k in range(layers):
        ours, theirs = f"trunk.blocks.{k}", f"encoder.layer.{k}"
        parts = [both("", source, f"{theirs}.attention.self.{name}", dim, dim) for name in ("query", "key", "value")]
        weights |= {f"{ours}.attention.qkv{end}": torch.cat([part[end] for part in parts]) for end in parts[0]}
        for name, there in BERT.items():
            weights |= both(f"{ours}.{name}", source, f"{theirs}.{there}", *shapes.get(name, (dim,)))
    if network.head:
        weights |= both("trunk.head.0", source, "cls.predictions.transform.dense", dim, dim)
        weights |= both("trunk.head.2", source, "cls.predictions.transform.LayerNorm", dim)
        own = "cls.predictions.decoder.weight"
        weights["context.weight"] = source.take(own, len(table), dim) if own in source else table
        weights["context.bias"] = source.take("cls.predictions.bias", len(table))
    return weights


def map_llama(config: ModelConfig, source: Source) -> dict[str, Tensor]:
    """Llama's weights; where one table is both that of inputs and that of outputs, each is a copy."""
    (dim, layers, heads, hidden), network = config.size, config.network
    assert network is not None
    table = source.take("embed_tokens.weight", -1, dim)
    weights = {"token_in": table, "trunk.norm.weight": source.take("norm.weight", dim)}
    shapes = {"down": (dim, hidden), "attention.out": (dim, dim)}
    for k in range(layers):
        ours, theirs, narrow = f"trunk.blocks.{k}", f"layers.{k}", dim // heads * network.kv_heads
        q, key, value = (
            source.take(f"{theirs}.self_attn.{name}_proj.weight", rows, dim)
            for name, rows in (("q", dim), ("k", narrow), ("v", narrow))
        )
        weights[f"{ours}.attention.qkv.weight"] = torch.cat([*(in_pairs(t, dim // heads) for t in (q, key)), value])
        up = [source.take(f"{theirs}.mlp.{name}_proj.weight", hidden, dim) for name in ("gate", "up")]
        weights[f"{ours}.up.weight"] = torch.cat(up)
        for name, there in LLAMA.items():
            weights[f"{ours}.{name}.weight"] = source.take(f"{theirs}.{there}.weight", *shapes.get(name, (dim,)))
    weights["context.weight"] = source.take("lm_head.weight", len(table), dim) if "lm_head.weight" in source else table
    return weights


def both(name: str, source: Source, theirs: str, *shape: int) -> dict[str, Tensor]:
    """A layer's weight, of this shape, and its bias, under our name; old files call those of a norm gamma and beta."""
    weight, bias = ("gamma", "beta") if f"{theirs}.gamma" in source else ("weight", "bias")
    return {
        f"{name}.weight": source.take(f"{theirs}.{weight}", *shape),
        f"{name}.bias": source.take(f"{theirs}.{bias}", shape[0]),
    }


def in_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys in the order of our rotation: pairs that are half a head apart there are neighbours."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

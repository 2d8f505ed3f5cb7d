"""The families of published networks: what their files call sizes and weights, and what that is in our words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorelm.config.network import Network
from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError, brief
from scorelm.model.directory import LARGEST_WEIGHT

BERT = {
    "attention.out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
}  # fmt: skip
"""Our names of what a layer of BERT has, and those of its files."""
MODERNBERT = {"attention.out": "attn.Wo", "norm": "mlp_norm", "up": "mlp.Wi", "down": "mlp.Wo"}
LLAMA = {
    "attention_norm": "input_layernorm", "attention.out": "self_attn.o_proj", "norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
}  # fmt: skip
NEEDED = {
    "bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
    "modernbert": {
        "hidden_activation": "gelu", "classifier_activation": "gelu", "norm_bias": False, "attention_bias": False,
        "mlp_bias": False, "classifier_bias": False,
    },
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None},
}  # fmt: skip
"""What we compute; a config.json that says otherwise is refused, one that says nothing means this."""


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


def numbers(values: dict[str, Any], source: Source, names: Sequence[str] = SIZES) -> list[int]:
    """Width, layers, heads, width of the feed-forward layers, and positions; or numbers of other names."""
    for name in names:
        if type(found := values.get(name)) is not int or found < 1:
            raise InputError(f"{source.path}: {name} is {brief(found)} in config.json, not a number above 0")
    return [values[name] for name in names]


def inner(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """The first of these names that holds values by name; {} where none does."""
    return next((found for name in names if isinstance(found := values.get(name), dict)), {})


def refuse_scaled(rotary: dict[str, Any], source: Source) -> None:
    """Refuse rotary positions that are anything but the plain ones."""
    if (kind := rotary.get("rope_type", rotary.get("type", "default"))) != "default":
        raise InputError(f"{source.path}: rotary positions are scaled ({brief(kind)}), which is not computed here")


def bert_config(values: dict[str, Any], source: Source) -> ModelConfig:
    """The sizes in BERT's words."""
    dim, layers, heads, hidden, positions = numbers(values, source)
    network = Network(
        family="bert", kv_heads=heads, norm_eps=values.get("layer_norm_eps", 1e-12),
        positions=positions, head="cls.predictions.transform.dense.weight" in source,
    )  # fmt: skip
    return ModelConfig(dim=dim, layers=layers, heads=heads, hidden=hidden, network=network)


def modernbert_config(values: dict[str, Any], source: Source) -> ModelConfig:
    """The sizes in ModernBERT's words, of which there are older and newer ones."""
    dim, layers, heads, hidden, positions = numbers(values, source)
    values = {"global_attn_every_n_layers": 3, "local_attention": 128} | values
    every, window = numbers(values, source, ("global_attn_every_n_layers", "local_attention"))
    if isinstance(kinds := values.get("layer_types"), list):
        every = next((k for k, kind in enumerate(kinds) if k and kind == "full_attention"), layers)
        regular = ("sliding_attention" if k % every else "full_attention" for k in range(len(kinds)))
        if len(kinds) != layers or kinds != list(regular):
            raise InputError(f"{source.path}: its layers see the whole text in no regular order: {brief(kinds)}")
    rotary = inner(values, "rope_parameters")
    wide, near = inner(rotary, "full_attention"), inner(rotary, "sliding_attention")
    for said in (wide, near, inner(values, "rope_scaling")):
        refuse_scaled(said, source)
    network = Network(
        family="modernbert", kv_heads=heads, norm_eps=values.get("norm_eps", 1e-5), positions=positions,
        rotary_base=wide.get("rope_theta") or values.get("global_rope_theta", 160_000.0), every=every,
        reach=window // 2, head="head.dense.weight" in source,
        reach_base=near.get("rope_theta") or values.get("local_rope_theta", 10_000.0),
    )  # fmt: skip
    return ModelConfig(dim=dim, layers=layers, heads=heads, hidden=hidden, network=network)


def llama_config(values: dict[str, Any], source: Source) -> ModelConfig:
    """The sizes in Llama's words."""
    dim, layers, heads, hidden, positions = numbers(values, source)
    rotary = inner(values, "rope_parameters", "rope_scaling")
    refuse_scaled(rotary, source)
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


def map_modernbert(config: ModelConfig, source: Source) -> dict[str, Tensor]:
    """ModernBERT's weights; its first layer has no norm of its own."""
    (dim, layers, heads, hidden), network = config.size, config.network
    assert network is not None
    table = source.take("embeddings.tok_embeddings.weight", -1, dim)
    weights = {"token_in": table}
    for ours, theirs in (("first_norm", "embeddings.norm"), ("norm", "final_norm")):
        weights[f"trunk.{ours}.weight"] = source.take(f"{theirs}.weight", dim)
    shapes = {"attention.out": (dim, dim), "up": (2 * hidden, dim), "down": (dim, hidden)}
    for k in range(layers):
        ours, theirs = f"trunk.blocks.{k}", f"layers.{k}"
        q, key, value = source.take(f"{theirs}.attn.Wqkv.weight", 3 * dim, dim).chunk(3)
        weights[f"{ours}.attention.qkv.weight"] = torch.cat([*(in_pairs(t, dim // heads) for t in (q, key)), value])
        for name, there in MODERNBERT.items():
            weights[f"{ours}.{name}.weight"] = source.take(f"{theirs}.{there}.weight", *shapes.get(name, (dim,)))
        if k:
            weights[f"{ours}.attention_norm.weight"] = source.take(f"{theirs}.attn_norm.weight", dim)
    if network.head:
        weights["trunk.head.0.weight"] = source.take("head.dense.weight", dim, dim)
        weights["trunk.head.2.weight"] = source.take("head.norm.weight", dim)
        own = "decoder.weight"
        weights["context.weight"] = source.take(own, len(table), dim) if own in source else table
        bias = source.take("decoder.bias", len(table)) if "decoder.bias" in source else table.new_zeros(len(table))
        weights["context.bias"] = bias
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


READERS = {
    "bert": (bert_config, map_bert), "modernbert": (modernbert_config, map_modernbert),
    "llama": (llama_config, map_llama),
}  # fmt: skip
"""What makes each family's sizes and weights."""

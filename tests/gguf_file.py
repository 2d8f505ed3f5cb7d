"""A GGUF file of a small network, and the byte-level tokenizer that it has: three merges."""

from pathlib import Path

import pytest
import tokenizers
import torch

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {sign: k for k, sign in enumerate(["<s>", "</s>", *BYTES, "an", "and", "Ġand"])}
MERGES = [("a", "n"), ("an", "d"), ("Ġ", "and")]


def save_gguf(path: Path, model: torch.nn.Module, **more: torch.Tensor) -> Path:
    """A llama model of transformers and the tokenizer as llama.cpp would write them: rotary pairs side by side."""
    gguf, config = pytest.importorskip("gguf"), model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *list(VOCABULARY)[1:]])  # which transformers adds where it is missing
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 2))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    for name, weight in more.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

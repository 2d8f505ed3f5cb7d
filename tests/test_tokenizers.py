"""A ``tokenizer.json`` from training to prices, by the command, in each family; and what is said of it."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch

from scorelm import ScoreLM, Tokenizer
from scorelm.cli import main
from scorelm.cli.texts import Texts, load_texts
from scorelm.text.normalization import normalize
from scorelm.text.tokenizer import FILES

from .families import FAMILIES

SMALL = ("--model.dim", "32", "--model.layers", "2", "--max-length", "32", "--rows", "8", "--steps", "6")
TEXT = "\n".join(f"the {a} of {b} cats is light" for a in ("sea", "light", "world") for b in ("the", "12", "not") * 3)


def scorelm(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with StringIO() as out, TemporaryFile("w+") as err:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        err.seek(0)
        return int(ended.value.code or 0), out.getvalue(), err.read()


def train(tmp_path: Path, family: str, text: str = TEXT) -> tuple[Path, str]:
    """A run on a text with the tokenizer of a family, and what was said."""
    (tmp_path / "lines.txt").write_text(text, encoding="utf-8")
    given, out = tmp_path / "given.json", tmp_path / "run"
    given.write_text(FAMILIES[family]().to_str(), encoding="utf-8")
    words = ("--data", tmp_path / "lines.txt", "--tokenizer", given, "--out", out, "--holdout", "0.2")
    code, _, err = scorelm("train", *words, *SMALL)
    assert code == 0, err
    return out, err


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_train_sample_infill_and_score(family: str, tmp_path: Path) -> None:
    run, said = train(tmp_path, family)
    assert "round-trip" not in said
    assert {path.name for path in (run / "model").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "recipe.toml"
    }  # fmt: skip
    assert (run / "tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()
    lm = ScoreLM.from_pretrained(run)
    code, out, err = scorelm("sample", run, "--prompt", "the light ", "-n", "2", "--steps", "4", "--json")
    assert code == 0, err
    for sample in json.loads(out):
        assert sample["text"].startswith("the light ") or not sample["text"].removeprefix("the light")
        assert lm.tokenizer.decode(sample["ids"]) == sample["text"]
        assert not {*lm.tokenizer.special[2:], lm.tokenizer.special.bos} & set(sample["ids"][1:])
    words = ("--blank-words", "1", "--steps", "4", "-n", "1", "--json")
    code, out, err = scorelm("infill", run, "the ____ of 12 cats", *words)
    (filled,) = json.loads(out)
    start, end = filled["spans"][0]
    assert code == 0 and filled["text"][start:end].isalnum(), err
    assert (filled["text"][:start], filled["text"][end:]) == ("the ", " of 12 cats")
    code, out, err = scorelm("score", run, "--text", "the light of the sea", "--path", "ordered", "--json")
    price = json.loads(out)
    assert code == 0 and price["exact"] and price["bits_per_char"] > 0 and price["unknown_characters"] == 0
    code, _, err = scorelm("train", "--out", run, "--resume", "--steps", "9")
    assert code == 0 and ScoreLM.from_pretrained(run).provenance.steps == 9, err


@pytest.mark.thorough
def test_what_does_not_come_back_is_said_before_training_and_with_prices(tmp_path: Path) -> None:
    run, said = train(tmp_path, "bert", TEXT + "\nThe Sea")
    assert "do not round-trip through this tokenizer" in said
    assert said.index("round-trip") < said.index("parameters")
    changed = ("score", run, "--text", "The Light", "--path", "ordered", "--json")
    code, out, err = scorelm(*changed)
    assert code == 0 and json.loads(out)["bits_per_char"] is None and json.loads(out)["unknown_characters"] == 2
    code, out, err = scorelm(*changed, "--lossy")
    assert code == 0 and json.loads(out)["bits_per_char"] > 0
    unknown = ("score", run, "--text", "the 起 light", "--path", "ordered", "--json")
    code, out, err = scorelm(*unknown)
    assert (code, out) == (2, "") and "cannot spell" in err and "--lossy" in err
    code, out, err = scorelm(*unknown, "--lossy")
    assert code == 0 and json.loads(out)["unknown_characters"] == 2  # one space is left of two


@pytest.mark.thorough
def test_a_model_keeps_what_was_done_to_its_text_and_does_it_to_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text(TEXT.title().replace("12", "12,"))
    run = tmp_path / "run"
    words = ("--data", tmp_path / "lines.txt", "--out", run, "--holdout", "0.2", "--vocab-size", "characters")
    code, _, err = scorelm("train", *words, *SMALL, "--normalize", "lower", "symbols", "numbers")
    assert code == 0 and "texts are read with numbers as words, without symbols, in lower case, in training" in err
    assert "round-trip" not in err, err
    pieces = "".join(Tokenizer.load(run / "tokenizer.model").pieces(range(4, 20)))
    assert set(pieces) <= {*"abcdefghijklmnopqrstuvwxyz▁"}
    code, out, err = scorelm("sample", run, "--prompt", "The LIGHT of 12", "-n", "1", "--steps", "3")
    assert code == 0 and out.startswith("the light of twelve")
    assert "the model reads 'the light of twelve' for 'The LIGHT of 12': its text was put with numbers as words" in err
    code, out, err = scorelm("sample", run, "--prompt", "the light", "-n", "1", "--steps", "3")
    assert code == 0 and "reads" not in err
    code, out, err = scorelm("infill", run, "The ____, of 12", "-n", "1", "--steps", "3")
    assert code == 0 and out.startswith("The ") and out.endswith(", of 12\n")
    assert "the model reads 'the ____ of twelve' for 'The ____, of 12'" in err
    prices = []
    for text in ("The LIGHT.", "the light"):
        code, out, err = scorelm("score", run, "--text", text, "--path", "ordered", "--json")
        prices.append({key: json.loads(out)[key] for key in ("nats_per_token", "bits_per_char", "unknown_characters")})
        assert "1 given text, read with numbers as words, without symbols, in lower case" in err
    assert prices[0] == prices[1] and prices[0]["unknown_characters"] == 0
    code, out, err = scorelm("score", run, "--path", "ordered", "--json")
    assert code == 0 and json.loads(out)["held_out"] and json.loads(out)["unknown_characters"] == 0
    measured = load_texts(ScoreLM.from_pretrained(run).provenance, Texts())
    assert all(text == normalize(text, ["lower", "symbols", "numbers"]) for text in measured.texts)
    assert json.loads(scorelm("info", run, "--json")[1])["normalize"] == ["lower", "symbols", "numbers"]
    code, _, err = scorelm("train", "--out", run, "--resume", "--steps", "8", "--normalize", "lower")
    assert code == 2 and "--normalize can't change" in err
    code, _, err = scorelm("train", "--out", run, "--resume", "--steps", "8")
    assert code == 0 and ScoreLM.from_pretrained(run).provenance.steps == 8, err
    again = ("--data", tmp_path / "lines.txt", "--out", tmp_path / "again", "--init-from", run, "--steps", "1")
    code, _, err = scorelm("train", *again, "--rows", "8", "--max-length", "32", "--holdout", "0.2")
    assert code == 0 and ScoreLM.from_pretrained(tmp_path / "again").provenance.normalize, err


@pytest.mark.parametrize("contents", [b"", b"{}", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_bad_file_is_refused_in_one_line(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text(TEXT)
    (tmp_path / "bad.json").write_bytes(contents)
    words = ("--data", tmp_path / "lines.txt", "--tokenizer", tmp_path / "bad.json", "--out", tmp_path / "run")
    code, out, err = scorelm("train", *words, *SMALL)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith(f"scorelm: cannot use tokenizer {tmp_path}")
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_model_directory_has_one_tokenizer_which_fits(tmp_path: Path) -> None:
    run, _ = train(tmp_path, "llama")
    model = run / "model"
    lm = ScoreLM.from_pretrained(model)
    lm.save_pretrained(tmp_path / "again")
    again = ScoreLM.from_pretrained(tmp_path / "again")
    assert again.tokenizer.to_bytes() == lm.tokenizer.to_bytes()
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters(), strict=True))
    Tokenizer.train([TEXT], 300).save(model / FILES[0])
    assert "has both tokenizer.model and tokenizer.json" in refused(model)
    lm.save_pretrained(model)
    assert not (model / FILES[0]).exists() and ScoreLM.from_pretrained(model)
    (model / FILES[1]).write_text(FAMILIES["gpt2"]().to_str())
    assert "tokenizer.json has 333 tokens, config.json says 381" in refused(model)
    (model / FILES[1]).unlink()
    assert "it has no tokenizer.model" in refused(model)


def refused(model: Path) -> str:
    code, out, err = scorelm("sample", model)
    assert (code, out) == (2, "") and err.count("\n") == 1
    return err

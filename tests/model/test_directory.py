"""A model directory: what is saved comes back, and what is damaged is refused by the name of its file."""

import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from scorelm import ScoreLM
from scorelm.noise.schedule import make_schedule

from .saving import CONFIG, logits, make, refused

# --- round trip -------------------------------------------------------------------------------------------------------


def test_a_model_directory_holds_what_it_should(saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    card = (saved / "README.md").read_text()
    assert (
        "four lines" in card
        and "3,456 tokens" in card
        and "held-out text 1.250" in card
        and "library_name: scorelm" in card
    )


@pytest.mark.parametrize("conditioning", ["none", "film"])
@pytest.mark.parametrize("schedule", ["adaptive", "log", "cdcd"])
def test_save_and_load_is_the_same_model(tokenizer, tmp_path, conditioning, schedule):
    config = CONFIG.model_copy(update={"noise_conditioning": conditioning})
    lm = make(tokenizer, config, schedule=make_schedule(schedule, 16, 50))
    lm.save_pretrained(tmp_path)
    again = ScoreLM.from_pretrained(tmp_path)
    assert torch.equal(logits(lm), logits(again))
    assert not again.training
    assert (again.config, again.schedule, again.lengths) == (lm.config, lm.schedule, lm.lengths)
    assert again.provenance == lm.provenance
    assert again.tokenizer.to_bytes() == lm.tokenizer.to_bytes()
    assert (again.max_length, again.parameters_count) == (lm.max_length, sum(p.numel() for p in lm.parameters()))


def test_a_loaded_model_generates_the_same(original, saved):
    again = ScoreLM.from_pretrained(str(saved))
    for options in ({"path": "uniform"}, {"path": "ramp:1", "solver": "ancestral"}, {"path": "blocks:1"}):
        assert original.generate(["the"], n=2, steps=6, **options) == again.generate(["the"], n=2, steps=6, **options)
    filled = original.infill("god ____ the light", n=2, steps=6, blank_tokens=2)
    assert filled == again.infill("god ____ the light", n=2, steps=6, blank_tokens=2)


def test_saving_again_writes_the_same_bytes(saved, tmp_path):
    ScoreLM.from_pretrained(saved).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.model", "README.md"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_a_recipe_goes_along_and_one_that_is_none_does_not_matter(broken, tmp_path):
    (broken / "recipe.toml").write_text('[data]\nsource = "a.txt"\n')
    lm = ScoreLM.from_pretrained(broken)
    lm.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "recipe.toml").read_text() == lm.recipe == '[data]\nsource = "a.txt"\n'
    assert lm.recipe in lm.card()
    for other in (b"BEGIN PRIVATE KEY", b"\xff", b"a" * (1 << 21)):
        (broken / "recipe.toml").write_bytes(other)
        assert ScoreLM.from_pretrained(broken).recipe == ""


def test_a_run_directory_stands_for_its_model(original, saved, tmp_path):
    """``runs/kjv`` and ``runs/kjv/model`` are one; what else the run has does not matter."""
    run = tmp_path / "run"
    shutil.copytree(saved, run / "model")
    (run / "metrics.jsonl").write_text("{}")
    assert torch.equal(logits(ScoreLM.from_pretrained(run)), logits(original))
    (run / "model" / "model.safetensors").unlink()
    assert str(run / "model") in refused(run, "model.safetensors")


def test_saving_over_an_older_model_replaces_it(original, tokenizer, tmp_path):
    make(tokenizer, seed=1, schedule=make_schedule("log", 16, 50)).save_pretrained(tmp_path)
    original.save_pretrained(tmp_path)
    again = ScoreLM.from_pretrained(tmp_path)
    assert torch.equal(logits(original), logits(again)) and again.schedule == original.schedule


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(broken, name):
    (broken / name).unlink()
    refused(broken, name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "half", "directory", "zeros", "text"])
def test_a_damaged_file_is_named(broken, name, damage):
    file = broken / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "directory":
        file.mkdir()
    else:
        gen = torch.Generator().manual_seed(0)
        noise = bytes(torch.randint(256, (5000,), generator=gen).tolist())
        contents = {
            "empty": b"",
            "garbage": noise,
            "half": whole[: len(whole) // 2],
            "zeros": bytes(999),
            "text": b"hello",
        }
        file.write_bytes(contents[damage])
    refused(broken, name)


@pytest.mark.parametrize("keep", [4, 8, 50, -1])
def test_truncated_weights_are_refused(broken, keep):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(broken, "model.safetensors")


def test_a_header_that_lies_about_its_length_is_refused(broken):
    file = broken / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    refused(broken, "model.safetensors")


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "transposed", "scalar", "renamed"])
def test_weights_that_do_not_fit_are_refused(broken, damage):
    file = broken / "model.safetensors"
    weights = load_file(file)
    name = "trunk.blocks.1.feed_forward.up.weight"
    match damage:
        case "missing":
            del weights[name]
        case "extra":
            weights["trunk.blocks.2.extra"] = torch.zeros(3)
            name = "trunk.blocks.2.extra"
        case "shape":
            weights[name] = torch.zeros(3, 3)
        case "transposed":
            weights[name] = weights[name].T.contiguous()
        case "scalar":
            weights[name] = torch.tensor(1.0)
        case "renamed":
            weights["trunk.x"] = weights.pop(name)
    save_file(weights, file)
    assert "model.safetensors" in refused(broken, name if damage != "renamed" else "trunk")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(broken, dtype):
    file = broken / "model.safetensors"
    weights = load_file(file)
    weights["token_in"] = weights["token_in"].to(dtype)
    save_file(weights, file)
    refused(broken, "model.safetensors")

"""A model directory: what is saved comes back, and nothing in a damaged or hostile one is believed or executed."""

import contextlib
import json
import pickle
import resource
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scorelm import ScoreLM, Tokenizer
from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError
from scorelm.model.directory import Provenance
from scorelm.model.layout import Layout
from scorelm.noise.schedule import Gumbel, make_schedule

LINES = ["in the beginning god created the heaven and the earth", "and god said let there be light 12"] * 5
CONFIG = ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=16)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(LINES, 50, byte_fallback=False)


def make(tokenizer, config=CONFIG, seed=0, schedule=None):
    torch.manual_seed(seed)
    schedule = schedule or Gumbel(0.7, 20.0, mu=0.9, beta=0.45)
    provenance = Provenance(data="four lines", steps=12, tokens=3456, heldout_loss=1.25)
    lm = ScoreLM(config, tokenizer, schedule, [0] * 4 + [1, 2, 3, 4, 5, 4, 3, 2, 1], provenance)
    for parameter in lm.denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return lm.eval()


@pytest.fixture(scope="module")
def lm(tokenizer):
    return make(tokenizer)


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    lm.save_pretrained(path)
    return path


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def logits(lm):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 16, generator=gen)
    sigma = torch.tensor([0, 0.5, 1, 2, 4, 8, 16, torch.inf]).expand(2, 8)
    place = torch.arange(8).expand(2, 8)
    with torch.no_grad():
        return lm.denoiser.predict(x, sigma, Layout.one_stream(place * 0 + 1, place, (place > 0).long())).logits_NV


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
        and "held-out loss 1.250" in card
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


def test_a_loaded_model_generates_the_same(lm, saved):
    again = ScoreLM.from_pretrained(str(saved))
    for options in ({"path": "uniform"}, {"path": "ramp:1", "solver": "ancestral"}, {"path": "blocks:1"}):
        assert lm.generate(["the"], n=2, steps=6, **options) == again.generate(["the"], n=2, steps=6, **options)
    filled = lm.infill("god ____ the light", n=2, steps=6, blank_tokens=2)
    assert filled == again.infill("god ____ the light", n=2, steps=6, blank_tokens=2)


def test_saving_again_writes_the_same_bytes(saved, tmp_path):
    ScoreLM.from_pretrained(saved).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.model", "README.md"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_a_run_directory_stands_for_its_model(lm, saved, tmp_path):
    """``runs/kjv`` and ``runs/kjv/model`` are one; what else the run has does not matter."""
    run = tmp_path / "run"
    shutil.copytree(saved, run / "model")
    (run / "metrics.jsonl").write_text("{}")
    assert torch.equal(logits(ScoreLM.from_pretrained(run)), logits(lm))
    (run / "model" / "model.safetensors").unlink()
    assert str(run / "model") in refused(run, "model.safetensors")


def test_saving_over_an_older_model_replaces_it(lm, tokenizer, tmp_path):
    make(tokenizer, seed=1, schedule=make_schedule("log", 16, 50)).save_pretrained(tmp_path)
    lm.save_pretrained(tmp_path)
    again = ScoreLM.from_pretrained(tmp_path)
    assert torch.equal(logits(lm), logits(again)) and again.schedule == lm.schedule


# --- damage -----------------------------------------------------------------------------------------------------------


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        ScoreLM.from_pretrained(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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


def edit(path, **changes):
    """Change values of config.json by their dotted names (with __ for the dot); a value of `del` removes one."""
    file = path / "config.json"
    values = json.loads(file.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        table = values
        for parent in parents:
            table = table[parent]
        table[last] = value
        if value is del_:
            del table[last]
    file.write_text(json.dumps(values))


del_ = object()
SCHEDULE = {"shape": "log", "sigma_min": 1.0, "sigma_max": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": del_},
        {"vocab_size": del_},
        {"lengths": del_},
        {"schedule": del_},
        {"surprise": 1},
        {"model__surprise": 1},
        {"provenance__surprise": 1},
        {"format": 2},
        {"format": "one"},
        {"model": None},
        {"model": []},
        {"model__dim": "wide"},
        {"model__dim": -32},
        {"model__dim": 32.5},
        {"model__heads": 3},
        {"model__heads": 0},
        {"model__layers": 0},
        {"model__embedding_dim": 1},
        {"model__noise_conditioning": "magic"},
        {"vocab_size": 0},
        {"vocab_size": "many"},
        {"vocab_size": 51},
        {"lengths": []},
        {"lengths": "abc"},
        {"lengths": [1.5] * 9},
        {"lengths": [-1] * 9},
        {"lengths": [0, 0, 0, 0, 10**400]},
        {"schedule": None},
        {"schedule": []},
        {"schedule": {}},
        {"schedule": SCHEDULE | {"shape": "exp"}},
        {"schedule": SCHEDULE | {"sigma_max": 0.5}},
        {"schedule": SCHEDULE | {"sigma_max": "2"}},
        {"schedule": SCHEDULE | {"sigma_max": 10**400}},
        {"schedule": SCHEDULE | {"sigma_max": float("nan")}},
        {"schedule": SCHEDULE | {"extra": 1.0}},
    ],
    ids=lambda changes: "-".join(f"{k}={str(v)[:20]}" for k, v in changes.items()),
)
def test_a_bad_config_is_refused(broken, changes):
    edit(broken, **changes)
    refused(broken, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"model"', "[" * 100_000, "{}{}", "\x00"])
def test_a_config_that_is_no_object_is_refused(broken, text):
    (broken / "config.json").write_text(text)
    refused(broken, "config.json")


def test_a_config_that_is_not_utf8_is_refused(broken):
    (broken / "config.json").write_bytes(b'{"format": "\xff\xfe"}')
    refused(broken, "config.json")


@contextlib.contextmanager
def soon(seconds=3):
    """Interrupt what takes for ever."""

    def interrupt(signum, frame):
        raise RuntimeError("still busy")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again and again: a destructor may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dim": 2**20},
        {"model__dim": 2**40},
        {"model__dim": 2**62},
        {"model__dim": 10**30},
        {"model__hidden": 2**40},
        {"model__hidden": 10**30},
        {"model__embedding_dim": 2**40},
        {"model__embedding_dim": 10**30},
        {"model__embedding_dim": 10**400},
        {"model__layers": 10**7},
        {"model__layers": 10**30},
        {"vocab_size": 9_999_999},
        {"vocab_size": 10**30},
    ],
    ids=lambda changes: "-".join(f"{k}={str(v)[:20]}" for k, v in changes.items()),
)
def test_huge_sizes_are_refused_before_anything_is_allocated(broken, changes):
    edit(broken, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with soon():
        refused(broken, "config.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_tokenizer_of_another_vocabulary_is_refused(broken):
    Tokenizer.train(LINES, 40, byte_fallback=False).save(broken / "tokenizer.model")
    assert "40" in refused(broken, "tokenizer.model")


def test_no_directory_is_no_model(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        ScoreLM.from_pretrained(tmp_path / "nowhere", local_files_only=True)
    refused(tmp_path, "config.json")


# --- nothing is executed ----------------------------------------------------------------------------------------------


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def payloads(marker):
    """The same payload as a pickle, as a torch file (zip) and as an old torch file."""
    import io

    found = {"pickle": pickle.dumps(Evil(marker))}
    for name, zipped in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save({"weight": Evil(marker)}, file, _use_new_zipfile_serialization=zipped)
        found[name] = file.getvalue()
    return found


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_the_planted_payload_works(tmp_path, kind):
    """What the next test relies on: unpickled, it does write the file."""
    import io

    marker = tmp_path / "executed"
    payload = payloads(marker)[kind]
    assert not marker.exists()
    if kind == "pickle":
        pickle.loads(payload).close()
    else:
        torch.load(io.BytesIO(payload), weights_only=False)["weight"].close()
    assert marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("config.json", False),
        ("model.safetensors", False),
        ("tokenizer.model", False),
        ("README.md", True),
        ("pytorch_model.bin", True),
        ("model.pt", True),
        ("model.bin", True),
        ("tokenizer.pkl", True),
        ("training_args.bin", True),
        ("model.safetensors.index.json", True),
    ],
)
def test_a_planted_pickle_is_never_executed(broken, tmp_path, name, loads, kind):
    marker = tmp_path / "executed"
    (broken / name).write_bytes(payloads(marker)[kind])
    if loads:
        ScoreLM.from_pretrained(broken)
    else:
        refused(broken, name)
    assert not marker.exists()

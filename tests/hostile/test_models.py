"""Hostile model directories, in the library and on the command line: loaded or refused, never believed or executed."""

import json
import os
import random
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scorelm import ScoreLM, Tokenizer
from scorelm.cli import main
from scorelm.cli.info import InfoVerb
from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError
from scorelm.noise.schedule import Gumbel

LINES = ["in the beginning god created the heaven and the earth", "and the earth was without form and void"] * 5
CONFIG = ModelConfig(dim=16, layers=1, heads=1, hidden=16, embedding_dim=8)
FILES = ("config.json", "model.safetensors", "tokenizer.model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = Tokenizer.train(LINES, 50, byte_fallback=False)
    ScoreLM(CONFIG, tokenizer, Gumbel(0.7, 20.0, mu=0.9, beta=0.45), [1] * 12).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bad(saved, tmp_path_factory):
    """A copy to damage, over and over."""
    return shutil.copytree(saved, tmp_path_factory.mktemp("bad") / "model")


def load(saved, bad, name, contents):
    """Load the model with one file replaced; None if it is refused as it should be."""
    shutil.copytree(saved, bad, dirs_exist_ok=True)
    (bad / name).write_bytes(contents)
    try:
        return ScoreLM.from_pretrained(bad)
    except InputError as error:
        message = str(error)
        assert type(error) is InputError and name in message and message.isprintable() and len(message) < 1000, message


def damaged(whole, seed):
    """A copy with bytes replaced, cut out or put in; of weights mostly in their header."""
    draw, contents = random.Random(seed), whole
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(min(len(contents), draw.choice([8, 2000, 10**9])) + 1)
        new = draw.choice(
            [b"", b"[", b"{", b"-1", b"1e999", b"NaN", b'"', b"null,", b"\xff" * 4, b"\0\0\xc0\x7f", whole[:60]]
        )
        contents = contents[:place] + new + contents[place + draw.choice([0, 1, 4, len(new), 10**9]) :]
    return contents


@given(name=st.sampled_from(FILES), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_damaged_model_generates_or_is_refused(saved, bad, name, seed):
    lm = load(saved, bad, name, damaged((saved / name).read_bytes(), seed))
    if lm is not None and lm.objective.name == "score":
        assert len(lm.generate(["the"], n=1, steps=2, length=lm.max_length)) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
PLACES = [
    ("lengths",), ("vocab_size",), ("format",), ("objective",), ("provenance",), ("provenance", "data"), ("surprise",),
    ("provenance", "steps"), ("provenance", "heldout_loss"), ("model",), ("model", "heads"), ("model", "a\nb\x1b"),
    ("schedule",), ("schedule", "shape"), ("schedule", "mu"), ("schedule", "beta"), ("schedule", "sigma_max"),
]  # fmt: skip


@given(place=st.sampled_from(PLACES), value=JSON)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_value_anywhere_in_the_config_is_taken_or_refused(saved, bad, place, value):
    config = json.loads((saved / "config.json").read_text())
    table = config
    for name in place[:-1]:
        table = table[name]
    table[place[-1]] = value
    lm = load(saved, bad, "config.json", json.dumps(config).encode())
    assert lm is None or lm.card().startswith("---")


def nested(depth):
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dim": 16', b'"dim": ' + b"9" * 5000),
        (b'"dim": 16', b'"dim": "' + b"x" * 10**6 + b'"'),
        (b'"dim": 16', b'"dim": ' + nested(100_000)),
        (b'"format": 1', b'"' + b"k" * 10**5 + b'": 1'),
        (b'"gumbel"', b'"' + b"x" * 10**6 + b'"'),
        (b'"lengths": [', b'"lengths": [' + b"0," * 100_000),
        (b'"lengths": [', b'"lengths": [' + b" " * (1 << 22)),
    ],
    ids=lambda part: repr(part[:20]),
)
def test_a_config_that_nests_or_counts_without_end_is_refused(saved, bad, old, new):
    whole = (saved / "config.json").read_bytes()
    assert old in whole and load(saved, bad, "config.json", whole.replace(old, new)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e300])
def test_weights_that_would_overflow_are_refused(saved, bad, value):
    weights = load_file(saved / "model.safetensors")
    weights["context.weight"] = torch.full_like(weights["context.weight"], value, dtype=torch.float64)
    save_file(weights, bad / "model.safetensors")
    assert load(saved, bad, "model.safetensors", (bad / "model.safetensors").read_bytes()) is None


def entry(shape, end=0, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "header",
    [
        nested(100_000),
        b'{"__metadata__":' + nested(50_000) + b"}",
        {"prior": entry([2**40], 2**42)},
        {"prior": entry([2**63, 2**63])},
        {"prior": entry([1] * 100_000 + [0])},
        {"prior": entry([0], 0, "a\nb")},
        {"a\nb\x1b": entry([0])},
        {"a" * 10**6: entry([0])},
        {f"{number}": entry([0]) for number in range(100_000)},
    ],
    ids=lambda header: repr(header)[:24],
)
def test_a_header_that_lies_or_has_no_end_is_refused(saved, bad, header):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    assert load(saved, bad, "model.safetensors", struct.pack("<Q", len(header)) + header) is None


def test_a_header_of_endless_spaces_is_refused(saved, bad):
    whole = (saved / "model.safetensors").read_bytes()
    size, spaces = int.from_bytes(whole[:8], "little"), 1 << 24
    padded = struct.pack("<Q", size + spaces) + whole[8 : 8 + size] + b" " * spaces + whole[8 + size :]
    assert load(saved, bad, "model.safetensors", padded) is None


@pytest.mark.parametrize("name", FILES)
def test_pipes_and_devices_are_refused_and_links_to_files_are_not(saved, tmp_path, name):
    for kind in ("pipe", "zero", "link"):
        path = shutil.copytree(saved, tmp_path / kind)
        (path / name).unlink()
        if kind == "pipe":
            os.mkfifo(path / name)
        else:
            (path / name).symlink_to("/dev/zero" if kind == "zero" else saved / name)
    for kind in ("pipe", "zero"):
        with pytest.raises(InputError, match=name):
            ScoreLM.from_pretrained(tmp_path / kind)
    assert isinstance(ScoreLM.from_pretrained(tmp_path / "link"), ScoreLM)


# --- what is opened, and what is said ---------------------------------------------------------------------------------


class Watch:
    """What Python's audit events tell while it is on; a hook cannot be taken away again."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, values):
        if self.on:
            self.seen.append((event, str(values[0]) if values else ""))

    def __call__(self, path):
        self.on = True
        try:
            ScoreLM.from_pretrained(path)
        finally:
            self.on = False
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture(scope="module")
def watch():
    return Watch()


def test_nothing_but_the_model_is_opened_and_nothing_is_unpickled(saved, tmp_path, watch):
    """The config names another file, and every other file of the directory is a pickle."""
    path = Path(shutil.copytree(saved, tmp_path / "model"))
    (tmp_path / "secret.txt").write_text("secret")
    config = (path / "config.json").read_text().replace('"data": ""', '"data": "../secret.txt"')
    assert "secret" in config
    (path / "config.json").write_text(config)
    for name in ("pytorch_model.bin", "tokenizer.pkl", "README.md", "config.pkl", "__init__.py"):
        torch.save({"weight": torch.zeros(1)}, path / name)
    watch(saved)  # which is harmless, and imports what it needs
    seen = watch(path)
    opened = [value for event, value in seen if event == "open"]
    assert any("config.json" in name for name in opened)
    assert {Path(name) for name in opened} <= {path / name for name in FILES}
    assert not {event for event, _ in seen} & {"pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen"}


def test_the_watch_would_see_a_pickle(saved, tmp_path, watch, monkeypatch):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    monkeypatch.setattr(ScoreLM, "from_pretrained", lambda path: torch.load(path, weights_only=False))
    seen = watch(tmp_path / "model.pt")
    assert "pickle.find_class" in {event for event, _ in seen} and ("open", str(tmp_path / "model.pt")) in seen


@pytest.fixture
def scorelm(monkeypatch, capsys):
    """Runs a command in this process, whose settings stay as they are: exit code, stdout and stderr."""
    monkeypatch.setattr("scorelm.cli.entry.prepare", lambda: None)

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(words)
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["info", "sample"])
def test_the_command_line_refuses_a_damaged_model_in_one_line_with_code_2(saved, tmp_path, scorelm, verb, name):
    contents = b"\xff\n" * 99 if verb == "info" else (saved / name).read_bytes()[:-7]
    (shutil.copytree(saved, tmp_path / "model") / name).write_bytes(contents)
    one_line(scorelm(verb, str(tmp_path / "model")))


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--out", "{out}", "--recipe", "{recipe}"],
        ["train", "--out", "{out}", "--lr", "inf"],
        ["sample", "x" * 5000 + "/y/z"],
        ["sample", "{model}", "--prompt", "\udcff"],
    ],
    ids=["deep recipe", "infinite rate", "long name", "no Unicode"],
)
def test_the_command_line_refuses_hostile_words_in_one_line_with_code_2(saved, tmp_path, scorelm, words):
    (tmp_path / "deep.toml").write_bytes(b"a" + b".a" * 5000 + b"=1")
    named = {"{out}": tmp_path / "out", "{recipe}": tmp_path / "deep.toml", "{model}": saved}
    one_line(scorelm(*(str(named.get(word, word)) for word in words)))


def one_line(said):
    code, stdout, stderr = said
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), said
    assert stderr.startswith("scorelm: ") and stderr[:-1].isprintable(), said


def test_memory_that_is_not_there_is_no_traceback(monkeypatch, scorelm, saved):
    monkeypatch.setattr(InfoVerb, "run", lambda self: torch.empty(2**62, dtype=torch.uint8))
    code, stdout, stderr = scorelm("info", str(saved))
    assert (code, stdout) == (1, "") and "not enough memory" in stderr and stderr.count("\n") == 1

"""What a model directory says is not believed, and nothing in it is executed."""

import contextlib
import io
import json
import pickle
import resource
import signal

import pytest
import torch

from scorelm import ScoreLM, Tokenizer
from scorelm.errors import InputError

from .saving import LINES, refused

# --- config.json ------------------------------------------------------------------------------------------------------


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
    found = {"pickle": pickle.dumps(Evil(marker))}
    for name, zipped in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save({"weight": Evil(marker)}, file, _use_new_zipfile_serialization=zipped)
        found[name] = file.getvalue()
    return found


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_the_planted_payload_works(tmp_path, kind):
    """What the next test relies on: unpickled, it does write the file."""
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

"""Data sets on the hub, read by `datasets` itself from `tests/hub.py`: splits, configurations, and what is refused."""

import json
from pathlib import Path

import datasets
import pytest

from scorelm.cli.entry import main
from scorelm.cli.texts import Texts, load_texts
from scorelm.config.text import TextOptions
from scorelm.errors import InputError
from scorelm.model.directory import Provenance
from scorelm.text.corpus import fingerprint_of, load_corpus
from scorelm.text.source import Reading

from ..hub import point_datasets_at, serving

NAME = "amos/verses"
CARD = b"""---
configs:
- config_name: long
  data_files:
  - {split: train, path: long/train.jsonl}
  - {split: test, path: long/test.jsonl}
- config_name: short
  data_files: short.jsonl
---
"""


def lines(what: str, count: int) -> list[str]:
    return [f"{what} line {number}" for number in range(count)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in texts).encode()


LONG, TEST, SHORT = lines("long", 40), lines("test", 20), lines("short", 10)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """One with a data set of two configurations, one of two splits, and one of a single file."""
    with serving() as hub:
        point_datasets_at(hub.endpoint, tmp_path, monkeypatch)
        files = {"long/train.jsonl": jsonl(LONG), "long/test.jsonl": jsonl(TEST), "short.jsonl": jsonl(SHORT)}
        hub.put_dataset(NAME, files | {"README.md": CARD})
        hub.put_dataset("amos/odd", {"train-0.jsonl": jsonl(LONG), "train-1.jsonl": b'{"other": 1}\n'})
        hub.put_dataset("amos/two", {"train.jsonl": jsonl(LONG), "test.jsonl": jsonl(TEST)})
        hub.put_dataset("amos/empty", {"train.jsonl": b""})
        hub.put_dataset("amos/blank", {"train.jsonl": b"\n"})
        yield hub


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        (NAME, {"hub_config": "long"}, LONG),
        (NAME, {"hub_config": "long", "hub_split": "test"}, TEST),
        (NAME, {"hub_config": "long", "hub_split": "train[:10%]+test"}, [*LONG[:4], *TEST]),
        (NAME, {"hub_config": "short"}, SHORT),
        ("amos/two", {}, LONG),
        ("amos/two", {"hub_split": "test"}, TEST),
    ],
)
def test_a_split_and_a_configuration_are_what_is_read(hub, name, how, expected):
    options = TextOptions(source=name, field="body", **how)
    corpus = load_corpus(name, Reading.of(options), holdout=0)
    assert (corpus.name, list(corpus.train["text"])) == (name, expected)


def test_splits_and_configurations_are_known_apart_and_each_by_itself(hub):
    readings = [Reading("body", None, None, *how) for how in ((None, "long"), ("test", "long"), (None, "short"))]
    prints = [fingerprint_of(NAME, reading) for reading in readings]
    assert len(set(prints)) == 3
    assert prints == [fingerprint_of(NAME, reading) for reading in readings]
    assert prints[0] == fingerprint_of(NAME, Reading("body", hub_split="train", hub_config="long"))
    hub.put_dataset("amos/two", {"train.jsonl": jsonl(SHORT)})
    assert list(load_corpus("amos/two", Reading("body"), holdout=0).train["text"]) == SHORT


BAD = {
    "no configuration": (NAME, {}, f"{NAME} has several configurations: give --hub-config with one of long, short"),
    "another one": (NAME, {"hub_config": "wide"}, f"{NAME} has no configuration wide: .* one of long, short"),
    "no such split": (
        NAME,
        {"hub_config": "long", "hub_split": "dev"},
        rf"{NAME} has no split dev: give --hub-split with one of train, test, or a part such as train\[:10%\]$",
    ),
    "no such split of a part": ("amos/two", {"hub_split": "train[:10"}, r"has no split train\[:10: give --hub-split"),
    "no such dataset": ("amos/none", {}, "amos/none is not a file or directory, and .* gave no such dataset"),
    "files that do not go together": ("amos/odd", {}, r"^cannot read amos/odd \(Couldn't cast\)$"),
    "an empty file": ("amos/empty", {}, "^amos/empty has no records to read$"),
    "a blank file": ("amos/blank", {}, "^amos/blank has no records to read$"),
    "an empty name": (NAME, {"hub_config": ""}, "--hub-split and --hub-config need a name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_the_hub_has_not_is_one_line_with_what_there_is(hub, kind, tmp_path, capsys):
    name, how, message = BAD[kind]
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(name, Reading("body", **how), holdout=0)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__ | (caught.value.__context__ is None)
    words = [word for option, value in how.items() for word in (f"--{option.replace('_', '-')}", value)]
    with pytest.raises(SystemExit) as ended:
        main(["tokenizer", "--data", name, "--field", "body", "--out", str(tmp_path / "out"), *words])
    assert (ended.value.code, str(caught.value) in capsys.readouterr().err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_not_to_be_asked_gives_what_it_gave_before(hub, monkeypatch):
    before = load_corpus(NAME, Reading("body", hub_config="short"), holdout=0)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert load_corpus(NAME, Reading("body", hub_config="short"), holdout=0).fingerprint == before.fingerprint
    with pytest.raises(InputError, match="Offline"):
        load_corpus("amos/two", Reading("body"), holdout=0)


@pytest.mark.parametrize("how", [{"hub_split": "train"}, {"hub_config": "long"}, {"hub_split": "a", "hub_config": "b"}])
@pytest.mark.parametrize("source", ["kjv", "{here}/a.txt", "{here}/none.txt"])
def test_a_text_that_is_not_on_the_hub_has_none(how, source, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    flags = " and ".join(f"--{option.replace('_', '-')}" for option in how)
    with pytest.raises(InputError, match=f"is no dataset of the Hugging Face hub: leave out {flags}$"):
        load_corpus(source.format(here=tmp_path), Reading(**how), holdout=0)


def test_a_model_is_measured_on_the_split_that_it_was_trained_on_or_another(hub, tmp_path):
    reading = Reading("body", hub_split="test", hub_config="long")
    corpus = load_corpus(NAME, reading, holdout=0.2)
    made = Provenance(
        data=NAME, field="body", hub_split="test", hub_config="long", holdout=0.2, fingerprint=corpus.fingerprint
    )
    for which in (Texts(), Texts(data=NAME), Texts(hub_split="test")):
        found = load_texts(made, which)
        assert (found.held_out, found.texts) == (True, list(corpus.heldout["text"]))
    assert load_texts(made, Texts(hub_split="train")).texts == LONG
    assert load_texts(made, Texts(data="amos/two")).texts == LONG
    (tmp_path / "a.jsonl").write_bytes(jsonl(SHORT))
    assert load_texts(made, Texts(data=str(tmp_path / "a.jsonl"))).texts == SHORT


@pytest.mark.thorough
def test_info_of_a_dataset_says_how_to_train_on_it(hub, capsys):
    words = ["info", NAME, "--field", "body", "--hub-config", "long", "--hub-split", "train[:50%]", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"{NAME}: about " in said
    assert f"--data {NAME} --field body --hub-split 'train[:50%]' --hub-config long --out" in said
    assert not Path("runs").exists()

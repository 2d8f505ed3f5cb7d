"""Training on a stream: what is read of it and in which order, exact resume, and what cannot be."""

import json
import shutil
from collections import Counter
from hashlib import sha256
from itertools import islice

import numpy as np
import pytest

from scorelm.cli.entry import main
from scorelm.cli.texts import Texts, load_texts
from scorelm.config.text import DataConfig
from scorelm.config.toml import load_recipe
from scorelm.errors import InputError
from scorelm.model.directory import read_manifest
from scorelm.parallel import Ranks
from scorelm.text import packing, source
from scorelm.text.corpus import load_corpus
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.text.source import Reading
from scorelm.text.streaming import Windowed, open_stream
from scorelm.text.tokenizer import load_tokenizer
from scorelm.training.data import prepare

from ..hub import point_datasets_at, serving

NAME, FILES = "amos/verses", 3
STREAM = {"source": NAME, "streaming": True, "holdout": 0.2}


@pytest.fixture
def hub(text, tmp_path, monkeypatch):
    """A hub with a data set of three files, of which 50 records are read at a time and packed into a few rows."""
    monkeypatch.setattr(source, "CHUNK", (50, 1 << 24))
    monkeypatch.setattr(packing, "_POSITIONS_AT_A_TIME", 2048)
    lines = text.read_text().splitlines()[:200]
    with serving() as hub:
        point_datasets_at(hub.endpoint, tmp_path / "home", monkeypatch)
        parts = [lines[:70], lines[70:150], lines[150:]]
        files = {f"train-{k}.jsonl": "".join(json.dumps({"text": x}) + "\n" for x in p) for k, p in enumerate(parts)}
        hub.put_dataset(NAME, {name: content.encode() for name, content in files.items()})
        yield hub


@pytest.fixture
def sides(hub):
    """What of the whole data set is trained on, and what is held out."""
    corpus = load_corpus(NAME, holdout=0.2)
    return list(corpus.train["text"]), list(corpus.heldout["text"])


@pytest.fixture
def data(hub, tmp_path):
    """What a run on the stream learns from."""
    (tmp_path / "run").mkdir()
    return prepare(DataConfig(**STREAM, vocab_size=300, max_length=32), tmp_path / "run", False, lambda line: None)


def digest(batch):
    return sha256(b"".join(batch[name].tobytes() for name in ("ids", "segment", "position"))).hexdigest()


def test_only_the_beginning_is_read_before_training(data, sides):
    train, heldout = sides
    documents = data.documents
    read = [data.tokenizer.decode(ids) for side in (documents.train, documents.heldout) for ids in side["ids"]]
    assert len(read) == 50 and len(documents.heldout) > 3
    assert {data.tokenizer.decode(ids) for ids in documents.heldout["ids"]} <= set(heldout)
    assert {data.tokenizer.decode(ids) for ids in documents.train["ids"]} <= set(train)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_has_every_text_that_is_not_held_out_once(data, sides, world):
    """Three ranks have a file each; two leave out each other's records."""
    orders = []
    for epoch in range(2):
        found = []
        for rank in range(world):
            windows = iter(Windowed(data.stream, 32, 0, rank, world))
            windows.set_state({"epoch": epoch, "rows": None, "chunk": 0, "at": 0})
            while windows.get_state()["epoch"] == epoch:
                found.append(data.tokenizer.decode(next(windows)["ids"]))
            found.pop()
        assert Counter(found) == Counter(sides[0])
        orders.append(found)
    assert orders[0] != orders[1] and orders[0] != sides[0]


def test_a_long_text_is_cut_into_windows_that_have_all_of_it(data):
    windows = iter(Windowed(data.stream, 5, 0, 0, 1))
    state, found = windows.get_state(), []
    while windows.get_state()["chunk"] == 0:
        found.append(next(windows)["ids"])
    found.pop()
    texts = [ids for ids in data.documents.train["ids"]]
    assert max(map(len, found)) == 5 and Counter(np.concatenate(found)) == Counter(np.concatenate(texts))
    windows.set_state(state)
    assert list(next(windows)["ids"]) == list(found[0])


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_rows_come_again_after_any_batch(data, world):
    """Each state goes through JSON, as in a checkpoint, and the batches go on beyond an epoch."""
    for rank in range(world):
        rows = data.stream.packed_rows(max_length=32, rows=4, seed=0, rank=rank, world=world)
        batches, states, expected = iter(rows), [], []
        for _ in range(90):
            states.append(json.dumps(batches.get_state()))
            expected.append(digest(next(batches)))
        assert len(set(expected)) == 90 and json.loads(states[-1])["chunk"]["stream"]["epoch"] > 0
        for begin in (0, 1, 20, 89):
            again = iter(rows)
            again.set_state(json.loads(states[begin]))
            assert [digest(batch) for batch in islice(again, min(20, 90 - begin))] == expected[begin : begin + 20]


def test_rows_have_the_width_that_was_asked_for_however_short_the_beginning_is(data, tools):
    """Else longer texts that come later would be cut into more pieces than was said."""
    recipe = tools.recipe(NAME, {"data": STREAM | {"max_length": 512}}, rows=4)
    (shard,) = data.shards(recipe, Ranks())
    assert next(shard.batches)["ids"].shape == (4, 512)


def test_two_ranks_have_the_rows_of_one(data, tools):
    recipe = tools.recipe(NAME, {"data": STREAM}, shards=2, rows=8)
    whole = [next(shard.batches)["ids"] for shard in data.shards(recipe, Ranks())]
    parts = [next(shard.batches)["ids"][shard.rows] for rank in (0, 1) for shard in data.shards(recipe, Ranks(rank, 2))]
    assert np.array_equal(np.concatenate(whole), np.concatenate(parts)) and len(np.concatenate(whole)) == 8


@pytest.mark.thorough
@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_that_is_resumed_after_any_step_is_the_run_that_was_not_stopped(hub, tools, tmp_path, shards):
    recipe = tools.recipe(NAME, {"data": STREAM, "model": {"layers": 1}}, steps=8, save_every=1, keep=9, shards=shards)
    tools.train(recipe, tmp_path / "whole")
    for step in (1, 4, 7):
        part = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", part)
        shutil.rmtree(part / "model")
        for later in range(step + 1, 9):
            shutil.rmtree(part / "checkpoints" / f"step-{later:08d}")
        tools.train(recipe, part, resume=True)
        tools.assert_same(tmp_path / "whole", part)
        assert load_recipe(str(part / "recipe.toml")).data == recipe.data


@pytest.mark.thorough
def test_a_run_says_steps_and_its_model_what_it_has_read(hub, sides, tools, tmp_path):
    recipe = tools.recipe(NAME, {"data": STREAM}, steps=6)
    said = "\n".join(tools.train(recipe, tmp_path / "run"))
    assert "a stream: this is its beginning" in said and "epoch" not in said
    assert [line["epoch"] for line in tools.log(tmp_path / "run")] == [None] * 6
    made = read_manifest(tmp_path / "run" / "model" / "config.json").provenance
    assert (made.data, made.streaming, made.holdout) == (NAME, True, 0.2)
    found = load_texts(made, Texts())
    assert found.held_out is True and 3 < len(found.texts) < 50 and set(found.texts) <= set(sides[1])
    hub.put_dataset(NAME, {"train.jsonl": b'{"text": "another"}\n' * 30})
    assert load_texts(made, Texts()).what.endswith("(as it was in training), none seen in training")
    with pytest.raises(InputError, match=f"{NAME} has changed since"):
        tools.train(tools.with_steps(recipe, 8), tmp_path / "run", resume=True)


@pytest.mark.thorough
def test_the_command_trains_on_a_stream_for_a_time_that_is_given(hub, tmp_path, capfd):
    def scorelm(*words):
        with pytest.raises(SystemExit) as ended:
            main(words)
        return ended.value.code, capfd.readouterr().err

    out = ("--out", str(tmp_path / "out"))
    words = ("train", "--data", NAME, "--streaming", "--device", "cpu", "--samples", "0", *out)
    message = "--streaming needs --steps or --minutes, since nobody knows how long the text is"
    assert scorelm(*words) == (2, f"scorelm: {message}\n")
    (tmp_path / "plain.toml").write_text(f'[data]\nsource = "{NAME}"\nstreaming = true\n')
    assert scorelm("train", "--recipe", str(tmp_path / "plain.toml"), *out)[0] == 2
    assert not list(tmp_path.glob("out/*"))
    code, said = scorelm(*words, "--steps", "2", "--model.dim", "32", "--rows", "4", "--vocab-size", "300")
    assert code == 0 and "the text is a stream, so dropout is 0" in said, said
    assert load_recipe(str(tmp_path / "out" / "recipe.toml")).data.streaming
    assert scorelm("train", *out, "--resume", "--steps", "3")[0] == 0
    code, said = scorelm("train", *out, "--resume", "--steps", "4", "--no-streaming")
    assert code == 2 and "--streaming can't change when a run is resumed" in said


def test_a_tokenizer_is_trained_on_the_beginning(hub, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["tokenizer", "--data", NAME, "--streaming", "--vocab-size", "characters", "--out", str(tmp_path / "out")])
    assert f"{NAME}: 50 examples" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "out" / "tokenizer.model").vocab_size > 4


BAD = {
    "a part": ({"hub_split": "train[:10%]"}, r"has no split train\[:10%\]: give --hub-split with one of train$"),
    "no such field": ({"field": "body"}, "it has no field 'body'; its fields are text"),
    "everything held out": ({"holdout": 0.999999}, "held out, so set holdout to 0"),
    "not on the hub": ({"source": "kjv"}, "kjv is no dataset of the Hugging Face hub: leave out --streaming"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_streamed_is_one_line(hub, tools, tmp_path, kind):
    how, message = BAD[kind]
    with pytest.raises(InputError, match=message) as caught:
        tools.train(tools.recipe(how.get("source", NAME), {"data": STREAM | how}, steps=2), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_hub_that_fails_while_it_is_read_is_one_line(hub, data):
    windows = iter(Windowed(data.stream, 32, 0, 0, 1))
    next(windows)
    hub.repositories.clear()
    with pytest.raises(InputError, match=rf"cannot read {NAME} \(") as caught:
        while True:
            next(windows)
    assert "\n" not in str(caught.value)


def test_a_part_without_text_and_records_that_hold_none_are_one_line(hub):
    hub.put_dataset(NAME, {"train.jsonl": b'{"text": "one"}\n{"text": " "}\n'})
    hub.put_dataset("amos/numbers", {"train.jsonl": b'{"text": 1}\n{"text": 2}\n'})
    made = SentencePieceTokenizer.train(["one", "two"], "characters")
    stream = open_stream(DataConfig(source=NAME, streaming=True, holdout=0), made)
    assert len(next(iter(Windowed(stream, 32, 0, 0, 2)))["ids"]) > 2
    with pytest.raises(InputError, match=f"part 2 of 2 of {NAME} has no text to train on"):
        next(iter(Windowed(stream, 32, 0, 1, 2)))
    with pytest.raises(InputError, match=r"cannot read amos/numbers \(field 'text' holds int64, not text\)"):
        load_corpus("amos/numbers", Reading(streaming=True), holdout=0)

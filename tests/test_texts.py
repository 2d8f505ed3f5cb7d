"""What is measured is said, and is called held out only where training never saw it."""

import os

import datasets
import pytest

from scorelm.cli.texts import Texts, load_texts
from scorelm.errors import InputError
from scorelm.model.directory import Provenance
from scorelm.text.corpus import load_corpus
from scorelm.text.source import Reading

LINES = [f"line {number} of the book" for number in range(100)]


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(LINES))
    return tmp_path / "book.txt"


def made_of(source, holdout=0.2, **reading):
    """What a model says that was trained on this text."""
    corpus = load_corpus(str(source), Reading(**reading), holdout=holdout)
    made = Provenance(data=str(source), holdout=holdout, fingerprint=corpus.fingerprint, **reading)
    return made, list(corpus.heldout["text"]), list(corpus.train["text"])


@pytest.mark.parametrize("how", ["by itself", "absolute", "relative", "moved", "compressed name"])
def test_held_out_text_is_known_wherever_it_stands(book, how):
    made, heldout, train = made_of("./book.txt")
    names = {"by itself": None, "absolute": str(book), "relative": "../" + book.parent.name + "/book.txt"}
    if how in ("moved", "compressed name"):
        names[how] = "elsewhere.txt" if how == "moved" else "elsewhere.md"
        book.rename(names[how])
    found = load_texts(made, Texts(data=names[how]))
    name = names[how] or "./book.txt"
    assert found.texts == heldout and found.held_out is True and list(found.training["text"]) == train
    assert found.what == f"{len(heldout)} held-out examples of {name}, none seen in training"


def test_without_held_out_text_nothing_is_called_held_out(book):
    made, _, train = made_of(book, holdout=0.0)
    found = load_texts(made, Texts())
    assert (found.texts, found.held_out, found.what) == (LINES, False, f"all 100 examples of {book}: trained on")
    assert list(found.training["text"]) == train == LINES
    with pytest.raises(
        InputError, match=r"book\.txt is what the model was trained on, and nothing of it was held out: "
    ):
        load_texts(made, Texts(holdout=0.02))


def test_a_share_that_training_saw_is_refused_and_a_smaller_one_is_not(book):
    made, heldout, _ = made_of(book, holdout=0.2)
    with pytest.raises(InputError, match=r"a share of 0\.2 of it was held out: --holdout can't be 0\.3"):
        load_texts(made, Texts(holdout=0.3))
    fewer = load_texts(made, Texts(holdout=0.1))
    assert fewer.held_out and 0 < len(fewer.texts) < len(heldout) and set(fewer.texts) < set(heldout)
    everything = load_texts(made, Texts(holdout=0, limit=7))
    assert (everything.texts, everything.held_out) == (LINES[:7], False)
    assert everything.what == f"the first 7 examples of {book}: {100 - len(heldout)} of all 100 trained on"


def test_text_that_has_changed_or_gone_is_measured_as_it_was_or_not_at_all(book, tmp_path_factory, monkeypatch):
    made, heldout, _ = made_of(book)
    book.write_text("\n".join(LINES[:50]))
    changed = load_texts(made, Texts())
    assert changed.texts == heldout and changed.what.startswith(
        f"{len(heldout)} held-out examples of {book} (as it was"
    )
    other = load_texts(made, Texts(data=str(book)))
    assert (other.texts, other.held_out, other.training) == (LINES[:50], None, None)
    assert other.what == f"50 examples of {book}, which is not what the model was trained on"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("empty"))
    with pytest.raises(InputError, match=r"the model was trained on .*book\.txt, which has changed since: give --data"):
        load_texts(made, Texts())
    os.unlink(book)
    with pytest.raises(InputError, match=r"the model was trained on .*book\.txt, which is not here: give --data"):
        load_texts(made, Texts())
    with pytest.raises(InputError, match="does not exist"):
        load_texts(made, Texts(data=str(book)))


def test_the_field_and_split_of_training_are_taken(tmp_path):
    (tmp_path / "a.csv").write_text("body;text\n" + "".join(f'"{line}\n\nmore of {line}";other\n' for line in LINES))
    made, heldout, _ = made_of("a.csv", field="body", split="paragraph")
    found = load_texts(made, Texts())
    assert found.texts == heldout and found.held_out
    other = load_texts(made, Texts(field="text"))
    assert other.texts == ["other"] * 100 and other.held_out is None


def test_a_model_that_does_not_say_what_it_was_trained_on(book):
    with pytest.raises(InputError, match="the model does not say what it was trained on: give --data"):
        load_texts(Provenance(), Texts())
    found = load_texts(Provenance(data=str(book)), Texts())
    assert found.held_out is None and found.what == f"100 examples of {book}"


def test_given_sentences():
    found = load_texts(Provenance(), Texts(text=("one", "two")))
    assert (found.texts, found.what, found.held_out) == (["one", "two"], "2 given texts", None)
    for option in ({"data": "kjv"}, {"csv_separator": ";"}, {"holdout": 0.0}, {"limit": 1}):
        flag = f"--{next(iter(option)).replace('_', '-')}"
        with pytest.raises(InputError, match=f"give either --text or {flag}, not both"):
            load_texts(Provenance(), Texts(text=("one",), **option))


def test_what_was_trained_on_is_the_same_whatever_is_measured(book):
    made, _, train = made_of(book, holdout=0.2)
    for share in (None, 0.1, 0.0):
        assert list(load_texts(made, Texts(holdout=share)).training["text"]) == train
    book.write_text("something else")
    assert list(load_texts(made, Texts(holdout=0.1)).training["text"]) == train


def test_shares_and_numbers_are_said_as_they_are(book):
    made, _, train = made_of(book, holdout=0.001)
    seen = "trained on" if len(train) == 100 else f"{len(train)} of all 100 trained on"
    assert load_texts(made, Texts(holdout=0, limit=1)).what == f"the first 1 example of {book}: {seen}"


def test_empty_names_are_not_taken_for_the_usual_ones(tmp_path):
    (tmp_path / "a.csv").write_text(",text\n0,hello\n1,world\n")
    made, _, _ = made_of("a.csv", holdout=0.0)
    assert load_texts(made, Texts(field="")).texts == ["0", "1"]
    for empty in ("data", "split", "csv_separator"):
        with pytest.raises(InputError):
            load_texts(made, Texts(**{empty: ""}))

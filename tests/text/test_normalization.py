"""Normalisation: what each step does, that it is done once, and that a model keeps it."""

import importlib.util
import pickle

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.evaluation.rows import cut
from scorelm.text.corpus import load_corpus, tokenise
from scorelm.text.normalization import WORDS, as_read, in_words, normalize, normalizing
from scorelm.text.sentencepiece import SentencePieceTokenizer

TOKENIZER = SentencePieceTokenizer.train(["the light of the world, one two three four and the sea"] * 4, 300)


@pytest.mark.parametrize(
    ("steps", "text", "becomes"),
    [
        ("lower", "The ÉCOLE", "the école"),
        ("nfc", "e\u0301 \ufb01", "é \ufb01"),
        ("nfkc", "e\u0301 \ufb01 ２", "é fi 2"),
        ("numbers", "12 d, 1,004.50 and 07", "twelve d, one thousand and four point five zero and zero seven"),
        ("numbers", "the 21st of 3cats", "the twenty-first of three cats"),
        ("numbers", "9" * 16, " ".join(["nine"] * 16)),
        ("lower,nfc", "H\u0331", "\u1e96"),
        ("numbers", "no. 5.", "no. five."),
        ("symbols", '"Don\'t," he said -- (well-known)!\nSo: it\'s.', "Don't he said well known\nSo it's"),
        ("symbols", "a_b  c @home", "a b  c home"),
        ("symbols", " (the", " the"),
        ("symbols", "हिन्दी। e\u0301, 日本", "हिन्दी e\u0301 日本"),
        ("symbols", "the \0 \t- sea\n-", "the sea\n"),
        ("lower,symbols,numbers,nfkc", "２ Kings: THE end.", "two kings the end"),
        ("", "As It Is 2.", "As It Is 2."),
    ],
)  # fmt: skip
def test_what_each_step_does(steps, text, becomes):
    assert normalize(text, [name for name in steps.split(",") if name]) == becomes


@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aA1. ,-'ℌİ")),
    st.sets(st.sampled_from(list(WORDS))),
)
@settings(deadline=None, max_examples=300)
def test_once_is_enough_and_the_order_of_the_names_does_not_matter(text, steps):
    done = normalize(text, list(steps))
    assert normalize(done, list(steps)) == done == normalize(text, sorted(steps))


def test_a_tokenizer_reads_what_is_given_in_any_way_alike():
    ours = normalizing(TOKENIZER, ("numbers", "lower", "symbols"))
    assert ours.encode("The LIGHT, 12") == TOKENIZER.encode("the light twelve")
    assert ours.encode_inside(" The") == TOKENIZER.encode_inside(" the")
    assert ours.encode_document("The") == TOKENIZER.encode_document("the")
    assert as_read("The LIGHT", ours) == "the light" and as_read("The LIGHT", TOKENIZER) == "The LIGHT"
    assert ours.to_bytes() != TOKENIZER.to_bytes() and pickle.loads(pickle.dumps(ours)).to_bytes() == ours.to_bytes()
    assert normalizing(TOKENIZER, ()) is TOKENIZER
    assert (ours.special, ours.vocab_size, ours.file_name) == (TOKENIZER.special, 300, "tokenizer.model")


def test_training_counts_what_is_lost_of_the_text_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "lines.txt").write_text("The LIGHT.\nthe sea\n")
    corpus = load_corpus(str(tmp_path / "lines.txt"), holdout=0)
    documents = tokenise(corpus, normalizing(TOKENIZER, ("lower", "symbols")), max_length=64)
    assert documents.notes == () and documents.fingerprint != tokenise(corpus, TOKENIZER, max_length=64).fingerprint
    assert documents.train["ids"][0] == TOKENIZER.encode_document("the light")


def test_characters_are_those_of_the_text_as_it_is_read():
    rows = cut(["The LIGHT."], normalizing(TOKENIZER, ("lower", "symbols")), 64)
    assert (rows.characters, rows.unknown) == ([9], [0])
    assert in_words(("lower", "nfkc")) == "in Unicode's form NFKC, in lower case"


def test_numbers_need_a_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("scorelm.text.normalization.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--normalize numbers needs the package num2words: pip install"):
        normalizing(TOKENIZER, ("numbers",))

"""Corpora: every kind of file, a stable split, fingerprints, the cache, and one clear line for each bad input."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scorelm.errors import InputError
from scorelm.text.corpus import Corpus, length_histogram, load_corpus, tokenise
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer

WORDS = ["light", "darkness", "heaven", "earth", "water"]
LINES = [f"line {number} of {WORDS[number % 5]}" for number in range(60)]
TOKENIZER = Tokenizer.train(LINES, 300)
BOS, EOS = TOKENIZER.special.bos, TOKENIZER.special.eos


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def written(path, lines=LINES, field="text"):
    """Write lines to a file of the kind that its name says."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, field: line}) + "\n" for line in lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{field: line} for line in lines]))
    elif path.suffix == ".csv":
        path.write_text(f"id,{field}\n" + "".join(f'1,"{line}"\n' for line in lines))
    else:
        pq.write_table(pa.table({field: pa.array(lines, pa.large_string())}), path)
    return str(path)


def texts(corpus):
    return sorted([*corpus.train["text"], *corpus.heldout["text"]])


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_each_kind_of_file_gives_its_lines_in_order(tmp_path, kind):
    corpus = load_corpus(written(tmp_path / f"tales.{kind}"), holdout=0)
    assert list(corpus.train["text"]) == LINES
    assert corpus.train.column_names == corpus.heldout.column_names == ["text"]
    assert (corpus.name, len(corpus.heldout)) == ("tales", 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_directory_reads_its_files_in_order_and_other_files_not_at_all(tmp_path):
    for position, kind in enumerate(["txt", "txt", "parquet", "csv", "jsonl"]):
        written(tmp_path / f"{position}.{kind}", [f"{kind} {position}"])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "9.txt").write_text("\n\n")
    corpus = load_corpus(str(tmp_path), holdout=0)
    assert list(corpus.train["text"]) == ["txt 0", "txt 1", "parquet 2", "csv 3", "jsonl 4"]


def test_a_line_ends_at_a_line_feed_alone_and_blank_lines_are_dropped(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_bytes("\ufeffone\u2028still one\r\n\n  \t\r\ntwo\x0cstill\rtwo\n  three \nNA".encode())
    corpus = load_corpus(str(path), holdout=0)
    assert list(corpus.train["text"]) == ["one\u2028still one", "two\x0cstill\rtwo", "  three ", "NA"]


def test_missing_values_are_blank_and_words_that_pandas_takes_for_missing_are_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n')
    assert list(load_corpus(str(path), holdout=0).train["text"]) == ["one"]
    assert list(load_corpus(written(tmp_path / "a.csv", ["NA", "null", "one"]), holdout=0).train["text"]) == [
        "NA",
        "null",
        "one",
    ]


def test_another_field(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.jsonl", field="body"), field="body", holdout=0)
    assert list(corpus.train["text"]) == LINES


def test_embedded_corpus_and_its_split(kjv):
    train, heldout = kjv.train[:]["text"], kjv.heldout[:]["text"]
    assert len(train) + len(heldout) == 31_102
    assert kjv.name == "kjv"
    assert train[0] == "In the beginning God created the heaven and the earth."
    assert 0.015 < len(heldout) / 31_102 < 0.025
    assert not set(train) & set(heldout)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    for kind in ("txt", "csv"):
        bad("cannot (write|read) .*Not a directory", written(tmp_path / f"a.{kind}"))


def test_split_depends_on_the_text_alone(tmp_path):
    whole = load_corpus(written(tmp_path / "a.txt"), holdout=0.3)
    moved = load_corpus(written(tmp_path / "b.jsonl", [*LINES[::-1], "more", *LINES]), holdout=0.3)
    assert set(whole.heldout["text"]) <= set(moved.heldout["text"])
    assert not set(moved.heldout["text"]) & set(moved.train["text"])
    assert texts(whole) == sorted(LINES)
    assert list(whole.heldout["text"])[:3] == ["line 1 of darkness", "line 2 of heaven", "line 5 of light"]


def test_fingerprint_follows_content_and_order(tmp_path):
    first = load_corpus(written(tmp_path / "a.txt")).fingerprint
    assert load_corpus(written(tmp_path / "b.txt")).fingerprint == first
    assert load_corpus(written(tmp_path / "a.txt", LINES[::-1])).fingerprint != first
    assert load_corpus(written(tmp_path / "a.txt", [*LINES[:-1], "line 59 of Water"])).fingerprint != first


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_changed_file_is_read_again(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    load_corpus(written(path))
    assert texts(load_corpus(written(path, ["x" * 16, *LINES[1:]]))) == sorted(["x" * 16, *LINES[1:]])


def bad(message, source, **options):
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(str(source), **options)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or not caught.value.__context__)


def test_missing_and_unknown_files(tmp_path):
    bad(r"none\.txt does not exist", tmp_path / "none.txt")
    bad("does not exist", tmp_path / "none")
    bad(r"none\.csv does not exist", "none.csv")
    bad(r"holds no \.txt", tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    bad(r"its name ends in \.pdf, and \.txt", tmp_path / "a.pdf")


@pytest.mark.parametrize("name", ["empty.txt", "empty.csv", "empty.jsonl"])
def test_nothing_but_blank_lines(tmp_path, name):
    (tmp_path / name).write_text("\n  \n\r\n")
    bad("is empty", tmp_path / name)


@pytest.mark.parametrize("before", [7, (1 << 20) - 1, 1 << 20])
def test_not_utf8_names_the_byte(tmp_path, before):
    (tmp_path / "latin.txt").write_bytes(b"a" * before + "é".encode("latin-1") + b"b\n")
    bad(rf"latin\.txt is not UTF-8 \(byte offset {before}\)", tmp_path / "latin.txt")


def test_cut_utf8_names_the_byte(tmp_path):
    (tmp_path / "cut.jsonl").write_bytes(b"abc" + "é".encode()[:1])
    bad(r"cut\.jsonl is not UTF-8 \(byte offset 3\)", tmp_path / "cut.jsonl")


def test_missing_field_lists_the_fields(tmp_path):
    bad("has no field 'text'; its fields are id, body", written(tmp_path / "a.csv", field="body"))
    bad("field 'id' of .* holds int, not text", written(tmp_path / "a.jsonl"), field="id")


def test_unparsable_files(tmp_path):
    bad(r"cannot read .*header\.csv as csv .*no data", written(tmp_path / "header.csv", []))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    bad(r"cannot read .*a\.jsonl as json", tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("not parquet")
    bad(r"cannot read .*a\.parquet as parquet", tmp_path / "a.parquet")


def test_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    bad("nobody/none is not a file or directory, and the Hugging Face hub gave no such dataset", "nobody/none")


def test_hub_name_is_loaded_by_name(monkeypatch):
    rows = datasets.Dataset.from_dict({"body": LINES})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if name == "some/set" else None)
    corpus = load_corpus("some/set", field="body", holdout=0)
    assert (corpus.name, list(corpus.train["text"])) == ("some/set", LINES)


@pytest.mark.parametrize("holdout", [-0.1, 1.0, 2.0])
def test_holdout_out_of_range(holdout):
    bad("holdout must be at least 0 and below 1", "kjv", holdout=holdout)


def test_everything_held_out(tmp_path):
    bad(
        "leaves nothing to train on: the only example is held out",
        written(tmp_path / "a.txt", ["line 2 of heaven"]),
        holdout=0.5,
    )


def test_tokenise_keeps_whole_documents(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.txt"), holdout=0.2)
    tokens = tokenise(corpus, TOKENIZER, max_length=16)
    assert tokens.train.column_names == tokens.heldout.column_names == ["ids"]
    assert (len(tokens.train), len(tokens.heldout)) == (len(corpus.train), len(corpus.heldout))
    for side, original in ((tokens.train, corpus.train), (tokens.heldout, corpus.heldout)):
        assert list(side["ids"]) == [TOKENIZER.encode_document(text) for text in original["text"]]
    assert tokens.fingerprint != corpus.fingerprint


def test_tokenise_of_no_held_out_text_has_the_column(tmp_path):
    tokens = tokenise(load_corpus(written(tmp_path / "a.txt"), holdout=0), TOKENIZER, max_length=16)
    assert tokens.heldout.column_names == ["ids"] and len(tokens.heldout) == 0


def test_tokenise_with_two_processes(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.txt"), holdout=0)
    tokens = tokenise(corpus, TOKENIZER, max_length=16, processes=2)
    assert list(tokens.train["ids"]) == [TOKENIZER.encode_document(text) for text in LINES]


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_tokenise_reads_its_cache_and_knows_tokenizers_apart(tmp_path, monkeypatch, kind, cache):
    path = written(tmp_path / f"a.{kind}")
    corpus = load_corpus(path, holdout=0)
    first = tokenise(corpus, TOKENIZER, max_length=16)
    assert first.train.cache_files[0]["filename"].startswith(str(cache))
    other = tokenise(corpus, Tokenizer.train(LINES, 310), max_length=16)
    assert other.fingerprint != first.fingerprint
    assert list(other.train["ids"]) != list(first.train["ids"])

    def forbidden(self, text):
        raise AssertionError("tokenised a second time")

    monkeypatch.setattr(Tokenizer, "encode_document", forbidden)
    again = tokenise(load_corpus(path, holdout=0), Tokenizer.from_bytes(TOKENIZER.to_bytes()), max_length=16)
    assert list(again.train["ids"]) == list(first.train["ids"])
    assert again.fingerprint == first.fingerprint


def test_every_line_too_long(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.txt"), holdout=0)
    shortest = min(len(TOKENIZER.encode_document(line)) for line in LINES)
    with pytest.raises(InputError, match=rf"every line of a is longer than max length 4.*--max-length {shortest} or"):
        tokenise(corpus, TOKENIZER, max_length=4)
    assert len(tokenise(corpus, TOKENIZER, max_length=shortest).train) == len(LINES)


def test_length_histogram_counts_long_documents_at_the_maximum():
    ids = [[BOS, EOS], [BOS, 7, EOS], [BOS, 7, EOS], [BOS, *[7] * 20, EOS]]
    counts = length_histogram(datasets.Dataset.from_dict({"ids": ids}), 5)
    assert counts.dtype == np.int64
    assert counts.tolist() == [0, 0, 1, 2, 0, 1]


def test_corpus_is_frozen(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.txt"))
    assert isinstance(corpus, Corpus)
    with pytest.raises(AttributeError):
        corpus.name = "b"

"""Corpora: every kind of file, a stable split, fingerprints, the cache, and one clear line for each bad input."""

import bz2
import gzip
import json
import lzma
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scorelm.errors import InputError
from scorelm.text.corpus import Corpus, find_corpus, fingerprint_of, length_histogram, load_corpus, tokenise
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer
from scorelm.text.sides import new_folder
from scorelm.text.source import AS_IT_IS, Reading

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
    if path.suffix in (".txt", ".md"):
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


def test_directory_is_read_in_order_with_all_below_it_and_says_what_it_leaves_out(tmp_path):
    for position, kind in enumerate(["txt", "txt", "parquet", "csv", "jsonl", "md"]):
        written(tmp_path / f"{position}.{kind}", [f"{kind} {position}"])
    (tmp_path / "9.txt").write_text("\n\n")
    for folder in ("below/deeper", ".git"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(f"in {folder}")
    (tmp_path / "below" / "up").symlink_to(tmp_path)
    for name in ("picture.png", ".hidden.txt", "below/table.parquet.gz"):
        (tmp_path / name).write_text("no text")
    corpus = load_corpus(str(tmp_path), holdout=0)
    assert list(corpus.train["text"]) == [
        "txt 0", "txt 1", "parquet 2", "csv 3", "jsonl 4", "md 5", "in below/deeper",
    ]  # fmt: skip
    assert corpus.notes[1] == (
        "left out: .git/, .hidden.txt (hidden); picture.png, below/table.parquet.gz (no text format); "
        "below/up/ (a link); 9.txt (blank)"
    )


OPENERS = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": lambda path, mode: pa.output_stream(path)}


@pytest.mark.parametrize("ending", OPENERS)
def test_compressed_files_are_the_same_corpus(tmp_path, ending):
    plain = written(tmp_path / "a.txt")
    with OPENERS[ending](tmp_path / f"b.txt.{ending}", "wb") as file:
        file.write((tmp_path / "a.txt").read_bytes())
    found = load_corpus(str(tmp_path / f"b.txt.{ending}"), holdout=0.3)
    assert texts(found) == sorted(LINES)
    assert found.fingerprint == load_corpus(plain, holdout=0.3).fingerprint
    (tmp_path / f"c.txt.{ending}").write_bytes((tmp_path / f"b.txt.{ending}").read_bytes()[:-9])
    bad(rf"cannot read .*c\.txt\.{ending}", tmp_path / f"c.txt.{ending}")


@pytest.mark.parametrize(("ending", "compress"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_nothing_behind_a_whole_compressed_stream_is_dropped(tmp_path, ending, compress):
    path, one, two = tmp_path / f"a.txt.{ending}", compress(b"one\n"), bytearray(compress(b"two\n" * 50))
    path.write_bytes(one + two)
    assert list(load_corpus(str(path), holdout=0).train["text"]) == ["one", *["two"] * 50]
    two[len(two) // 2] ^= 255
    for behind in (two, two[:20], b"two\n", gzip.compress(b"two\n")):
        path.write_bytes(one + behind)
        bad(rf"cannot read .*a\.txt\.{ending}", path)


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_without_its_mark_is_recognised(tmp_path, coding):
    (tmp_path / "a.txt").write_bytes("hello\nworld\n".encode(coding))
    bad(r"a\.txt is not UTF-8 but looks like UTF-16: convert it", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"a\0b\n\0\0c\n")
    assert list(load_corpus(str(tmp_path / "a.txt"), holdout=0).train["text"]) == ["a\0b", "\0\0c"]


def test_a_source_is_called_by_its_name_without_the_ending(tmp_path, monkeypatch):
    names = ["my.book.v2.txt.gz", ".hidden.txt", "new\nline.txt", os.fsdecode(b"\xff.txt")]
    for name in names:
        with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wb") as file:
            file.write(b"hello\n")
    said = [load_corpus(str(tmp_path / name), holdout=0).notes[0].partition(": 1 ex")[0] for name in names]
    assert said == ["my.book.v2", ".hidden", "new\\nline", "\\udcff"]
    (tmp_path / "some.files").mkdir()
    (tmp_path / "some.files" / "a.txt").write_text("hello\n")
    monkeypatch.chdir(tmp_path / "some.files")
    assert {load_corpus(name, holdout=0).name for name in (".", "../some.files", os.getcwd())} == {"some.files"}
    bad("the text has no name: give a file", "")


def test_blank_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("\n")
    written(tmp_path / "y.txt")
    assert load_corpus(str(tmp_path), holdout=0).notes[1] == "left out: a/x.txt, b/x.txt (blank)"


def test_a_line_ends_at_a_line_feed_alone_and_blank_lines_are_dropped(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_bytes("\ufeffone\u2028still one\r\n\n  \t\r\ntwo\x0cstill\rtwo\n  three \nNA".encode())
    corpus = load_corpus(str(path), holdout=0)
    assert list(corpus.train["text"]) == ["one\u2028still one", "two\x0cstill\rtwo", "  three ", "NA"]


def test_missing_values_are_blank_and_words_that_pandas_takes_for_missing_are_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n')
    corpus = load_corpus(str(path), holdout=0)
    assert list(corpus.train["text"]) == ["one"]
    assert corpus.notes == ("a: 1 example, 1 without 'text', 1 empty, 0 duplicates; the fields are text",)
    assert list(load_corpus(written(tmp_path / "a.csv", ["NA", "null", "one"]), holdout=0).train["text"]) == [
        "NA",
        "null",
        "one",
    ]


def test_another_field(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.jsonl", field="body"), Reading("body"), holdout=0)
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
    assert list(whole.heldout["text"])[:3] == ["line 3 of earth", "line 5 of light", "line 11 of darkness"]


def test_twins_that_differ_by_case_or_white_space_are_on_one_side(tmp_path):
    twins = [twin for line in LINES for twin in (line, f"{line} ", line.upper(), f"\t{line.replace(' ', '  ')}\u3000")]
    corpus = load_corpus(written(tmp_path / "a.jsonl", twins), holdout=0.3)
    assert texts(corpus) == sorted(twins) and len(corpus.heldout) > 20
    plain = [{" ".join(text.lower().split()) for text in side["text"]} for side in (corpus.train, corpus.heldout)]
    assert not plain[0] & plain[1]
    assert corpus.notes == (f"a: {4 * len(LINES)} examples, 0 without 'text', 0 empty, {3 * len(LINES)} duplicates",)


def test_fingerprint_follows_content_and_order(tmp_path):
    first = load_corpus(written(tmp_path / "a.txt")).fingerprint
    assert load_corpus(written(tmp_path / "b.txt")).fingerprint == first
    assert load_corpus(written(tmp_path / "a.txt", LINES[::-1])).fingerprint != first
    assert load_corpus(written(tmp_path / "a.txt", [*LINES[:-1], "line 59 of Water"])).fingerprint != first


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_changed_file_is_read_again_though_its_time_and_size_are_as_before(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    load_corpus(written(path))
    before, changed = path.stat(), ["x" * 15, *LINES[1:]]
    written(path, changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kind == "parquet" or path.stat().st_size == before.st_size
    assert texts(load_corpus(str(path))) == sorted(changed)


def test_a_corpus_is_found_again_by_its_fingerprint(tmp_path):
    path = written(tmp_path / "a.txt")
    corpus = load_corpus(path, holdout=0.3)
    assert fingerprint_of(path, AS_IT_IS) == corpus.fingerprint != fingerprint_of(path, Reading(split="paragraph"))
    (tmp_path / "a.txt").unlink()
    found = find_corpus("a", corpus.fingerprint, 0.3)
    assert list(found.heldout["text"]) == list(corpus.heldout["text"])
    assert find_corpus("a", corpus.fingerprint, 0.2) is None


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
    (tmp_path / "nothing.jsonl").write_text("{}\n")
    bad("nothing has no field 'text'; its fields are none at all$", tmp_path / "nothing.jsonl")
    bad("field 'id' of .* holds int, not text", written(tmp_path / "a.jsonl"), reading=Reading("id"))


def test_a_source_that_mostly_lacks_the_field_is_refused_and_names_its_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"Text": "two"}\n{"body": "three"}\n')
    bad("most records of a have no 'text'; 2 of 3, and its fields are text, Text, body", path)
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"body": "three"}\n')
    note = "a: 2 examples, 1 without 'text', 0 empty, 0 duplicates; the fields are text, body"
    assert load_corpus(str(path), holdout=0).notes == (note,)
    pq.write_table(pa.table({"text": [None, "one", None]}), tmp_path / "a.parquet")
    bad("most records of a have no 'text'; 2 of 3", tmp_path / "a.parquet")


def test_many_records_in_a_row_without_the_field_are_counted(tmp_path):
    pq.write_table(pa.table({"text": [None] * 1000 + ["one", "two"] * 600}), tmp_path / "a.parquet")
    corpus = load_corpus(str(tmp_path / "a.parquet"), holdout=0)
    assert list(corpus.train["text"]) == ["one", "two"] * 600 and "1,000 without 'text'" in corpus.notes[0]


def test_half_a_character_is_named_by_its_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "\\ud800 two"}\n')
    bad(r"field 'text' of record 2 holds half a character \(\\ud800\)", tmp_path / "a.jsonl")


def test_unparsable_files(tmp_path):
    bad(r"header\.csv is empty", written(tmp_path / "header.csv", []))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    bad(r"cannot read .*a\.jsonl as json", tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("not parquet")
    bad(r"cannot read .*a\.parquet as parquet", tmp_path / "a.parquet")


def test_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    bad("nobody/none is not a file or directory, and the Hugging Face hub gave no such dataset", "nobody/none")


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


def test_documents_that_are_longer_than_a_row_are_kept_and_counted(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.txt"), holdout=0)
    tokens = tokenise(corpus, TOKENIZER, max_length=4)
    assert list(tokens.train["ids"]) == [TOKENIZER.encode_document(line) for line in LINES]
    assert tokens.notes == (
        "60 of 60 examples are longer than 4 tokens: each is cut into windows, all of which are read in every epoch",
    )
    assert tokenise(corpus, TOKENIZER, max_length=max(map(len, tokens.train["ids"]))).notes == ()


def test_what_does_not_round_trip_is_counted_before_training(tmp_path):
    strict = Tokenizer.train(LINES, 60, byte_fallback=False)
    corpus = load_corpus(written(tmp_path / "a.txt", [*LINES, "Ünknöwn\u2581"]), holdout=0)
    lost = "0.3% of characters (3 of 1,006) do not round-trip through this tokenizer: they are learned as it gives them"
    lost += " back"
    assert tokenise(corpus, strict, max_length=64).notes == (lost,)
    assert tokenise(corpus, TOKENIZER, max_length=64).notes == ()


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


@pytest.mark.parametrize("name", ["train.arrow", "heldout.arrow", "counts.json"])
@pytest.mark.parametrize("kept", [0, 10, -20, None])
def test_a_damaged_cache_is_written_anew(tmp_path, cache, name, kept):
    path = written(tmp_path / "a.txt")
    first = load_corpus(path, holdout=0.5)
    [file] = cache.glob(f"scorelm/*/{name}")
    whole = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(whole[:kept])
    again = load_corpus(path, holdout=0.5)
    assert (again.notes, texts(again)) == (first.notes, sorted(LINES)) and file.read_bytes() == whole


def test_a_side_of_the_cache_that_has_lost_its_end_is_written_anew(tmp_path, cache):
    path = written(tmp_path / "a.csv", LINES * 50)
    load_corpus(path, holdout=0.5)
    [file] = cache.glob("scorelm/*/train.arrow")
    with pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as reader:
        batches = list(reader)
    file.unlink()
    with pa.ipc.new_stream(str(file), batches[0].schema) as writer:
        writer.write_batch(batches[0])
    assert texts(load_corpus(path, holdout=0.5)) == sorted(LINES * 50) and len(batches) > 1


@pytest.mark.parametrize("kept", [0, 10, 1000, -8])
def test_damaged_tokens_in_the_cache_are_made_anew(tmp_path, cache, kept):
    corpus = load_corpus(written(tmp_path / "a.txt"), holdout=0.5)
    first = list(tokenise(corpus, TOKENIZER, max_length=64).train["ids"])
    for file in cache.glob("scorelm/*/cache-*.arrow"):
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[:kept])
    assert list(tokenise(corpus, TOKENIZER, max_length=64).train["ids"]) == first


def test_two_writers_of_one_folder_do_not_disturb_each_other(tmp_path):
    with new_folder(tmp_path / "a") as slow:
        (slow / "x").write_text("slow")
        with new_folder(tmp_path / "a") as fast:
            (fast / "x").write_text("fast")
        assert (slow / "x").read_text() == "slow"
    assert (tmp_path / "a" / "x").read_text() == "fast" and len(list(tmp_path.iterdir())) == 1

"""Columns of files are read byte for byte: what a writer has written comes back, and nothing is guessed."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.text.corpus import load_corpus
from scorelm.text.records import Counts, first_lines, read_line_arrays, read_lines, read_records
from scorelm.text.source import Reading

ODD = [
    "007",
    "1.10",
    "TRUE",
    "-0",
    "1e5",
    "NA",
    "",
    " x ",
    "a,b",
    'say "yes"',
    "two\nlines",
    "2020-01-01",
    "0x10",
    "ü\u2028",
]
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(path, field="text", separator=None):
    kind = {"jsonl": "json"}.get(path.suffix[1:], path.suffix[1:])
    return [text for batch in read_records(kind, path, field, separator, Counts()) for text in batch.to_pylist()]


def write(path, rows):
    """Write rows of `text` and an id with the writer that people use for such a file."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(rows)])
    elif path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps({"id": k, "text": row}) + "\n" for k, row in enumerate(rows)), encoding="utf-8"
        )
    else:
        pq.write_table(pa.table({"id": list(range(len(rows))), "text": pa.array(rows, pa.string())}), path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_what_was_written_comes_back(tmp_path, kind, rows):
    path = tmp_path / f"a.{kind}"
    write(path, rows)
    assert texts(path) == rows


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_of_numbers_dates_and_truth_stay_as_they_are(tmp_path, kind):
    write(tmp_path / f"a.{kind}", ODD)
    assert texts(tmp_path / f"a.{kind}") == ODD
    corpus = load_corpus(str(tmp_path / f"a.{kind}"), holdout=0)
    assert list(corpus.train["text"]) == [text for text in ODD if text]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(st.text(st.sampled_from("ab \n\r\t\u2028\u0085"), max_size=30))
def test_fast_and_slow_lines_are_the_same(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    slow = [line.removesuffix("\n").rstrip("\r") for line in read_lines(path)]
    assert [line for lines in read_line_arrays(path) for line in lines.to_pylist()] == slow


def test_lines_across_the_chunks_of_a_large_file(tmp_path):
    lines = [f"{k} " + "é" * (k * 7919 % 50_000) for k in range(600)]
    (tmp_path / "a.txt").write_bytes("\ufeff".encode() + "\n".join(lines).encode())
    assert [line for found in read_line_arrays(tmp_path / "a.txt") for line in found.to_pylist()] == lines


def refused(path, text, message, **how):
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(str(path), Reading(**how), holdout=0)
    assert "\n" not in str(caught.value)


def test_rows_of_another_width_are_refused_with_file_line_and_count(tmp_path):
    wide = r"a\.csv as csv \(line 3 has 3 fields and the header 2; rows like this: 1"
    refused(tmp_path / "a.csv", "id,text\n1,fine\n2,good morning, friend\n", wide)
    refused(tmp_path / "a.csv", "text,id\nfine,1\ngood morning, friend,2\n", wide)
    refused(tmp_path / "a.csv", '\nid,text\n\n1,"two\nlines"\n2\n3\n', r"line 6 has 1 fields .*rows like this: 2")
    refused(tmp_path / "a.csv", "id,text\n1,a\n \n", "line 3 has 1 fields")
    refused(tmp_path / "a.csv", 'id,text\n1,"open\n2,two\n', r"line 2: a quote is opened and not closed\)")
    refused(tmp_path / "a.csv", 'id,text\n1,"a"b\n', "line 2: ',' expected")
    refused(tmp_path / "a.csv", "text,text\na,b\n", "it has 2 columns 'text'")


@pytest.mark.parametrize(
    ("separator", "name"),
    [(",", "comma"), (";", "semicolon"), ("\t", "tab"), ("|", "'|'")],
    ids=["comma", "semi", "tab", "bar"],
)
def test_separators_are_found_or_given_and_said(tmp_path, separator, name):
    path = tmp_path / "a.csv"
    path.write_text(f"id{separator}text\n1{separator}good morning. Friend: hello\n", encoding="utf-8-sig")
    given = {"|": "|"}.get(separator)
    corpus = load_corpus(str(path), Reading(csv_separator=given), holdout=0)
    assert list(corpus.train["text"]) == ["good morning. Friend: hello"]
    assert corpus.notes == (f"a: 1 example, 0 without 'text', 0 empty, 0 duplicates; CSV separator: {name}",)


def test_tab_can_be_spelled_and_tsv_prefers_it(tmp_path):
    (tmp_path / "a.csv").write_text("text\nwith, comma\tand tab\n")
    refused(tmp_path / "a.csv", "text\nwith, comma\n", "line 2 has 2 fields and the header 1")
    assert texts(tmp_path / "a.csv", separator=Reading(csv_separator="tab").separator) == ["with, comma"]
    (tmp_path / "a.tsv").write_text("text\nwith, comma\n")
    assert list(load_corpus(str(tmp_path / "a.tsv"), holdout=0).train["text"]) == ["with, comma"]
    for separator in ("::", "", '"', "\n"):
        with pytest.raises(InputError, match="a CSV separator is one character, or 'tab'"):
            Reading(csv_separator=separator)


def test_parquet_dictionaries_and_nulls(tmp_path):
    column = pa.array(["one", None, "two", "one"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", None, "two", "one"]
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="field 'text' holds int64, not text"):
        load_corpus(str(tmp_path / "a.parquet"))


def test_columns_of_a_parquet_file_are_taken_by_their_whole_name(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"meta": [{"text": "wrong"}], "meta.text": ["right"]}), path)
    assert texts(path, "meta.text") == ["right"]
    pq.write_table(pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"]), path)
    with pytest.raises(InputError, match="it has 2 columns 'text'"):
        texts(path)


def test_a_record_that_has_the_field_twice_is_refused(tmp_path):
    refused(
        tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two", "text": "three"}\n', "line 2: an object has 'text' mo"
    )
    refused(tmp_path / "a.json", '[{"text": "two", "text": "three"}]', "an object has 'text' more than once")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1, "id": 2}')
    assert texts(tmp_path / "a.jsonl") == ["one"]


def test_json_that_is_neither_an_array_nor_lines_is_told_what_is_needed(tmp_path):
    need = "; every line must be an object, or the whole file an array of objects"
    refused(tmp_path / "a.json", json.dumps({"data": [{"text": "one"}]}, indent=1), f"line 1: .*{need}")
    refused(
        tmp_path / "a.jsonl", '{"text": "a"}, {"text": "b"}\n{"text": "c", "n": [1\n2]}\n', f"line 1: Extra data{need}"
    )
    refused(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{{"text": "b", "n": {"9" * 5000}}}\n', "line 2: Exceeds the limit")
    deep = "maximum recursion depth|Expecting value"  # which Python 3.14 says at the end of the line
    refused(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{{"n": {"[" * 50_000}', f"line 2: ({deep})")


def test_a_file_of_white_space_and_one_of_a_header_have_no_text(tmp_path):
    for text in ("\ufeff\n", "\u00a0\n\u3000\n", "id,text\n"):
        refused(tmp_path / "a.csv", text, r"a\.csv is empty: there is no text in it")


def test_fields_with_spaces_are_named_in_quotes(tmp_path):
    refused(tmp_path / "a.csv", "id, text,\n1, a,\n", "no field 'text'; its fields are id, ' text', ''")
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="most records of a have no 'text'; 2 of 2, and its fields are text"):
        load_corpus(str(tmp_path / "a.parquet"))


def test_what_a_file_looks_like_is_judged_by_its_first_megabyte(tmp_path):
    (tmp_path / "a.txt").write_text(("one " * 100_000 + "\n") * 10)
    assert list(map(len, first_lines(tmp_path / "a.txt"))) == [400_000, 400_000]

"""Statistics of a text: against closed forms, and against counting by hand on a small corpus."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scorelm.text.corpus import load_corpus, tokenise
from scorelm.text.normalization import normalizing
from scorelm.text.packing import packed_rows
from scorelm.text.profile import BEGINNING, Example, Repeated, measure
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.text.source import Reading
from scorelm.text.statistics import (
    PACKED,
    Bin,
    common,
    count_ids,
    count_repeats,
    entropy,
    histogram,
    measure_lengths,
    measure_packing,
    measure_texts,
    measure_vocabulary,
    widths_to_try,
)


def rows_of(lengths):
    """Documents of these lengths in tokens."""
    return [{"ids": list(range(4, 4 + length))} for length in lengths]


def test_lengths_from_1_to_100_have_the_quantiles_that_they_should() -> None:
    found = measure_lengths(np.random.default_rng(0).permutation(100) + 1)
    assert (found.min, found.median, found.p90, found.p99, found.max) == (1, 50, 90, 99, 100)
    assert (found.total, found.mean) == (5050, 50.5)
    expected = [Bin(0, 9, 9), *(Bin(low, low + 9, 10) for low in range(10, 90, 10)), Bin(90, 100, 11)]
    assert list(found.histogram) == expected


def test_one_length_is_one_bin() -> None:
    found = measure_lengths(np.array([67]))
    assert found.histogram == (Bin(67, 67, 1),) and found.median == found.p99 == found.mean == 67


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_every_length_is_in_one_bin_and_there_are_few(lengths: list[int]) -> None:
    found = histogram(np.array(lengths), sorted(lengths)[-max(1, len(lengths) // 50)])
    assert 1 <= len(found) <= 12
    assert [one.low for one in found[1:]] == [one.high + 1 for one in found[:-1]]
    for one in found:
        assert one.count == sum(one.low <= length <= one.high for length in lengths)
    assert sum(one.count for one in found) == len(lengths)
    assert len({one.high - one.low for one in found[:-1]}) <= 1


def test_equal_texts_and_those_that_differ_in_case_and_spaces_repeat() -> None:
    batches = [pa.array(["a b", "c", "A  b"]), pa.array(["a b", "\u00c9t\u00e9", "a b", "\u00e9T\u00c9 "])]
    characters, exact, near = measure_texts(batches)
    assert characters.tolist() == [3, 1, 4, 3, 3, 3, 4]
    assert (count_repeats(exact), count_repeats(near)) == (2, 4)
    assert common(exact, 3) == [(3, 0)] and common(near, 3) == [(4, 0), (2, 4)] and common(near, 1) == [(4, 0)]


def test_entropy_of_even_of_certain_and_of_halving_counts() -> None:
    assert entropy(np.full(8, 5)) == pytest.approx(np.log(8))
    assert entropy(np.array([0, 7, 0])) == entropy(np.zeros(3, np.int64)) == 0.0
    assert entropy(np.array([4, 2, 1, 1, 0])) == pytest.approx(1.75 * np.log(2))


@pytest.mark.parametrize(
    ("length", "width", "efficiency", "windows"),
    [(32, 64, 1.0, 0), (40, 64, 40 / 64, 0), (21, 64, 63 / 64, 0), (64, 64, 1.0, 0), (192, 64, 1.0, 3)],
)
def test_documents_of_one_length_fill_rows_as_arithmetic_says(length, width, efficiency, windows) -> None:
    lengths = np.full(300, length)
    found = measure_packing(rows_of(lengths), lengths, width, pad=2)
    assert found.efficiency == pytest.approx(efficiency, abs=1e-6)
    assert (found.width, found.longer, found.windows) == (width, 300 * bool(windows), 300 * windows)
    assert found.rows == np.ceil(300 * length / (width * efficiency) - 1e-6)


def test_packing_is_that_of_the_rows_that_training_reads() -> None:
    lengths = np.random.default_rng(1).integers(5, 120, 400)
    found = measure_packing(rows_of(lengths), lengths, 64, pad=2)
    epoch = packed_rows(rows_of(lengths), max_length=64, rows=8, pad=2, seed=5, epochs=1)
    rows = sum(int((batch["segment"] > 0).any(1).sum()) for batch in epoch)
    assert found.efficiency == pytest.approx(lengths.sum() / (64 * rows), abs=0.02)
    assert found.rows == pytest.approx(rows, rel=0.02) and found.longer == (lengths > 64).sum()
    assert found.windows == sum(len(range(0, length, 64)) for length in lengths if length > 64)


def test_widths_go_on_until_the_longest_example_fits() -> None:
    assert widths_to_try(64, 50) == [64, 128, 256, 512]
    assert widths_to_try(100, 513) == [64, 100, 128, 256, 512, 1024]
    assert widths_to_try(8192, 10**6) == [64, 128, 256, 512, 1024, 2048, 4096, 8192]


def test_a_vocabulary_is_used_unused_bytes_and_special() -> None:
    lines = ["the cat sat on the mat", "the dog sat on the log"]
    tokenizer = SentencePieceTokenizer.train(lines, 310)
    ids = [tokenizer.encode_document(text) for text in [*lines, "the \u2603"]]
    lengths, counts = count_ids([pa.array(ids[:2]), pa.array(ids[2:])], tokenizer.vocab_size)
    assert lengths.tolist() == list(map(len, ids))
    found, text = measure_vocabulary(counts, tokenizer, most=3), [t for row in ids for t in row[1:-1]]
    assert found.used == len(set(text)) and found.size == tokenizer.vocab_size
    assert found.used + found.unused + found.unused_bytes + 4 == found.size and found.unused_bytes == 256 - 3
    assert found.byte_share == pytest.approx(3 / len(text)) and found.unknown_share == 0
    assert len(found.unused_pieces) == 6 and not {*found.unused_pieces} & {*tokenizer.pieces(text)}
    expected = Counter(tokenizer.pieces(text)).most_common()
    assert [one.count for one in found.commonest] == [count for _, count in expected[:3]]
    assert found.commonest[0].piece == "\u2581the" and found.commonest[0].share == 5 / len(text)
    shares = np.array([count for _, count in expected]) / len(text)
    assert found.entropy_nats == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.entropy_bits == pytest.approx(found.entropy_nats / np.log(2))


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a file, reads it and makes tokens of it, in a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def made(name: str, content: str, tokenizer, max_length: int = 16, **how):
        (tmp_path / name).write_text(content, encoding="utf-8")
        corpus = load_corpus(str(tmp_path / name), Reading(), **how)
        documents = tokenise(corpus, tokenizer, max_length=max_length)
        return measure(corpus, documents, tokenizer, max_length, lambda share, doing: told.append(share)), corpus

    told: list[float] = []
    yield made
    assert told == sorted(told) and told[0] >= 0 and told[-1] < 1


def test_a_whole_text_is_counted_on_both_sides(load) -> None:
    lines = ["ab", "ab", "", "AB ", "b" * (BEGINNING + 50), *(f"{'a' * k}b" for k in range(3, 30)), "a\u2603b"]
    tokenizer = SentencePieceTokenizer.train(["abAB "], "characters")
    found, corpus = load("lines.txt", "\n".join(lines), tokenizer, holdout=0.3)
    kept = [line for line in lines if line.strip()]
    assert (found.examples, found.train, found.heldout) == (len(kept), len(corpus.train), len(corpus.heldout))
    assert 0 < found.heldout < found.train and (found.blank, found.records, found.fields) == (1, 0, ())
    assert (found.exact_duplicates, found.near_duplicates) == (1, 1)
    assert found.most_repeated == (Repeated(2, "ab"),)
    assert found.characters.total == sum(map(len, kept)) == found.tokens.total - 2 * len(kept)
    assert found.longest[0] == Example(BEGINNING + 50, BEGINNING + 52, "b" * BEGINNING)
    assert found.longest[1].text == "a" * 29 + "b" and len(found.longest) == 5
    assert found.lost_characters == 1 and found.characters_per_token == 1.0
    assert found.vocabulary.unknown_share == pytest.approx(1 / found.characters.total)
    assert found.train_tokens == found.packed_tokens == sum(map(len, corpus.train["text"])) + 2 * found.train
    assert [one.width for one in found.packing] == [16, 64, 128, 256, 512]
    assert found.packing[0].longer == sum(len(text) > 14 for text in corpus.train["text"])


def test_records_without_text_are_counted_and_a_text_is_measured_as_it_is_read(load) -> None:
    lines = [
        '{"text": "AB ab"}',
        '{"title": "x"}',
        '{"text": null}',
        '{"text": " "}',
        *[f'{{"text": "{"ab" * 100}"}}'] * 3,
    ]
    tokenizer = normalizing(SentencePieceTokenizer.train(["ab "], "characters"), ["symbols", "lower"])
    found, _ = load("records.jsonl", "\n".join(lines), tokenizer, holdout=0)
    assert (found.records, found.missing, found.blank, found.examples) == (7, 2, 1, 4)
    assert found.fields == ("text", "title") and found.heldout == 0
    assert found.lost_characters == 0 and found.characters_per_token == 1.0


@pytest.mark.thorough
def test_a_large_text_is_packed_in_part(load) -> None:
    tokenizer = SentencePieceTokenizer.train(["a"], "characters")
    count = 5 * PACKED // 102
    found, _ = load("large.txt", "\n".join(["a" * 100] * count), tokenizer, 128, holdout=0)
    assert found.train_tokens == 102 * count and PACKED * 0.9 < found.packed_tokens < PACKED * 1.3
    own = next(one for one in found.packing if one.width == 128)
    assert own.efficiency == pytest.approx(102 / 128) and own.rows == pytest.approx(count, abs=1)

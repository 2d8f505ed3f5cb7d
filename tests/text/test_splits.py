"""How a text becomes examples: nothing but the white space between examples is ever left out."""

import re
import time

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.text import splits
from scorelm.text.corpus import load_corpus
from scorelm.text.records import Counts
from scorelm.text.sides import TRAIN, Writer, normal_form, read_side
from scorelm.text.source import Reading
from scorelm.text.splits import SPLITS, looks_hard_wrapped, make_split, sentences

PROSE = (
    '  In the first year the river rose. It took\nthe bridge, the mill and "the house of Anne." Nobody\n'
    "  slept!\n \n\nThe second year was dry...  The third (so he said) was not?\n\n\n  A list:\n- one\n- two\n"
)
WRAPPED = [
    "Permission is hereby granted, free of charge, to any person obtaining a copy\n",
    "of this software and of the files that come with it, to deal in the software\n",
    "without restriction, including without limitation the rights to use and copy\n",
    "and the rest of the paragraph goes on in this way until it is finished here.\n",
] * 8  # fmt: skip


def examples(split, text):
    return [lead + own for lead, own in make_split(split)(text.splitlines(keepends=True))]


def test_lines_paragraphs_and_whole_files():
    assert examples("line", "one \r\n\n  two\n") == ["one ", "", "  two"]
    assert examples("paragraph", "one\n  two \n \n\n  three\r\n\r\nfour") == ["one\n  two ", "  three", "four"]
    assert examples("file", "one\n\ntwo\n") == ["one\n\ntwo"]


def test_sentences_are_the_text_and_end_where_they_should():
    found = list(sentences(PROSE.splitlines(keepends=True)))
    assert "".join(found) == PROSE
    assert [sentence.strip() for sentence in found] == [
        "In the first year the river rose.", 'It took\nthe bridge, the mill and "the house of Anne."',
        "Nobody\n  slept!", "The second year was dry...", "The third (so he said) was not?", "A list:\n- one\n- two",
    ]  # fmt: skip
    assert list(sentences(["他来了。她走了！好"])) == ["他来了。", "她走了！", "好"]


def test_sentence_windows_hold_as_many_whole_sentences_as_fit():
    text = "One two three. Four five six. Seven eight nine. Ten eleven twelve. Thirteen."
    assert examples("sentence-window:60", text) == [
        "One two three. Four five six. Seven eight nine.", "Ten eleven twelve. Thirteen.",
    ]  # fmt: skip
    assert examples("sentence-window:20", "A sentence that is much longer than that. Short. Word.") == [
        "A sentence that is much longer than that.", "Short. Word.",
    ]  # fmt: skip


def test_windows_overlap_by_whole_sentences_and_stay_within_their_size():
    text = "One is 1. Two is 2. Three is 3. Four is 4. Five is 5. Six is 6."
    assert examples("sentence-window:35,0.5", text) == [
        "One is 1. Two is 2. Three is 3.", "Three is 3. Four is 4. Five is 5.", "Five is 5. Six is 6.",
    ]  # fmt: skip


@given(st.text(st.sampled_from('ab .!?\n\t"')), st.sampled_from(list(SPLITS)), st.integers(1, 30))
def test_a_split_leaves_out_white_space_only(text, name, size):
    split = make_split(f"{name}:{size},0.3" if name == "sentence-window" else name)
    own = "".join(own for _, own in split(text.splitlines(keepends=True)))
    assert re.sub(r"\s", "", own) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("split", ["lines", "sentence-window:0", "sentence-window:9,1", "line:3", "sentence-window:x"])
def test_a_bad_split_is_one_line(split):
    with pytest.raises(InputError):
        Reading(split=split)


def test_hard_wrapped_text_is_recognised_and_other_text_is_not():
    assert looks_hard_wrapped(WRAPPED)
    assert not looks_hard_wrapped(WRAPPED[:10])
    assert not looks_hard_wrapped([f"{line.strip()}.\n" for line in WRAPPED])
    assert not looks_hard_wrapped([line[: 10 + 17 * k % 60] + "\n" for k, line in enumerate(WRAPPED)])


def test_hard_wrapped_file_suggests_the_option(tmp_path):
    (tmp_path / "licence.txt").write_text("".join(WRAPPED))
    found = load_corpus(str(tmp_path / "licence.txt"), holdout=0)
    assert len(found.train) == 32 and found.notes[1].startswith("licence.txt: every line is an example, but the lines")
    assert "--split paragraph or --split sentence-window" in found.notes[1]
    whole = load_corpus(str(tmp_path / "licence.txt"), Reading(split="paragraph"), holdout=0)
    assert whole.train["text"][:] == ["".join(WRAPPED).rstrip()] and len(whole.notes) == 1


def test_records_are_split_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n\\ntwo\\n three"}\n{"text": "four"}\n')
    assert list(load_corpus(str(tmp_path / "a.jsonl"), holdout=0).train["text"]) == ["one\n\ntwo\n three", "four"]
    found = load_corpus(str(tmp_path / "a.jsonl"), Reading(split="paragraph"), holdout=0)
    assert list(found.train["text"]) == ["one", "two\n three", "four"]


def test_an_overlap_never_crosses_to_the_other_side(tmp_path):
    text = " ".join(f"Sentence number {k} is here." for k in range(300))
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "a.txt"), Reading(split="sentence-window:120,0.5"), holdout=0.3)
    numbers = [set(re.findall(r"\d+", " ".join(side["text"][:]))) for side in (corpus.train, corpus.heldout)]
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == {str(k) for k in range(300)}
    repeated = re.findall(r"\d+", " ".join(corpus.train["text"][:]))
    assert len(repeated) > 1.2 * len(set(repeated))


@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("holdout", [0.1, 0.5])
def test_no_window_has_a_sentence_of_the_other_side(tmp_path, overlap, holdout):
    (tmp_path / "a.txt").write_text(" ".join(f"S{k} is." for k in range(400)))
    corpus = load_corpus(str(tmp_path / "a.txt"), Reading(split=f"sentence-window:60,{overlap}"), holdout=holdout)
    train, heldout = (set(re.findall(r"\d+", " ".join(side["text"][:]))) for side in (corpus.train, corpus.heldout))
    assert not train & heldout and train | heldout == {str(k) for k in range(400)}


def test_initials_titles_and_short_forms_end_no_sentence():
    text = "Mr. Hay met J. K. Bly, e.g. at 3 p.m. in the U.S. capital. Prof. Low left! It was 5. (So?) Yes."
    assert [sentence.strip() for sentence in sentences([text])] == [
        "Mr. Hay met J. K. Bly, e.g. at 3 p.m. in the U.S. capital.", "Prof. Low left!", "It was 5.", "(So?)", "Yes.",
    ]  # fmt: skip


@given(st.text(st.sampled_from("aB .!\n。)"), max_size=60), st.integers(1, 20))
def test_sentences_are_the_same_however_much_is_read_at_once(text, size):
    lines = text.splitlines(keepends=True)
    whole = list(sentences(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_CUT_AT", size)
        assert list(sentences(lines)) == whole and "".join(whole) == text


def test_sentences_come_before_the_text_has_ended():
    lines = iter(["He came. She left.\n"] * 200_000)
    assert next(sentences(lines)) == "He came. " and len(list(lines)) > 100_000


def test_a_window_of_very_many_sentences_is_found_in_one_pass():
    start = time.monotonic()
    [(_, found)] = make_split("sentence-window:1e9")(["It is. "] * 60_000)
    assert len(found) == 7 * 60_000 - 1 and time.monotonic() - start < 20


def test_records_of_white_space_are_counted_as_empty_whatever_the_split(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " \\n "}\n{"text": ""}\n{"text": "\\n\\na"}\n')
    for split in (None, "line", "paragraph", "sentence-window:1"):
        notes = load_corpus(str(tmp_path / "a.jsonl"), Reading(split=split), holdout=0).notes
        blank = 4 if split == "line" else 2  # the blank lines of the last one
        assert notes == (f"a: 1 example, 0 without 'text', {blank} empty, 0 duplicates",)


def test_whether_lines_look_wrapped_is_said_for_lines_that_were_not_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("".join(WRAPPED))
    for name, split, said in (("a", "line", 0), ("a", None, 1), ("b", None, 1), ("b", "line", 0)):
        notes = load_corpus(str((tmp_path / "a.txt").rename(tmp_path / f"{name}.txt")), Reading(split=split)).notes
        assert [note.partition(":")[0] for note in notes[1:]] == [f"{name}.txt"] * said
        (tmp_path / f"{name}.txt").rename(tmp_path / "a.txt")


def test_normal_form():
    texts = [" A  b\t\n", "Ünï\u00a0 Ｘ\u3000y", "x\u2028y", "", "plain", "a\x1cb\x85c\u1680d", "ΣΟΦΟΣ", "straße ΐ"]
    assert normal_form(pa.array(texts)).to_pylist() == [
        "a b", "ünï x y", "x y", "", "plain", "a b c d", "σοφοσ", "strasse ΐ",
    ]  # fmt: skip


def test_no_character_differs_from_itself_in_another_case_or_from_other_white_space():
    every = [c for c in map(chr, range(0x110000)) if not 0xD800 <= ord(c) < 0xE000]
    spaces = [f"a{c}b" for c in every if c.isspace()]
    assert set(normal_form(pa.array(spaces)).to_pylist()) == {"a b"}
    cased = [c for c in every if c.upper() != c or c.lower() != c]
    forms = [normal_form(pa.array(some)).to_pylist() for some in (cased, map(str.upper, cased), map(str.lower, cased))]
    assert [c for c, *three in zip(cased, *forms, strict=True) if len(set(three)) > 1] == ["ı"]  # Turkish: I is its own


def test_sides_count_blank_examples_and_twins_across_batches(tmp_path):
    counts = Counts()
    writer = Writer(tmp_path, 0.0, counts)
    for batch in (["one", " "], [], ["ONE ", "two", ""]):
        writer.add(pa.array(batch, pa.string()))
    writer.close()
    assert (counts.examples, counts.blank, counts.duplicates) == (3, 2, 1)
    assert read_side(tmp_path, TRAIN)["text"][:] == ["one", "ONE ", "two"]

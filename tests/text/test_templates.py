"""Blanks: what is one, what may be written there, and that what is given comes back as it was."""

import re
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scorelm.config.generation import Infilling
from scorelm.errors import InputError
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer
from scorelm.text.templates import Hole, blank_draft, prompt_template, split_blanks, tokens_for

LINES = ["the light of the world, and the sea\nis not the light", "thyself they cat cats 12"] * 3
TOKENIZER = Tokenizer.train(LINES, 340)
LENGTHS = [0] * 4 + [1] * 2000


def foreign(**how: object) -> Tokenizer:
    """A tokenizer that another program has trained."""
    model = BytesIO()
    options = {"model_type": "unigram", "vocab_size": 60, "minloglevel": 2, "hard_vocab_limit": False}
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **options, **ids, **how)
    return Tokenizer.from_bytes(model.getvalue())


FOREIGN = {
    "normalises": foreign(normalization_rule_name="nmt_nfkc"),
    "no space in front": foreign(add_dummy_prefix=False, normalization_rule_name="identity"),
    "space behind": foreign(treat_whitespace_as_suffix=True, normalization_rule_name="identity"),
}


@cache
def allowed(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """`tokens_for`, without special tokens."""
    allowed_KV = tokens_for(tokenizer)
    allowed_KV[:, list(tokenizer.special)] = False
    return allowed_KV


def filled(text: str, tokenizer: Tokenizer, seed: int, **how: object) -> tuple[str, list[tuple[int, int]], list[int]]:
    """The text with its blanks filled by random tokens, each as its hole asks for; where; and all ids."""
    rng, allowed_KV = np.random.default_rng(seed), allowed(tokenizer)
    spaces = bool(allowed_KV[Hole.SPACE.value].any())
    draft = blank_draft(text, tokenizer, spaces, True, LENGTHS, Infilling.of(**how), rng)
    ids = [
        token if isinstance(token, int) else int(rng.choice(np.flatnonzero(allowed_KV[token.value if token else 0])))
        for token in draft.template
    ]
    return *draft.read(ids, tokenizer), ids


def without(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """What is left of a text without the spans, in pieces."""
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "sign", "pieces"),
    [
        ("a ____ b", "____", ["a ", " b"]),
        ("_______", "____", ["", ""]),
        ("___ a", "____", ["___ a"]),
        (r"a \____ b ____ \c", "____", ["a ____ b ", r" \c"]),
        (r"\______", "____", ["______"]),
        ("a XX b ____", "XX", ["a ", " b ____"]),
        (r"XXXX\XX", "XX", ["", "XX"]),
        ("a.*b", ".*", ["a", "b"]),
        ("", "____", [""]),
    ],
)
def test_signs_of_blanks(text: str, sign: str, pieces: list[str]) -> None:
    assert split_blanks(text, sign) == pieces


GIVEN = st.text(
    st.sampled_from(" \t\n_\\.,é☃\u00a00aeht") | st.characters(exclude_categories=["Cs"], max_codepoint=999)
)


@given(st.lists(GIVEN, min_size=2, max_size=4), st.integers(0, 99), st.sampled_from(["blank_tokens", "blank_words"]))
@example([" ", " ", ""], 0, "blank_tokens")
@example(["", "\n  ", " "], 0, "blank_tokens")
@example(["", " , ", ""], 1, "blank_words")
@settings(max_examples=200, deadline=None)
def test_what_is_given_comes_back_and_is_what_the_ids_decode_to(given: list[str], seed: int, size: str) -> None:
    given = [piece.replace("\u2581", "").replace("X", "").rstrip("\\") for piece in given]
    given = [given[0], *(piece or " " for piece in given[1:-1]), given[-1]]
    text, spans, ids = filled("XX".join(given), TOKENIZER, seed, blank="XX", **{size: 2})
    assert without(text, spans) == given
    assert text == TOKENIZER.decode(ids)


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_given_comes_back_from_any_tokenizer(kind: str) -> None:
    for text in ("  the ____ ☃ﬁ  ____ sea", "____  cat", " ____ the\n\n ____", "____"):
        for seed in range(20):
            found, spans, _ = filled(text, FOREIGN[kind], seed, blank_tokens=2)
            assert without(found, spans) == text.split("____")


def test_a_space_before_a_blank_is_there_once_and_before_whole_words_only() -> None:
    for seed in range(200):
        text, [(start, _)], ids = filled("the ____ cat", TOKENIZER, seed, blank_tokens=1)
        head = TOKENIZER.encode_document("the")[:-1]
        assert ids[: len(head)] == head and TOKENIZER.pieces(ids)[len(head)].startswith("▁")
        assert text.startswith("the ") and start == 4


@pytest.mark.parametrize("before", ["", " "])
def test_a_blank_that_begins_the_text_begins_as_texts_do(before: str) -> None:
    for seed in range(200):
        text, [(start, _)], ids = filled(f"{before}____ cat", TOKENIZER, seed, blank_tokens=1)
        assert TOKENIZER.pieces(ids)[1 + len(before)].startswith("▁")
        assert start == len(before) and not text[start:].startswith("  ")


@pytest.mark.parametrize("words", [1, 2, 5])
@pytest.mark.parametrize(
    "text",
    ["the ____ sea", "____ sea", "the ____", "____", '"____", of (____).', "un____ed", "the\n____\tsea", " ____ "],
)
def test_words_come_out_in_their_number(text: str, words: int) -> None:
    for seed in range(30):
        found, spans, _ = filled(text, TOKENIZER, seed, blank_words=words)
        for start, end in spans:
            assert found[start:end].split() == found[start:end].split(" ") and len(found[start:end].split()) == words
            assert found[start:end].replace(" ", "").isalnum()
        assert without(found, spans) == text.split("____")


def test_words_are_as_long_as_most_of_those_around_them() -> None:
    """The median of their tokens; one where more would not fit, or where there are no words."""
    lengths = [len(TOKENIZER.encode(word)) for word in ("seats", "sea")]
    assert len(set(lengths)) == 2
    rest = 2 + len(TOKENIZER.encode("seats")) + len(TOKENIZER.encode_inside(" sea"))
    found = {len(filled("seats ____ sea", TOKENIZER, seed, blank_words=1)[2]) - rest for seed in range(20)}
    assert found == {int(sum(lengths) / 2)}
    many = [len(filled("sea sea seats ____", TOKENIZER, seed, blank_words=1)[2]) for seed in range(9)]
    assert set(many) == {2 + len(TOKENIZER.encode("sea sea seats")) + len(TOKENIZER.encode("sea"))}
    assert len(filled("____", TOKENIZER, 0, blank_words=7)[2]) == 9
    tight = [0] * 4 + [1] * rest
    for seed in range(9):
        draft = blank_draft(
            "seats ____ sea", TOKENIZER, True, True, tight, Infilling(blank_words=3), np.random.default_rng(seed)
        )
        assert len(draft.template) == rest + 3


@pytest.mark.parametrize("how", [{"blank_tokens": 5000}, {"blank_words": 5000}])
def test_what_does_not_fit_is_refused(how: dict[str, int]) -> None:
    with pytest.raises(InputError, match="trained on at most 2003"):
        filled("the ____ sea", TOKENIZER, 0, **how)


def test_a_repair_gives_nothing_back() -> None:
    text, spans, ids = filled("the  ____ sea ", TOKENIZER, 0, repair=0.5)
    assert (text, spans) == (TOKENIZER.decode(ids), [])


def test_a_blank_is_one_to_three_words_unless_it_says_otherwise_or_there_is_no_room():
    """As often one as two as three, each blank by itself; a tokenizer without words has tokens as the text is long."""
    how, counts = Infilling(), []
    for seed in range(300):
        draft = blank_draft("the ____ sea, ____", TOKENIZER, True, True, LENGTHS, how, np.random.default_rng(seed))
        runs = [draft.template[blank] for blank in draft.blanks]
        assert all(hole in (Hole.WORD, Hole.REST) for run in runs for hole in run)
        counts += [sum(hole is Hole.WORD for hole in run) for run in runs]
    assert {1, 2, 3} == set(counts) and all(abs(counts.count(k) - 200) < 45 for k in (1, 2, 3))
    full = [0, 0, 0, 0] + [1] * (len(TOKENIZER.encode_document("the sea, ")) + 2)
    tight = blank_draft("the ____ sea, ____", TOKENIZER, True, True, full, how, np.random.default_rng(0))
    assert [blank.stop - blank.start for blank in tight.blanks] == [1, 1]
    free = blank_draft("the ____ sea", TOKENIZER, True, False, LENGTHS, how, np.random.default_rng(0)).template
    assert None in free and Hole.WORD not in free


def test_a_prompt_that_ends_in_spaces_has_the_tokens_that_it_has_in_a_text() -> None:
    """A space belongs to the word behind it, and an indentation is a token of its own; blanks begin likewise."""
    names = ("one", "two", "three", "four")
    lines = [f"def {name}(self):\n        if x:\n            return {name} + 1  # so" for name in names]
    tokenizer = Tokenizer.train(lines * 20, 320)
    allowed_KV, rng = tokens_for(tokenizer), np.random.default_rng(0)
    for text in lines:
        whole = tokenizer.encode(text)
        for found in re.finditer(r" +(?=[a-z])", text):
            template = prompt_template(text[: found.end()], tokenizer, [0] * 200, 150, 200, False, rng)
            given = [token for token in template if isinstance(token, int)][1:]
            hole = template[1 + len(given)]
            assert whole[: len(given)] == given
            assert not isinstance(hole, Hole) or allowed_KV[hole.value, whole[len(given)]]
            blank = blank_draft(text[: found.end()] + "____", tokenizer, True, False, [0] * 200, Infilling(), rng)
            assert blank.template[1 : 1 + len(given)] == given and blank.template[1 + len(given)] == hole

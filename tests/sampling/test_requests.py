"""Requests in words: text that is complete and kept, blanks, lengths, repairs, and what is refused."""

import numpy as np
import pytest
import torch

from scorelm.errors import InputError
from scorelm.sampling.sample import Sample, minimum_bayes_risk, most_common

from .conftest import LENGTHS
from .steps import BOS, EOS, NEVER, PATHS, raised_prior, records

# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "blocks:4"])
def test_closed_rows_have_their_ends_and_no_other_specials(lm, path):
    for prompt in ("", "the light"):
        for one in lm.generate([prompt], n=20, path=path, steps=3, temperature=3.0):
            assert one.ids[0] == BOS and one.ids[-1] == EOS
            assert not set(one.ids[1:-1]) & set(NEVER.tolist())
            assert one.ids[1 : 1 + len(lm.tokenizer.encode(prompt))] == lm.tokenizer.encode(prompt)
            assert one.text == lm.tokenizer.decode(one.ids).strip() and one.text.startswith(prompt)
            assert 5 <= len(one.ids) <= 15


def test_open_rows_end_where_the_model_ends_them(lm):
    watched = []
    with raised_prior(lm, EOS, 4.0):
        samples = lm.generate(["the"], n=40, path="blocks:1", steps=1)
        lm.generate(["the"], n=6, path="blocks:1", steps=1, watch=watched.append)
    head = 1 + len(lm.tokenizer.encode("the"))
    assert len({len(one.ids) for one in samples}) > 3
    assert sum(one.ids[-1] == EOS for one in samples) > 10
    for one in samples:
        assert one.ids[0] == BOS and len(one.ids) <= 15
        assert one.ids[-1] == EOS or len(one.ids) == 15
        assert not set(one.ids[1:-1]) & set(NEVER.tolist())
        assert one.nfe == len(one.ids) - head  # no evaluation after the end
    lengths = torch.stack([record.length_B for record in watched])
    assert (lengths.diff(dim=0) <= 0).all()


def test_a_length_closes_a_row_on_every_path(lm):
    for path in PATHS:
        for one in lm.generate(["the"], n=3, path=path, steps=4, length=11):
            assert len(one.ids) == 11 and one.ids[-1] == EOS and EOS not in one.ids[:-1]


def test_lengths_are_drawn_from_the_histogram(lm):
    """Chi-square of 1,000 texts, 0.1%, 10 degrees of freedom."""
    samples = [one for seed in range(0, 1000, 250) for one in lm.generate(n=250, steps=1, seed=seed)]
    counts = np.bincount([len(one.ids) for one in samples], minlength=16)
    law = np.array(LENGTHS) / sum(LENGTHS)
    assert (counts[law == 0] == 0).all()
    expected = 1000 * law[law > 0]
    assert ((counts[law > 0] - expected) ** 2 / expected).sum() < 29.6


# --- infilling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["uniform", "blocks:3", "bounded"])
def test_infill_keeps_what_is_given_and_fills_the_blanks(lm, path):
    pieces = [lm.tokenizer.encode(piece) for piece in ("god", "the", "day")]
    for one in lm.infill("god ____ the ____ day", n=4, blank_tokens=2, path=path, steps=4):
        ids = one.ids
        assert ids[0] == BOS and ids[-1] == EOS and len(ids) == 2 + sum(map(len, pieces)) + 4
        at = 1
        for k, piece in enumerate(pieces):
            assert ids[at : at + len(piece)] == piece
            at += len(piece) + (2 if k < 2 else 0)
        assert not set(ids[1:-1]) & set(NEVER.tolist())
        assert one.text.startswith("god") and one.text.endswith("day") and " the" in one.text


@pytest.mark.parametrize("text", ["____ day", "the ____", "____"])
def test_blanks_at_the_ends(lm, text):
    one = lm.infill(text, blank_tokens=3, steps=3)[0]
    assert one.ids[0] == BOS and one.ids[-1] == EOS
    assert len(one.ids) == 2 + 3 + len(lm.tokenizer.encode(text.replace("____", "").strip()))


def test_text_beside_a_blank_gets_no_space(lm):
    inside = lm.tokenizer.encode_inside("ed")
    assert lm.tokenizer.decode([7, *inside]).endswith("ed") and inside != lm.tokenizer.encode("ed")
    for one in lm.infill("the light____ed", n=4, blank_tokens=1, steps=2):
        assert one.ids[-1 - len(inside) :] == [*inside, EOS]


def test_blanks_of_drawn_length_fit_the_model(lm):
    lengths = {len(one.ids) for one in lm.infill("the ____ day ____", n=30, steps=1)}
    fixed = 2 + len(lm.tokenizer.encode("the")) + len(lm.tokenizer.encode("day"))
    assert min(lengths) >= fixed + 2 and max(lengths) <= 15 and len(lengths) > 2


# --- errors and nothing to do -----------------------------------------------------------------------------------------


def test_none_asked_none_given(lm):
    assert lm.generate(["the"], 0) == [] and lm.generate([], 3) == [] and lm.infill("the ____", 0) == []


def test_nothing_free_is_the_text_itself(lm):
    template = [BOS, *lm.tokenizer.encode("the day"), EOS]
    assert records(lm, [template]) == []
    one = lm.generate(["the day"], length=len(template), steps=3)[0]
    assert one == Sample("the day", template, 0, 0)


@pytest.mark.parametrize("length", [-1, 0, 2, 4, 16, 1000])
def test_a_bad_length_is_refused(lm, length):
    with pytest.raises(InputError, match=str(length)):
        lm.generate(["the day"], length=length)


@pytest.mark.parametrize("path", ["uniform", "blocks:1"])
def test_a_prompt_that_is_too_long_is_refused(lm, path):
    with pytest.raises(InputError, match="15"):
        lm.generate(["the light and the darkness and the heaven and the earth"], path=path)


def test_infill_needs_a_blank_that_fits(lm):
    with pytest.raises(InputError, match="blank"):
        lm.infill("no blank here")
    with pytest.raises(InputError, match="blank"):
        lm.infill("three ___ are none")
    with pytest.raises(InputError):
        lm.infill("the ____ day", blank_tokens=15)
    with pytest.raises(InputError):
        lm.infill("the light and the darkness and the heaven ____ and the earth")


# --- beyond the length of training ------------------------------------------------------------------------------------


def test_blocks_write_beyond_the_training_length(lm):
    one = lm.generate(["the"], path="blocks:4", length=50, max_length=60, steps=20)[0]
    assert len(one.ids) == 50 and one.ids[-1] == EOS
    with raised_prior(lm, EOS, -60.0):
        endless = lm.generate(["the"], path="blocks:1", max_length=40, steps=1)[0]
    assert len(endless.ids) == 40 and endless.ids[-1] != EOS
    with pytest.raises(InputError, match="only paths of blocks"):
        lm.generate(["the"], path="uniform", length=50, max_length=60)
    with pytest.raises(InputError, match="at most 15"):
        lm.generate(["the"], path="blocks:4", length=50)


# --- best of n --------------------------------------------------------------------------------------------------------


def test_the_best_of_several_is_one_of_them(lm):
    how = {"path": "uniform", "steps": 3, "temperature": 3.0}
    many = lm.generate(["the"], n=6, **how)
    one, two = lm.generate(["the"], n=2, best_of=3, **how)
    assert one.text in [s.text for s in many[:3]] and two.text in [s.text for s in many[3:]]
    assert (one.nfe, two.nfe) == (9, 9)


def test_choices():
    texts = ["a b c d e", "a b c d f", "x y", "a b c d e f", "x y"]
    assert minimum_bayes_risk(texts) in (0, 1, 3)
    assert most_common(texts) == 2
    assert minimum_bayes_risk(["one"]) == most_common(["one"]) == 0


def test_a_sample_shows_itself_in_a_notebook():
    """Its text is text there, whatever it holds."""
    shown = Sample("<b>light & day</b>", [BOS, 5, EOS], 7, 12)._repr_html_()
    assert "&lt;b&gt;light &amp; day&lt;/b&gt;" in shown and "seed 7" in shown and "12 evaluations" in shown


# --- repair -----------------------------------------------------------------------------------------------------------


def test_a_repair_keeps_the_ends_doubts_the_rest_and_needs_no_blank(lm):
    """With little noise the text comes back, with much it is another; ends and length stay."""
    text = "the light"
    given = lm.tokenizer.encode_document(text)
    one = lm.infill(text, repair=0.01, steps=8)[0]
    assert one.ids == given and one.nfe <= 8
    many = lm.infill(text, n=4, repair=0.99, steps=8)
    assert all(len(s.ids) == len(given) and (s.ids[0], s.ids[-1]) == (BOS, EOS) for s in many)
    assert any(s.ids != given for s in many)
    for path in ("shuffled", "confidence", "bounded:1"):
        assert len(lm.infill(text, repair=0.5, steps=4, path=path)[0].ids) == len(given)


@pytest.mark.parametrize("text", ["____", ""])
def test_a_repair_of_nothing_given_is_an_infill(lm, text):
    assert lm.infill(text, repair=0.5, steps=4)[0].ids[0] == BOS


@pytest.mark.parametrize(
    "options",
    [{"repair": 0.0}, {"repair": 1.0}, {"repair": 0.5, "path": "blocks:2"}, {"repair": 0.5, "guidance": 2.0}],
)
def test_a_repair_that_makes_no_sense_is_refused(lm, options):
    with pytest.raises(InputError, match="repair"):
        lm.infill("the light", **options)

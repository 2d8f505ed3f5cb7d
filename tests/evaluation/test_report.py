"""The report of an evaluation: what is in it, what its sets of texts are, and that it is plain JSON."""

import json
import math
from collections import Counter

import pytest

from scorelm.errors import InputError
from scorelm.evaluation.judge import AutoregressiveJudge
from scorelm.evaluation.price import price
from scorelm.evaluation.report import TEMPERATURES, Examiner, evaluate, unigram_texts, written

from ..conftest import LINES

HELDOUT = ["and the light was void", "the earth", "god said let there be", "in the heaven", "day and night"]


@pytest.fixture(scope="module")
def judge(make_lm):
    return AutoregressiveJudge(make_lm("autoregressive"), "a judge")


@pytest.mark.parametrize(
    ("objective", "judged"), [("autoregressive", False), pytest.param("score", True, marks=pytest.mark.thorough)]
)
def test_a_report_is_complete(make_lm, judge, monkeypatch, objective, judged):
    """Every price, table and curve that the objective shows, for each of its sets; said on the way."""
    lm, told = make_lm(objective), []
    monkeypatch.setattr(type(lm.objective), "shown_budgets", (2,))
    found = evaluate(
        lm, HELDOUT, LINES[:4], judge if judged else None, n=2, steps=2, seed=3, precision="float32", watch=told.append
    )  # fmt: skip
    json.dumps(found, allow_nan=False)
    assert found["model"]["objective"] == objective and found["judge"] == ("a judge" if judged else None)
    assert [(one["path"], one["steps"]) for one in found["prices"]] == list(lm.objective.shown_prices)
    assert all(math.isfinite(one["nats_per_token"]) for one in found["prices"])
    names = [one["name"] for one in found["table"]]
    assert len(names) == 4 and names[0].startswith("model (") and names[1] == "real text"
    assert [one["texts"] for one in found["table"]] == [2, 2, 2, 2]
    assert [one["temperature"] for one in found["frontier"]] == list(TEMPERATURES)
    assert [one["path"] for one in found["effort"]] == list(lm.objective.shown_paths)
    assert [one["path"] for one in found["samples"]] == list(lm.objective.sampled_paths)
    assert all(len(one["texts"]) == 8 for one in found["samples"])
    for one in (*found["table"], *found["frontier"], *found["effort"]):
        assert one["entropy"] >= 0 and ("perplexity" in one) == judged
    assert len(told) == len(found["prices"]) + len(found["effort"]) + 2


def test_texts_are_those_of_generate_in_batches_of_any_size(make_lm, monkeypatch):
    lm = make_lm("autoregressive")
    expected = [one.text for one in lm.generate(n=5, seed=7)]
    monkeypatch.setattr("scorelm.evaluation.report.BATCH", 2)
    found = written(lm, 5, seed=7)
    assert sum(a != b for a, b in zip(found.texts, expected, strict=True)) <= 1  # a rounding may change a text
    assert found.nfe > 1 and found.seconds > 0


def test_a_unigram_sampler_has_the_frequencies_and_the_lengths_of_the_training_text(make_lm):
    """Of 1,000 texts of 10 tokens, by letters: no share is off by 1%."""
    lm = make_lm(lengths=[0] * 12 + [1])
    texts = unigram_texts(lm, LINES[:4], 1000, seed=0)
    assert texts == unigram_texts(lm, LINES[:4], 1000, seed=0) != unigram_texts(lm, LINES[:4], 1000, seed=1)
    expected, drawn = (Counter("".join(part).replace(" ", "")) for part in (LINES[:4], texts))
    assert set(drawn) == set(expected)
    for letter, count in expected.items():
        assert abs(drawn[letter] / drawn.total() - count / expected.total()) < 0.01, letter


@pytest.mark.thorough
def test_figures_know_copies_only_where_there_is_training_text(judge):
    with_training, without = Examiner(judge, HELDOUT, LINES[:4]), Examiner(None, HELDOUT, None)
    assert with_training.figures([LINES[0], "night"])["exact_copies"] == 0.5
    assert "copied" not in without.figures(HELDOUT[:2]) and set(without.point(HELDOUT[:2])) == {"entropy"}


@pytest.mark.parametrize(("texts", "n"), [(3, 2), (5, 1)])
def test_too_few_texts_are_refused(make_lm, texts, n):
    with pytest.raises(InputError, match="at least 4 held-out texts and 2 samples"):
        evaluate(make_lm("autoregressive"), HELDOUT[:texts], None, None, n=n)


def test_texts_that_cannot_be_spelled_are_left_out_of_the_prices_and_counted(make_lm):
    lm, texts = make_lm("autoregressive"), ["the light", "day", "the ☃", "night", "void"]
    found = evaluate(lm, texts, None, None, n=2, steps=2)
    spelled = [text for text in texts if "☃" not in text]
    assert found["settings"]["unspelled"] == 1
    assert found["prices"][0]["nats_per_token"] == price(lm, spelled, "ordered").nats_per_token

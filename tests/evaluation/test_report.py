"""The report of an evaluation: what is in it, what its sets of texts are, and that it is plain JSON."""

import json
import math
from collections import Counter

import pytest

from scorelm.errors import InputError
from scorelm.evaluation.judge import AutoregressiveJudge, load_judge
from scorelm.evaluation.price import price
from scorelm.evaluation.report import TEMPERATURES, Examiner, evaluate, kinship, unigram_texts, written
from scorelm.model.directory import Provenance

from ..conftest import LINES
from .test_judge import save

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
        lm, HELDOUT, LINES[:4], judge if judged else None, n=2, steps=2, seed=3, precision="float32",
        watch=lambda share, doing: told.append((share, doing)),
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
    shares, stages = [share for share, _ in told], len({doing for _, doing in told})
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert stages == sum(len(found[part]) for part in ("prices", "frontier", "effort", "samples")) + 1
    assert found["notes"] == []


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
    assert found["notes"] == ["held-out texts without a price, since the model's tokenizer cannot spell them: 1"]
    assert found["prices"][0]["nats_per_token"] == price(lm, spelled, "ordered").nats_per_token


@pytest.mark.thorough
def test_what_makes_a_judge_partial_is_said(make_lm, tmp_path):
    """The same weights wherever they are read from; otherwise the text that both say they were trained on."""
    lm, other = make_lm("autoregressive"), make_lm("autoregressive", hidden=32)
    lm.save_pretrained(tmp_path / "copy")
    itself = "the judge is the model itself"
    assert evaluate(lm, HELDOUT, None, load_judge(str(tmp_path / "copy")), n=2, steps=2)["notes"] == [itself]
    assert kinship(lm, AutoregressiveJudge(other, "other")) is None
    for model in (lm, other):
        model.provenance = Provenance(data="bible.txt")
    same = "the judge was trained on the same text as the model"
    assert kinship(lm, AutoregressiveJudge(other, "other")) == same
    assert kinship(lm, AutoregressiveJudge(lm, "other")) == itself
    other.provenance = Provenance(data="another.txt")
    assert kinship(lm, AutoregressiveJudge(other, "other")) is None
    for model, name in ((lm, "bible.txt"), (other, "moved.txt")):
        model.provenance = Provenance(data=name, fingerprint="0f")
    assert kinship(lm, AutoregressiveJudge(other, "other")) == same


@pytest.mark.thorough  # MAUVE is not in the extra dev
def test_what_a_judge_cannot_spell_is_said(make_lm, judge):
    examiner = Examiner(judge, HELDOUT, None)
    examiner.figures(["the light", "the ☃"])
    note = "1 of 2 texts have characters that the judge cannot spell, which make them look too likely"
    assert examiner.notes(make_lm("score")) == [note]


@pytest.mark.thorough
def test_texts_that_were_cut_at_the_judges_context_are_counted(make_lm, tmp_path):
    """A judge of Hugging Face, whose context is 24 tokens, of a letter each."""
    examiner = Examiner(load_judge(str(save(tmp_path, bos_token="<s>", eos_token="</s>"))), ["day", "night"], None)
    examiner.figures(["the light " * 3, "day"])
    examiner.figures(["god said " * 9, "the earth " * 9])
    assert examiner.notes(make_lm("score")) == ["3 of 4 texts were cut at the judge's context of 24 tokens"]

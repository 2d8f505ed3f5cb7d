"""Requests in words: text that is complete and kept, blanks, lengths, repairs, and what is refused."""

from io import BytesIO

import numpy as np
import pytest
import sentencepiece
import torch

from scorelm import ScoreLM, Tokenizer
from scorelm.config.generation import Infilling
from scorelm.errors import InputError
from scorelm.model.directory import Provenance
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.request import Settings
from scorelm.sampling.sample import Sample, minimum_bayes_risk, most_common
from scorelm.sampling.solvers import SOLVERS
from scorelm.text.templates import Hole, tokens_for

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
            assert one.text == lm.tokenizer.decode(one.ids) and one.text.startswith(prompt)
            assert 5 <= len(one.ids) <= 15


@pytest.mark.parametrize("path", ["uniform", "bounded", "blocks:1"])
def test_a_prompt_that_ends_in_a_space_is_followed_by_a_word(lm, path):
    for one in lm.generate(["the light "], n=20, path=path, steps=3, temperature=3.0):
        assert one.text.startswith("the light ") and one.text == lm.tokenizer.decode(one.ids)
        assert one.ids[: len(lm.tokenizer.encode("the light")) + 1] == [BOS, *lm.tokenizer.encode("the light")]
        assert lm.tokenizer.pieces(one.ids)[len(lm.tokenizer.encode("the light")) + 1].startswith("▁")


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


def test_a_text_is_continued_from_left_to_right_unless_another_path_is_needed(lm, monkeypatch):
    def texts(**options):
        return [(one.ids, one.nfe) for one in lm.generate(["the", ""], n=3, **options)]

    in_order, at_once = texts(path="blocks:1", steps=1), texts(path="bounded", steps=128)
    assert texts() == in_order == texts(path="blocks:1") and in_order != at_once
    assert texts(steps=128) == at_once == texts(path="bounded")
    assert texts(length=9) == texts(path="bounded", length=9) != texts(path="blocks:1", length=9)
    monkeypatch.setattr(lm, "provenance", Provenance(prices={"ordered": 4.0, "random": 3.9}))
    assert texts() == at_once
    monkeypatch.setattr(lm, "provenance", Provenance(prices={"ordered": 3.8, "random": 3.9}))
    assert texts() == in_order
    monkeypatch.setattr(lm, "objective", OBJECTIVES["masked"])
    assert texts() == at_once


@pytest.mark.parametrize(
    "option",
    [{"solver": "euler"}, {"solver": "ancestral"}, {"halt": "entropy:1"}, {"self_guidance": 2.0},
     {"solver": "euler", "score_temperature": 3.0}],
    ids=str,
)  # fmt: skip
def test_an_option_that_means_nothing_left_to_right_keeps_the_surest_words_first(lm, option):
    def texts(**options):
        return [(one.ids, one.nfe) for one in lm.generate(["the", ""], n=3, **options)]

    assert texts(**option) == texts(path="bounded", **option) != texts()


@pytest.mark.parametrize("option", [{"guidance": 2.0}, {"top_k": 5}, {"temperature": 0.5}, {"best_of": 2}], ids=str)
def test_the_other_options_are_for_left_to_right_too(lm, option):
    found = [one.ids for one in lm.generate(["the"], n=3, **option)]
    assert found == [one.ids for one in lm.generate(["the"], n=3, path="blocks:1", **option)]
    assert found != [one.ids for one in lm.generate(["the"], n=3)]


def test_nats_a_step_are_refused_in_the_name_of_the_path_that_would_be_taken(lm):
    with pytest.raises(InputError, match="bounded does not count nats"):
        lm.generate(nats_per_step=1.0)


def test_a_blank_is_filled_with_the_surest_words_first(lm):
    filled = [one.ids for one in lm.infill("the ____ of", n=3, blank_tokens=5)]
    assert filled == [one.ids for one in lm.infill("the ____ of", n=3, blank_tokens=5, path="bounded", steps=128)]
    assert filled != [one.ids for one in lm.infill("the ____ of", n=3, blank_tokens=5, path="blocks:1")]


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


@pytest.mark.parametrize("path", [*PATHS, "remask"])
@pytest.mark.parametrize("solver", ["posterior", "heun"])
def test_words_are_written_where_words_are_asked_for(long_lm, path, solver):
    """On every path and way to answer, when requests of other kinds share the evaluations, too."""
    how = {"path": path, "solver": solver, "steps": 3, "temperature": 5.0}
    for one in long_lm.infill(["god  ____12____day", "____"], n=4, blank_words=2, self_guidance=1.5, **how):
        inside = [one.text[start:end] for start, end in one.spans]
        assert all(len(part.split()) == 2 and part.replace(" ", "").isalnum() for part in inside)
        assert one.text == long_lm.tokenizer.decode(one.ids)
        assert one.text == "god  {}12{}day".format(*inside) if len(inside) == 2 else one.text == inside[0]
    loop, settings = long_lm.loop(), Settings.of(Infilling.of(**how))
    kinds = (Hole.WORD, Hole.REST, Hole.SPACE, None)
    jobs = [loop.join([[BOS, kind, kind, 9, EOS]] * 9, range(9), settings) for kind in kinds]
    while not all(job.finished for job in jobs):
        loop.step()
    allowed = tokens_for(long_lm.tokenizer)
    for kind, job in zip(kinds, jobs, strict=True):
        written = {token for ids, _ in job.rows() for token in ids[1:3]}
        assert allowed[kind.value if kind else 0, list(written)].all()


def test_a_masked_model_writes_words_too(make_lm):
    for one in make_lm("masked").infill("god ____, day", n=8, blank_words=2, steps=3):
        ((start, end),) = one.spans
        assert len(one.text[start:end].split()) == 2 and one.text == f"god {one.text[start:end]}, day"


def test_given_text_comes_back_byte_for_byte(long_lm):
    """From a tokenizer without most of these characters, too."""
    text = "  the\n\tday ____ ☃\u2581 ____  "
    for one in long_lm.infill(text, n=4, blank_tokens=1, steps=2):
        (start, end), (begin, stop) = one.spans
        assert (one.text[:start], one.text[end:begin], one.text[stop:]) == ("  the\n\tday ", " ☃\u2581 ", "  ")


def test_a_repair_is_what_its_ids_decode_to(lm):
    for one in lm.infill("the light ____", n=4, repair=0.9, steps=3):
        assert (one.text, one.spans) == (lm.tokenizer.decode(one.ids), [])


def test_blanks_have_tokens_or_words(lm):
    with pytest.raises(InputError, match="not both"):
        lm.infill("the ____", blank_tokens=2, blank_words=2)
    model = BytesIO()
    ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "unk_id": 3}
    options = {"model_type": "char", "vocab_size": 280, "hard_vocab_limit": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["thelight"]),
        model_writer=model,
        add_dummy_prefix=False,
        minloglevel=2,
        **options,
        **ids,
    )
    without = ScoreLM(lm.config, Tokenizer.from_bytes(model.getvalue()), lm.schedule, [0] * 4 + [1] * 20).eval()
    with pytest.raises(InputError, match="no tokens to make words of"):
        without.infill("the ____", blank_words=2)
    assert without.infill("the ____", blank_tokens=2, steps=2)[0].text.startswith("the ")


def test_text_beside_a_blank_gets_no_space(lm):
    inside = lm.tokenizer.encode_inside("ed")
    assert lm.tokenizer.decode([7, *inside]).endswith("ed") and inside != lm.tokenizer.encode("ed")
    for one in lm.infill("the light____ed", n=4, blank_tokens=1, steps=2):
        assert one.ids[-1 - len(inside) :] == [*inside, EOS]


def test_blanks_of_drawn_length_fit_the_model(lm, long_lm):
    fixed = 2 + len(lm.tokenizer.encode("the")) + len(lm.tokenizer.encode("day"))
    for model in (lm, long_lm):
        lengths = {len(one.ids) for one in model.infill("the ____ day ____", n=30, steps=1)}
        assert min(lengths) >= fixed + 2 and max(lengths) <= model.max_length
    assert len(lengths) > 2


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


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "solver"),
    [*((path, "posterior") for path in (*PATHS, "remask")), *(("uniform", solver) for solver in SOLVERS)],
)
def test_at_temperature_0_every_seed_gives_the_same_tokens(lm, path, solver):
    how = {"path": path, "solver": solver, "steps": 5, "length": 11, "temperature": 0}
    ids = [one.ids for seed in (0, 7) for one in lm.generate(["the"], n=2, seed=seed, **how)]
    assert ids == [ids[0]] * 4


@pytest.mark.parametrize("objective", ["score", "autoregressive"])
def test_at_temperature_0_each_token_is_the_likeliest(make_lm, objective):
    """Left to right, one step a token: as where only the likeliest token may be drawn."""
    lm = make_lm(objective)
    how = {"path": "blocks:1", "steps": 1, "length": 12}
    greedy = lm.generate(["the light"], temperature=0, **how)[0]
    assert greedy == lm.generate(["the light"], temperature=1e-300, **how)[0]
    assert greedy.ids == lm.generate(["the light"], top_k=1, seed=5, **how)[0].ids


def test_at_temperature_0_a_path_still_sees_how_sure_the_model_is(lm):
    """Were the posteriors sharpened to one token, bounded would write all tokens in one step."""
    assert lm.generate(["the"], temperature=0, path="bounded:0.1", length=15, steps=64)[0].nfe > 3


# --- many rows --------------------------------------------------------------------------------------------------------


def test_many_rows_are_written_in_batches_of_bounded_size(calm_lm, monkeypatch):
    """Batches change roundings only; a best one is chosen from all of its group."""
    how = {"path": "uniform", "steps": 3, "length": 12}
    many, best = calm_lm.generate(["the", ""], n=5, **how), calm_lm.generate(n=4, best_of=3, choose="vote", **how)
    shares, watched = [], []
    monkeypatch.setattr("scorelm.sampling.loop.LOGITS", 4 * 12 * 50)
    assert calm_lm.generate(["the", ""], n=5, **how, watch=watched.append, progress=shares.append) == many
    assert [len(record.ids_BL) for record in watched] == [4] * 3 + [4] * 3 + [2] * 3
    assert [record.step for record in watched] == [1, 2, 3] * 3
    assert shares == sorted(shares) and shares[-1] == 1 and len(set(shares)) == 9
    assert calm_lm.generate(n=4, best_of=3, choose="vote", **how) == best
    monkeypatch.setattr("scorelm.sampling.loop.LOGITS", 1)
    assert calm_lm.generate(["the", ""], n=5, **how) == many


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

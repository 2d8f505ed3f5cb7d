"""Diversity: every measure against values worked out by hand or by a slow, plain computation."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.evaluation.diversity import (
    copy_rate,
    distinct,
    diversity,
    length_distance,
    mauve,
    repetition,
    self_bleu,
    unigram_entropy,
    words,
    zipf_coefficient,
)

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), min_size=1, max_size=5)
COPY_KEYS = {"copied", "longest_copy", "exact_copies"}
KEYS = {"entropy", "distinct_1", "distinct_2", "distinct_3", "self_bleu", "repetition_4", "zipf", "length_distance"}


def grams(text, n):
    return [tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)]


def test_words_are_runs_of_letters_and_single_signs_in_their_own_case():
    assert words("And God's light,  (1611) naïve—yes...") == (
        ["And", "God", "'", "s", "light", ",", "(", "1611", ")", "naïve", "—", "yes", ".", ".", "."]
    )
    assert words(" \n") == []


def test_entropy_is_of_the_words_inside_a_text_then_averaged():
    assert unigram_entropy(["a a b b", "a b c d", ""]) == pytest.approx((math.log(2) + math.log(4)) / 3)
    assert unigram_entropy(["a a a b"]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert math.copysign(1, unigram_entropy(["", "a a"])) == 1.0


def test_distinct_is_over_the_whole_set():
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a b a b", "a b"], 1) == 2 / 6
    assert distinct(["a b"], 3) == 0.0


def test_repetition_is_inside_a_text_and_pooled():
    assert repetition(["a b a b a", "a b"], 2) == pytest.approx(2 / 5)
    assert repetition(["a b", "a b"], 2) == 0.0
    assert repetition(["a"], 4) == 0.0


@given(TEXTS, st.integers(1, 4))
def test_distinct_and_repetition_match_counting(texts, n):
    pooled = [gram for text in texts for gram in grams(text, n)]
    earlier = sum(g in grams(text, n)[:i] for text in texts for i, g in enumerate(grams(text, n)))
    assert distinct(texts, n) == (len(set(pooled)) / len(pooled) if pooled else 0.0)
    assert repetition(texts, n) == pytest.approx(earlier / len(pooled) if pooled else 0.0)


def bleu(text, others):
    """BLEU-4 of Papineni et al. (2002): clipped precisions, closest length, halving for an order without a match."""
    length, halved, logs = len(text.split()), 1.0, []
    for n in range(1, min(4, length) + 1):
        own, total = Counter(grams(text, n)), len(grams(text, n))
        matches = sum(min(k, max(Counter(grams(other, n))[gram] for other in others)) for gram, k in own.items())
        if n == 1 and not matches:
            return 0.0
        halved = halved if matches else halved / 2
        logs.append(math.log((matches or halved) / total))
    closest = min((len(other.split()) for other in others), key=lambda size: (abs(size - length), size))
    return 100 * math.exp(min(0.0, 1 - closest / length) + sum(logs) / len(logs)) if logs else 0.0


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_self_bleu_matches_a_plain_bleu_against_all_the_others(texts):
    expected = [bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)] if len(texts) > 1 else [0.0]
    assert self_bleu(texts) == pytest.approx(np.mean(expected), abs=1e-9)


def test_self_bleu_runs_from_0_to_100_on_evenly_spaced_texts():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(100)
    assert self_bleu(["a b", "a b"]) == pytest.approx(100)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0
    texts = ["a b c d e", "x x x x", "a b c d f", "y y y y", "a b c d g"]
    assert self_bleu(texts, most=3) == pytest.approx(self_bleu(texts[::2]))
    assert self_bleu(texts, most=3) > self_bleu(texts)


def test_zipf_coefficient_of_an_exact_power_law():
    power = [f"w{rank} " * (60 // rank**2) for rank in (1, 2)] + [""]
    assert zipf_coefficient(["".join(f"w{rank} " * (60 // rank) for rank in range(1, 7))]) == pytest.approx(1)
    assert zipf_coefficient(power) == pytest.approx(2)
    assert zipf_coefficient(["a b c"]) == pytest.approx(0, abs=1e-12)
    assert zipf_coefficient(["a a", ""]) == 0.0


@given(*[st.lists(st.integers(0, 12), min_size=1, max_size=6)] * 2)
def test_length_distance_matches_the_sorted_pairing_of_equal_sized_sets(p, q):
    paired = np.abs(np.sort(p * len(q)) - np.sort(q * len(p))).mean()
    assert length_distance(["a " * k for k in p], ["b " * k for k in q]) == pytest.approx(paired)


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 4))
def test_copies_match_a_search_of_every_run(texts, training, n):
    known = [{gram for size in range(1, 10) for gram in grams(text, size)} for text in training]
    pooled = [gram for text in texts for gram in grams(text, n)]
    longest = [
        max((size for size in range(1, 10) if any(set(grams(text, size)) & k for k in known)), default=0)
        for text in texts
    ]
    found = copy_rate(texts, training, n)
    assert found.share == (sum(any(gram in k for k in known) for gram in pooled) / len(pooled) if pooled else 0.0)
    assert found.longest == pytest.approx(np.mean(longest))
    assert found.exact == sum(bool(text) and text in training for text in texts) / len(texts)


def test_copies_by_hand_never_run_from_one_training_text_into_the_next():
    training = ["a b c d", "e f g h i", "k"]
    assert copy_rate(["c d e f"], training, 2) == (2 / 3, 2.0, 0.0)
    assert copy_rate(["e f  g h i", "x", "k", ""], training, 4) == (1.0, 1.5, 0.5)
    assert copy_rate(["a b", "b c"], ["a b c"]) == (0.0, 2.0, 0.0)
    assert copy_rate([""], [""]) == (0.0, 0.0, 0.0)


def cloud(centre, size, seed):
    return np.random.default_rng(seed).normal(scale=0.01, size=(size, 8)) + np.eye(8)[centre]


@pytest.mark.thorough
def test_mauve_of_equal_and_of_far_sets():
    one, other = cloud(0, 40, 0), cloud(1, 40, 1)
    assert mauve(one, one) == pytest.approx(1, abs=1e-6)
    assert mauve(one, other) < 0.01
    assert mauve(one[:1], one[:1]) == 1.0


@pytest.mark.thorough
def test_mauve_matches_its_definition_on_two_clusters():
    p, q = np.array([0.75, 0.25]), np.array([0.25, 0.75])
    curve = [(0.0, 1.0)]
    for weight in np.linspace(1e-6, 1 - 1e-6, 25):
        r = weight * p + (1 - weight) * q
        curve.append((math.exp(-5 * (p * np.log(p / r)).sum()), math.exp(-5 * (q * np.log(q / r)).sum())))
    x, y = np.array([*curve, (1.0, 0.0)]).T
    area = (np.trapezoid(y[np.argsort(x)], np.sort(x)) + np.trapezoid(x[np.argsort(y)], np.sort(y))) / 2
    sides = [np.concatenate([cloud(0, k, k), cloud(1, 20 - k, 20 - k)]) for k in (15, 5)]
    assert mauve(*sides) == pytest.approx(area)


@pytest.mark.thorough
def test_mauve_is_deterministic_and_silent(capfd):
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(90, 16)).astype(np.float32), rng.normal(0.3, size=(70, 16)).astype(np.float32)
    assert 0 < mauve(p, q, seed=1) == mauve(p, q, seed=1) < 1
    mauve(np.ones((20, 4)), np.ones((20, 4)))
    assert capfd.readouterr() == ("", "")
    print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"


@pytest.mark.parametrize(
    ("p", "q"),
    [(np.ones((3, 2)), np.ones((3, 4))), (np.ones((0, 2)), np.ones((3, 2))), (np.ones(3), np.ones(3))],
)
def test_mauve_refuses_shapes_that_do_not_compare(p, q):
    with pytest.raises(InputError, match=r"\[n, D\] and \[m, D\]"):
        mauve(p, q)


def test_mauve_refuses_features_that_are_not_numbers():
    with pytest.raises(InputError, match="finite"):
        mauve(np.full((3, 2), np.nan), np.ones((3, 2)))


def test_diversity_names_every_measure_and_takes_empty_texts():
    texts, training = ["a b c d e f g h", "a b", ""], ["a b c d e f g h", "x"]
    found = diversity(texts, training, training)
    assert set(found) == KEYS | COPY_KEYS
    assert set(diversity(texts, training, None)) == KEYS
    assert (found["copied"], found["longest_copy"], found["exact_copies"]) == (1.0, 10 / 3, 1 / 3)
    assert found["length_distance"] == length_distance(texts, training) == pytest.approx(1 / 3 + 1 / 6 + 6 / 6)
    assert set(diversity([""], [""], [""]).values()) == {0.0}


@pytest.mark.parametrize("call", [unigram_entropy, self_bleu, zipf_coefficient, lambda none: distinct(none, 1)])
def test_no_texts_are_an_error(call):
    with pytest.raises(InputError, match="no texts"):
        call([])


@pytest.mark.parametrize("sides", [([], ["a"], ["a"]), (["a"], [], ["a"]), (["a"], ["a"], [])])
def test_no_texts_on_any_side_are_an_error(sides):
    with pytest.raises(InputError, match="no texts"):
        diversity(*sides)


@pytest.mark.parametrize("call", [distinct, repetition, lambda texts, n: copy_rate(texts, texts, n)])
def test_ngrams_have_words(call):
    with pytest.raises(InputError, match="at least 1 word, not 0"):
        call(["a"], 0)


def test_self_bleu_needs_two_texts_to_compare():
    with pytest.raises(InputError, match="at least 2 texts, not 1"):
        self_bleu(["a", "b"], most=1)


def test_missing_packages_are_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(InputError, match=r"sacrebleu is not installed: pip install 'scorelm\[eval\]'"):
        self_bleu(["a", "b"])
    with pytest.raises(InputError, match=r"mauve-text is not installed: pip install 'scorelm\[eval\]'"):
        mauve(np.ones((2, 2)), np.ones((2, 2)))

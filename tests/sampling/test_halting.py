"""Halting: each criterion on cases worked out by hand, and rows that leave the batch without a trace on the others."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.model.prediction import Prediction
from scorelm.sampling.halting import CRITERIA, make_halting

from .steps import BOS, EOS, INF, NEVER, free, records

# --- the criteria, by hand --------------------------------------------------------------------------------------------


def seen(*rows):
    """What one step sees: for each row a list with, for each position, its law over three tokens or None (closed)."""
    law_BLV = torch.tensor([[[0.0] * 3 if law is None else law for law in row] for row in rows])
    open_BL = torch.tensor([[law is not None for law in row] for row in rows])
    logits_NV = law_BLV[open_BL].log() + 0.7  # a logit means nothing but its distance to the others
    return Prediction.of(logits_NV, open_BL, torch.eye(3))


SURE, HALF, FLAT = [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]


def halted(rule, *rows):
    """Which rows halt, of those that have open positions; the others have nothing to halt."""
    prediction = seen(*rows)
    return (rule(prediction) & prediction.open_BL.any(1)).tolist()


def test_entropy_is_the_mean_over_open_positions():
    """log 2 / 2 = 0.347 for one sure and one even position; closed positions don't count."""
    for threshold, expected in ((0.34, [False, True, False]), (0.35, [True, True, False]), (0.7, [True, True, True])):
        rule = make_halting(f"entropy:{threshold}").start()
        assert halted(rule, [SURE, HALF, None], [SURE, None, SURE], [None, HALF, None]) == expected
    assert halted(make_halting("entropy:0").start(), [SURE, SURE], [SURE, [0.999, 0.001, 0.0]]) == [True, False]
    exactly = float(seen([HALF]).entropy_N)
    assert halted(make_halting(f"entropy:{exactly}").start(), [HALF]) == [True]  # at the threshold is within it


def test_kl_is_the_mean_divergence_from_the_step_before():
    """KL(half || 3/4, 1/4) = log 2 - log 3 / 2 = 0.1438; the other way round it is 0.1308."""
    skew = [0.75, 0.25, 0.0]
    forward, backward = math.log(2) - math.log(3) / 2 + 0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward == pytest.approx(0.1438, abs=1e-4) and backward == pytest.approx(0.1308, abs=1e-4)
    for threshold, expected in ((0.14, False), (0.145, True)):
        rule = make_halting(f"kl:{threshold}").start()
        assert halted(rule, [skew]) == [False]  # nothing to compare with yet
        assert halted(rule, [HALF]) == [expected]
    for threshold, expected in ((0.13, False), (0.132, True)):
        rule = make_halting(f"kl:{threshold}").start()
        assert halted(rule, [HALF]) == [False] and halted(rule, [skew]) == [expected]
    for threshold, expected in ((0.07, False), (0.073, True)):  # beside a position that has not changed, half of it
        rule = make_halting(f"kl:{threshold}").start()
        halted(rule, [skew, FLAT, None])
        assert halted(rule, [HALF, FLAT, None]) == [expected]


def test_kl_compares_with_the_step_just_before():
    rule = make_halting("kl:0.01").start()
    steps = [HALF, FLAT, HALF, [0.51, 0.49, 0.0], [0.51, 0.49, 0.0]]
    assert [halted(rule, [law])[0] for law in steps] == [False, False, False, True, True]


def test_kl_of_what_was_ruled_out_is_infinite_and_of_what_is_ruled_out_now_nothing():
    rule = make_halting("kl:1000").start()
    assert halted(rule, [HALF]) == [False]
    assert halted(rule, [FLAT]) == [False]  # a token appears that had no probability
    assert halted(rule, [HALF]) == [True]  # one disappears: log(3/2)
    strict = make_halting("kl:0.4").start()
    halted(strict, [FLAT])
    assert halted(strict, [HALF]) == [False]  # 0.405
    exact = make_halting("kl:0").start()
    halted(exact, [HALF])
    assert halted(exact, [HALF]) == [True]


def test_patience_counts_steps_without_change():
    """`patience:2`: the same likeliest tokens as in the step before, twice running."""
    zero, one = [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]
    rule = make_halting("patience:2").start()
    steps = [[zero, one], [zero, one], [one, one], [one, one], [one, [0.4, 0.6, 0.0]], [one, one]]
    assert [halted(rule, row)[0] for row in steps] == [False, False, False, False, True, True]
    first = make_halting("patience:1").start()
    assert [halted(first, [law])[0] for law in (zero, zero, one, one)] == [False, True, False, True]
    long = make_halting("patience").start()
    assert [halted(long, [zero])[0] for _ in range(10)] == [False] * 5 + [True] * 5


def test_memory_is_each_rows_own():
    """Rows come and go: what a row remembers stays while it is away, and is not mixed with its neighbours'."""
    zero, one, two = [0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.2, 0.8]
    away = [None, None]
    patience = make_halting("patience:2").start()
    steps = [
        ([zero, one], [one, one]),
        ([zero, one], away),
        (away, [one, two]),  # the second row has changed
        ([zero, one], [one, two]),  # the first has now been the same twice
        (away, [one, two]),
    ]
    expected = [[False, False], [False, False], [False, False], [True, False], [False, True]]
    assert [halted(patience, *rows) for rows in steps] == expected
    patience = make_halting("patience:2").start()
    steps = [([zero], [one]), ([zero], [None]), ([zero], [one]), ([zero], [one])]  # being away is no step
    assert [halted(patience, *rows)[1] for rows in steps] == [False, False, False, True]
    kl = make_halting("kl:0.001").start()
    steps = [([zero, one], [two, two]), (away, [two, two]), ([zero, one], away), ([one, one], [two, two])]
    assert [halted(kl, *rows) for rows in steps] == [[False, False], [False, True], [True, False], [False, True]]


def test_a_position_that_closes_does_not_disturb_the_others():
    zero, one = [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]
    patience, kl = make_halting("patience:2").start(), make_halting("kl:0.001").start()
    for rule in (patience, kl):
        halted(rule, [zero, one])
    assert halted(kl, [None, one]) == [True] and halted(patience, [None, one]) == [False]
    assert halted(kl, [None, one]) == [True] and halted(patience, [None, one]) == [True]


def test_a_position_that_opens_is_new():
    """The next block of a row begins from nothing."""
    zero, one = [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]
    patience, kl = make_halting("patience:1").start(), make_halting("kl:100").start()
    for rule in (patience, kl):
        assert halted(rule, [zero, None]) == [False] and halted(rule, [zero, None]) == [True]
        assert halted(rule, [None, one]) == [False] and halted(rule, [None, one]) == [True]


def test_every_generation_starts_afresh():
    """One `Halting` may serve many generations."""
    for text in ("patience:1", "kl:1"):
        halting = make_halting(text)
        first, second = halting.start(), halting.start()
        assert halted(first, [HALF]) == [False] and halted(second, [HALF]) == [False]
        assert halted(first, [HALF]) == [True] and halted(second, [HALF]) == [True]


laws = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3).map(lambda w: [x / sum(w) for x in w])


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(laws, min_size=4, max_size=4),
    now=st.lists(laws, min_size=4, max_size=4),
    opened=st.lists(st.booleans(), min_size=4, max_size=4),
    threshold=st.floats(0.001, 1.0),
)
def test_entropy_and_kl_against_loops(before, now, opened, threshold):
    """Two rows of two positions."""
    before, now = ([law if o else None for law, o in zip(laws_, opened, strict=True)] for laws_ in (before, now))
    kl, entropy = make_halting(f"kl:{threshold:.6f}").start(), make_halting(f"entropy:{threshold:.6f}").start()
    halted(kl, before[:2], before[2:])
    found = halted(kl, now[:2], now[2:]), halted(entropy, now[:2], now[2:])
    for row in range(2):
        pairs = [(p, q) for p, q in zip(now, before, strict=True)][2 * row : 2 * row + 2]
        pairs = [(p, q) for p, q in pairs if p is not None]
        if not pairs:
            assert not found[0][row] and not found[1][row]
            continue
        divergence = sum(a * math.log(a / b) for p, q in pairs for a, b in zip(p, q, strict=True)) / len(pairs)
        nats = -sum(a * math.log(a) for p, _ in pairs for a in p) / len(pairs)
        for value, is_halted in ((divergence, found[0][row]), (nats, found[1][row])):
            assert abs(value - threshold) < 1e-5 or is_halted == (value <= threshold)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names():
    assert set(CRITERIA) == {"entropy", "patience", "kl"}
    assert [make_halting(n).name for n in ("entropy", "patience", "kl")] == ["entropy:0.2", "patience:5", "kl:0.001"]
    for text in ("entropy:0.3", "patience:3", "kl:0.5", "entropy:0", "kl:0"):
        assert make_halting(text).name == text


@pytest.mark.parametrize(
    "text",
    ["", "boredom", "Entropy", "entropy:-1", "entropy:nan", "entropy:inf", "entropy:x", "entropy:1,2", "patience:0",
     "patience:-3", "patience:1.5", "patience:nan", "patience:inf", "kl:-0.1", "kl:nan", "kl:inf"],
)  # fmt: skip
def test_bad_criteria_are_refused_in_one_line(lm, text):
    with pytest.raises(ValueError) as error:
        make_halting(text)
    assert "\n" not in str(error.value) and (text.partition(":")[2] or text) in str(error.value)
    if text:
        with pytest.raises(ValueError):
            lm.generate(["the"], halt=text)


# --- rows that leave --------------------------------------------------------------------------------------------------


TEMPLATES = [
    [BOS, 5, 6, 7, 8, 9, 10, 11, None, 12, 13, EOS],
    [BOS, None, None, None, None, None, None, None, None, EOS],
    [BOS, 20, None, None, 30, EOS],
    [BOS, None, None, 7, None, EOS],
]


def expected_steps(found, row, halt):
    """Evaluations until a row halts, from the records of a generation that did not: all positions open to the end."""
    name, _, number = halt.partition(":")
    columns, same = free(TEMPLATES[row]), 0
    for k, record in enumerate(found):
        if name == "entropy":
            if float(record.entropy_BL[row, columns].double().mean()) <= float(number):
                return k + 1
        elif k and k < len(found) - 1:  # in the last record the tokens are drawn ones
            same = same + 1 if torch.equal(record.ids_BL[row, columns], found[k - 1].ids_BL[row, columns]) else 0
            if same >= float(number):
                return k + 1
    return len(found)


@pytest.mark.parametrize(
    ("solver", "halt"),
    [("posterior", "entropy:1"), ("euler", "entropy:2"), ("dpmpp_2m", "patience:1"), ("posterior", "patience:2")],
)
def test_rows_leave_when_the_criterion_says_so(calm_lm, solver, halt):
    """The moment is known from a run without halting, since a row is the same until it halts and alone in its draws."""
    whole = records(calm_lm, TEMPLATES, solver=solver, steps=12)
    found = records(calm_lm, TEMPLATES, halt=halt, solver=solver, steps=12)
    expected = [expected_steps(whole, row, halt) for row in range(4)]
    assert found[-1].nfe_B.tolist() == expected
    assert len(set(expected)) > 1 and min(expected) < len(whole)  # some halt, and not all at once
    assert len(found) == max(expected)
    for k, record in enumerate(found):
        assert record.nfe_B.tolist() == [min(n, k + 1) for n in expected]
        for row, n in enumerate(expected):
            columns = free(TEMPLATES[row])
            if k + 1 < n:
                assert torch.equal(record.ids_BL[row], whole[k].ids_BL[row])
                assert torch.equal(record.sigma_BL[row], whole[k].sigma_BL[row])
                torch.testing.assert_close(record.entropy_BL[row], whole[k].entropy_BL[row], rtol=1e-3, atol=1e-3)
            else:
                assert (record.sigma_BL[row] == 0).all()
                assert torch.equal(record.ids_BL[row], found[n - 1].ids_BL[row])  # it does not change any more
                assert not torch.isin(record.ids_BL[row, columns], NEVER).any()
                assert ((record.entropy_BL[row, columns] > 0) == (k + 1 == n)).all()
    if solver != "posterior":  # what a halted row writes is its likeliest tokens
        for row, n in enumerate(expected):
            if n < len(whole):
                assert torch.equal(found[n - 1].ids_BL[row], whole[n - 1].ids_BL[row])


@pytest.mark.parametrize("halt", ["kl:1e9", "patience:1", "entropy:1e9"])
@pytest.mark.parametrize("path", ["uniform", "confidence", "entropy:0.2", "shuffled"])
def test_halting_at_the_first_chance(lm, halt, path):
    """By entropy after one evaluation; against the step before after two, at the least."""
    last = records(lm, TEMPLATES, halt=halt, path=path, steps=12)[-1]
    assert (last.sigma_BL == 0).all()
    if halt.startswith("entropy"):
        assert last.nfe_B.tolist() == [1] * 4
    elif halt.startswith("kl"):
        assert (last.nfe_B <= 2).all() and int(last.nfe_B[1]) == 2
    else:
        assert (last.nfe_B >= 1).all() and int(last.nfe_B[1]) >= 2


def test_a_threshold_of_nothing_never_halts(lm):
    plain = records(lm, TEMPLATES, steps=12)[-1]
    for halt in ("entropy:0", "kl:0", "patience:100"):
        last = records(lm, TEMPLATES, halt=halt, steps=12)[-1]
        assert torch.equal(last.ids_BL, plain.ids_BL) and last.nfe_B.tolist() == [12] * 4


@pytest.mark.parametrize(
    ("solver", "halt", "each"),
    [("posterior", "entropy:1e9", 1), ("heun", "kl:1e9", 2), ("sde", "entropy:1e9", 1), ("euler", "kl:1e9", 2)],
)
def test_a_block_that_halts_does_not_finish_later_ones(lm, solver, halt, each):
    """Nine free positions in blocks of three, of at least four steps each; every block halts at its first chance."""
    template = [BOS, *[None] * 9, EOS]
    steps = 24 if solver in ("heun", "sde") else 12
    found = records(lm, [template], halt=halt, path="blocks:3", solver=solver, steps=steps)
    for k, record in enumerate(found):
        block = k // each  # the one that is under way
        sigma = record.sigma_BL[0, 1:10].view(3, 3)
        assert (sigma[:block] == 0).all() and (sigma[block + 1 :] == INF).all()
        assert (sigma[block] == 0).all() if (k + 1) % each == 0 else (sigma[block] > 0).all()
    assert len(found) == 3 * each
    assert int(found[-1].nfe_B[0]) == 3 * each  # from no evidence and to nothing there is no second stage
    assert not torch.isin(found[-1].ids_BL[0, 1:10], NEVER).any()
    for earlier, later in pairwise(found):
        done = earlier.sigma_BL == 0
        assert torch.equal(earlier.ids_BL[done], later.ids_BL[done])


def test_rows_at_different_blocks_halt_by_themselves(calm_lm):
    """One row's block may halt while the other's goes on, and each row takes the steps that it takes alone."""
    templates = [[BOS, *[None] * 9, EOS], [BOS, 5, 6, 7, 8, *[None] * 4, EOS], [BOS, None, None, EOS]] * 2
    how, different = {"path": "blocks:3", "steps": 14}, 0
    plain = records(calm_lm, templates, **how)[-1]
    for halt in ("patience:1", "entropy:2", "kl:2"):
        together = records(calm_lm, templates, halt=halt, **how)[-1]
        assert (together.nfe_B <= plain.nfe_B).all() and together.nfe_B.sum() < plain.nfe_B.sum()
        for row, template in enumerate(templates):
            alone = records(calm_lm, [template], [row], halt=halt, **how)[-1]
            same = torch.equal(alone.ids_BL[0], together.ids_BL[row, : len(template)])
            different += not (same and int(alone.nfe_B[0]) == int(together.nfe_B[row]))
    assert different <= 1, f"{different} of 18 rows differ"


def test_through_generate(lm):
    """In words, with text that is complete."""
    whole = lm.generate(["the light"], n=4, path="uniform", steps=16, length=12)
    halted_ = lm.generate(["the light"], n=4, path="uniform", steps=16, length=12, halt="entropy:1.5")
    assert sum(one.nfe for one in halted_) < sum(one.nfe for one in whole)
    for one in halted_:
        assert len(one.ids) == 12 and one.ids[-1] == EOS and one.text.startswith("the light")
        assert not set(one.ids[1:-1]) & set(NEVER.tolist())

"""Guidance: against the formulas and brute force, bit for bit nothing at its fixed points, and what it costs."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scorelm.sampling.guidance import guided, keep_likeliest
from scorelm.sampling.solvers import make_solver

from .steps import BOS, EOS, INF, PAD, entropy, judged, records

VOCAB = 50


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm(lengths=[0] * 5 + [1] * 12)


# --- top-k and top-p --------------------------------------------------------------------------------------------------


def kept(logits, top_k, top_p):
    """Which tokens stay: with fewer than k likelier ones, and then, from the likeliest on, until p is made up."""
    tokens = list(range(len(logits)))
    if top_k:
        tokens = [i for i in tokens if sum(other > logits[i] for other in logits) < top_k]
    tokens.sort(key=lambda i: (-logits[i], i))
    weight = [math.exp(logits[i] - logits[tokens[0]]) for i in tokens]
    stay, made_up, sums = set(), 0.0, []
    for token, part in zip(tokens, weight, strict=True):
        if made_up >= top_p:
            break
        stay.add(token)
        made_up += part / sum(weight)
        sums.append(made_up)
    return stay, sums


tied = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=9)
smooth = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(logits=tied | smooth, top_k=st.integers(0, 11), top_p=st.floats(1e-6, 1.0) | st.just(1.0))
def test_keep_likeliest_against_a_loop(logits, top_k, top_p):
    """Equally likely tokens: all that tie for the k-th place stay; for p the first of them do."""
    stay, sums = kept(logits, top_k, top_p)
    assume(top_p == 1 or all(abs(total - top_p) > 1e-7 for total in sums))
    found = keep_likeliest(torch.tensor([logits]), top_k, top_p)[0]
    if top_p == 1:
        stay = kept(logits, top_k, 2.0)[0]
    for token, logit in enumerate(logits):
        assert float(found[token]) == (logit if token in stay else -INF)


@settings(max_examples=100, deadline=None)
@given(logits=st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=12), top_p=st.floats(0.01, 0.99))
def test_the_kept_are_the_likeliest_and_the_fewest_that_reach_p(logits, top_p):
    logits_1V = torch.tensor([logits, logits[::-1]])
    p_1V = logits_1V.double().softmax(-1)
    for p_V, stays_V in zip(p_1V, keep_likeliest(logits_1V, 0, top_p).isfinite(), strict=True):
        total, least = float(p_V[stays_V].sum()), float(p_V[stays_V].min())
        assert stays_V.any() and total >= top_p - 1e-9
        assert total - least < top_p + 1e-9
        assert stays_V.all() or float(p_V[~stays_V].max()) <= least


@settings(max_examples=40, deadline=None)
@given(logits=smooth, top_k=st.integers(1, 12))
def test_top_k_keeps_k(logits, top_k):
    assume(len(set(logits)) == len(logits))
    found = keep_likeliest(torch.tensor([logits]), top_k, 1.0)[0]
    assert int(found.isfinite().sum()) == min(top_k, len(logits))
    assert sorted(found[found.isfinite()].tolist()) == sorted(logits)[-top_k:]


def test_one_always_stays():
    logits_NV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-INF, -INF, -5.0, -INF], [2.0, 2.0, 2.0, 2.0]])
    found = keep_likeliest(logits_NV, 0, 1e-300)
    assert found.isfinite().nonzero().tolist() == [[0, 1], [1, 2], [2, 0]]
    assert keep_likeliest(logits_NV[:2], 1, 1.0).isfinite().nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]


def test_p_counts_what_k_has_left_and_what_was_ruled_out_stays_out():
    """Of 0.5, 0.25, 0.15, 0.1 the first two are 2/3 and 1/3 of themselves: 0.6 takes one, 0.7 both."""
    logits_1V = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
    assert keep_likeliest(logits_1V, 2, 0.6).isfinite().tolist() == [[False, True, False, False]]
    assert keep_likeliest(logits_1V, 2, 0.7).isfinite().tolist() == [[False, True, False, True]]
    assert keep_likeliest(logits_1V, 0, 0.7).isfinite().tolist() == [[False, True, False, True]]
    assert keep_likeliest(logits_1V, 0, 0.76).isfinite().tolist() == [[True, True, False, True]]
    ruled_out = logits_1V.masked_fill(torch.tensor([[False, True, False, False]]), -INF)
    assert keep_likeliest(ruled_out, 3, 0.999).isfinite().tolist() == [[True, False, True, True]]


def test_temperature_comes_first(lm):
    """A tempered posterior is what `top_p` is counted in: at 3 more tokens make up a half."""
    template = [BOS, 5, None, 9, EOS]
    logits = judged(lm, [BOS, 5, PAD, 9, EOS], [0, 0, INF, 0, 0])[2]
    for temperature in (1.0, 3.0):
        found = float(records(lm, [template], temperature=temperature, top_p=0.5, steps=1)[0].entropy_BL[0, 2])
        stay = sorted(kept((logits / temperature).tolist(), 0, 0.5)[0])
        assert found == pytest.approx(float(entropy(logits[stay] / temperature)), abs=1e-4)


# --- two passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.5, 3.0, 7.5])
def test_guided_is_the_formula(weight):
    """``other + weight (logits - other)``, arXiv 2207.12598, eq. 6 with weight = 1 + w."""
    logits_NV, other_NV = torch.randn(2, 20, 11, generator=torch.Generator().manual_seed(0))
    logits_NV[:, 3] = other_NV[:, 3] = -INF
    found = guided(logits_NV, other_NV, weight)
    expected = other_NV.double() + weight * (logits_NV.double() - other_NV.double())
    assert (found[:, 3] == -INF).all()
    alive = torch.arange(11) != 3
    torch.testing.assert_close(found[:, alive].double(), expected[:, alive], rtol=1e-5, atol=1e-5)


PROMPTED = [BOS, 5, 6, None, None, 9, None, EOS]
FREE = [BOS, None, None, None, None, EOS]
OPEN = [3, 4, 6]


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 4.0])
def test_the_first_step_is_the_formula_with_the_prompt_at_no_evidence(lm, weight):
    record = records(lm, [PROMPTED], guidance=weight, temperature=1.3, steps=4)[0]
    ids = [BOS, 5, 6, PAD, PAD, 9, PAD, EOS]
    given = judged(lm, ids, [0, 0, 0, INF, INF, 0, INF, 0])[OPEN]
    nothing = judged(lm, ids, [0, INF, INF, INF, INF, INF, INF, 0])[OPEN]  # <s> and </s> say where the text ends
    expected = entropy((nothing + weight * (given - nothing)).nan_to_num(nan=-INF) / 1.3)
    torch.testing.assert_close(record.entropy_BL[0, OPEN].double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(entropy(given / 1.3), expected, atol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_on_blocks_the_prompt_has_no_evidence_and_what_was_written_has(lm, weight):
    """The second block sees the first, in which a token was given and the other written."""
    first, second = records(lm, [[BOS, 5, None, None, None, EOS]], guidance=weight, path="blocks:2", steps=2)
    block, written = [0, 2, 2, 4, 4, 6], int(first.ids_BL[0, 2])

    def formula(columns, ids, sigma, finished):
        given = judged(lm, ids, sigma, block=block, finished=finished)[columns]
        nothing = judged(lm, ids, [0, INF, *sigma[2:]], block=block, finished=finished)[columns]
        assert not torch.allclose(entropy(given), entropy(nothing), atol=1e-3)
        return entropy((nothing + weight * (given - nothing)).nan_to_num(nan=-INF))

    expected = formula([2], [BOS, 5, PAD, PAD, PAD, EOS], [0, 0, INF, INF, INF, INF], [])
    torch.testing.assert_close(first.entropy_BL[0, [2]].double(), expected, rtol=1e-4, atol=1e-5)
    expected = formula([3, 4], [BOS, 5, written, PAD, PAD, EOS], [0, 0, 0, INF, INF, INF], [2])
    torch.testing.assert_close(second.entropy_BL[0, 3:5].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "solver"),
    [("uniform", "posterior"), ("ramp:0.5", "heun"), ("confidence", "posterior"), ("blocks:2", "posterior")],
)
def test_with_weight_nothing_only_the_length_of_the_prompt_has_a_say(lm, path, solver):
    """Bit for bit: the same numbers are computed in the same shapes."""

    def walk(weight, *prompt):
        template = [BOS, *prompt[:3], None, None, None, prompt[3], None, EOS]
        return records(lm, [template], guidance=weight, path=path, solver=solver, steps=6)

    free = [4, 5, 6, 8]
    one, two = walk(0.0, 5, 6, 7, 8), walk(0.0, 20, 30, 21, 40)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.ids_BL[0, free], b.ids_BL[0, free]) and torch.equal(a.sigma_BL, b.sigma_BL)
        assert torch.equal(a.entropy_BL, b.entropy_BL)
    assert one[-1].ids_BL[0, [1, 2, 3, 7]].tolist() == [5, 6, 7, 8]  # and what is given stays
    with_prompt = [walk(1.0, 5, 6, 7, 8), walk(1.0, 20, 30, 21, 40)]
    assert not all(torch.equal(a.entropy_BL, b.entropy_BL) for a, b in zip(*with_prompt, strict=False))
    shorter = [BOS, 5, 6, None, None, None, 7, None, EOS]
    other_length = records(lm, [shorter], guidance=0.0, path=path, solver=solver, steps=6)
    assert not torch.equal(other_length[0].entropy_BL[0, [3, 4, 5]], one[0].entropy_BL[0, [4, 5, 6]])


def test_self_guidance_is_the_formula(lm):
    """Left to right: the second step's other pass has no estimate fed back."""
    weight, template = 2.5, [BOS, None, None, 9, EOS]
    first, second = records(lm, [template], self_guidance=weight, path="ramp:1e6", steps=2)
    before = judged(lm, [BOS, PAD, PAD, 9, EOS], [0, INF, INF, 0, 0])[2]
    assert float(first.entropy_BL[0, 2]) == pytest.approx(float(entropy(before)), abs=1e-4)  # nothing to feed back yet
    cond = torch.zeros(1, 5, 16)
    cond[0, 2] = before.softmax(-1).float() @ lm.denoiser.embedding.table().detach()
    written = [BOS, int(first.ids_BL[0, 1]), PAD, 9, EOS]
    fed, plain = (judged(lm, written, [0, 0, INF, 0, 0], cond=c)[2] for c in (cond, None))
    expected = float(entropy((plain + weight * (fed - plain)).nan_to_num(nan=-INF)))
    assert float(second.entropy_BL[0, 2]) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - float(entropy(fed))) > 1e-3


def test_filters_are_what_the_entropy_and_the_draw_see(lm):
    found = records(lm, [[BOS, 5, None, 9, EOS]] * 300, temperature=0.8, top_k=5, top_p=0.9, steps=1)
    logits = judged(lm, [BOS, 5, PAD, 9, EOS], [0, 0, INF, 0, 0])[2] / 0.8
    stay = kept(logits.tolist(), 5, 0.9)[0]
    p = torch.tensor([logits[i] for i in sorted(stay)]).softmax(-1)
    assert float(found[0].entropy_BL[0, 2]) == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-4)
    assert set(found[-1].ids_BL[:, 2].tolist()) == stay and 1 < len(stay) < 6


# --- fixed points and cost --------------------------------------------------------------------------------------------


NEUTRAL = [
    {"guidance": 1.0, "self_guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "score_temperature": 1.0},
    {"top_k": VOCAB},
    {"top_k": 10**6},
]


@pytest.mark.parametrize(
    ("path", "solver"), [("uniform", "ancestral"), ("blocks:3", "dpmpp_2m"), ("entropy", "posterior")]
)
@pytest.mark.parametrize("neutral", NEUTRAL)
def test_fixed_points_change_nothing(lm, path, solver, neutral):
    """Bit for bit, in every record, evaluations included."""
    templates = [PROMPTED, FREE]
    expected = records(lm, templates, path=path, solver=solver, steps=4)
    found = records(lm, templates, path=path, solver=solver, steps=4, **neutral)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert all(
            torch.equal(getattr(one, name), value)
            for name, value in vars(other).items()
            if name not in ("step", "candidates", "before")
        )


def test_fixed_points_of_the_functions():
    logits_NV = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    logits_NV[:, 4] = -INF
    assert torch.equal(guided(logits_NV, torch.randn(5, 9), 1.0), logits_NV)
    assert torch.equal(guided(logits_NV, logits_NV, 3.0), logits_NV)
    for top_k in (0, 9, 10):
        assert torch.equal(keep_likeliest(logits_NV, top_k, 1.0), logits_NV)


@pytest.mark.parametrize(
    ("template", "options", "passes"),
    [
        (PROMPTED, {}, 1),
        (PROMPTED, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}, 1),
        (PROMPTED, {"guidance": 2.0}, 2),
        (PROMPTED, {"guidance": 0.0}, 2),
        (FREE, {"guidance": 2.0}, 1),
        ([BOS, None, None, 7, EOS], {"guidance": 2.0}, 2),
        (PROMPTED, {"self_guidance": 2.0}, 2),
        (FREE, {"self_guidance": 0.0}, 2),
        (PROMPTED, {"guidance": 2.0, "self_guidance": 2.0}, 3),
        (FREE, {"guidance": 2.0, "self_guidance": 2.0}, 2),
    ],
)
@pytest.mark.parametrize("solver", ["posterior", "heun"])
def test_each_further_pass_is_one_evaluation(lm, template, options, passes, solver):
    counts = [int(r.nfe_B[0]) for r in records(lm, [template], solver=solver, steps=4, **options)]
    stages = [1, 2, 1] if solver == "heun" else [1] * 4
    assert counts == [passes * sum(stages[: k + 1]) for k in range(len(stages))]


# --- score temperature ------------------------------------------------------------------------------------------------


def one_line(error, *words):
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 160
    assert all(word in text for word in words), text


@pytest.mark.parametrize("solver", ["posterior", "posterior:5,0.9", "renoise"])
def test_a_score_temperature_needs_a_solver_that_follows_the_score(lm, settings_of, solver):
    with pytest.raises(ValueError) as error:
        settings_of(path="uniform", solver=solver, score_temperature=1.5)
    one_line(error, make_solver(solver).name, "score")
    with pytest.raises(ValueError):
        lm.generate(["the"], solver=solver, score_temperature=0.5)
    assert lm.generate(["the"], solver=solver, score_temperature=1.0, steps=2)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ancestral", "sde"])
def test_other_solvers_take_it(lm, solver):
    """And it changes what is written, from the second step on."""
    plain, hot = (records(lm, [FREE] * 8, score_temperature=t, solver=solver, steps=6) for t in (1.0, 2.0))
    assert torch.equal(plain[0].entropy_BL, hot[0].entropy_BL) and torch.equal(plain[1].entropy_BL, hot[1].entropy_BL)
    assert not torch.equal(plain[-1].entropy_BL, hot[-1].entropy_BL)


# --- bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("temperature", "score_temperature") for value in (-2.5, math.nan, INF, 1001.0)),
        ("score_temperature", 0.0),
        *((name, value) for name in ("guidance", "self_guidance") for value in (-0.5, INF, math.nan, 1001.0)),
        *(("top_k", value) for value in (-1, 2.5, INF, math.nan)),
        *(("top_p", value) for value in (0.0, -0.1, 1.5, math.nan)),
    ],
)
def test_bad_values_are_refused_in_one_line(lm, name, value):
    """By name and value."""
    with pytest.raises(ValueError) as error:
        lm.generate(["the"], **{name: value})
    one_line(error, name, f"{value:g}")
    with pytest.raises(ValueError) as error:
        lm.infill("the ____", **{name: value})
    one_line(error, name, f"{value:g}")


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (2.5, 1.0), (INF, 1.0), (math.nan, 1.0), (0, 0.0), (0, 1.5)])
def test_bad_limits_are_refused_in_one_line(top_k, top_p):
    with pytest.raises(ValueError) as error:
        keep_likeliest(torch.zeros(1, 3), top_k, top_p)
    one_line(error, "top_")

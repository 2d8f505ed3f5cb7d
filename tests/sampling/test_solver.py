"""One step of every solver against its closed form; every posterior here is Bayes' rule on a known law, no network."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.sampling.solvers import SOLVERS as REGISTRY
from scorelm.sampling.solvers import Estimate, Step, ancestral, euler, make_solver, posterior

from .draws import Given, Random, normals
from .laws import F64, INF, PRIOR, SOLVERS, TABLE, E, bayes
from .steps import whole_step

DRAWS_TOKENS = ("posterior", "renoise")
EVERY = pytest.mark.parametrize("name", SOLVERS)


def some_step(count=64, target=None):
    """A step of `count` positions between random levels, its normal and its tokens."""
    gen = torch.Generator().manual_seed(0)
    sigma_N = 0.3 + 6 * torch.rand(count, dtype=F64, generator=gen)
    target_N = sigma_N * torch.rand(count, dtype=F64, generator=gen) if target is None else target
    x_NE = 5 * torch.randn(count, E, dtype=F64, generator=gen)
    eps_NE = torch.randn(count, E, dtype=F64, generator=gen)
    token_N = torch.randint(4, (count,), generator=gen)
    return Step(x_NE, sigma_N, target_N, bayes(x_NE, sigma_N), TABLE, Given(eps_NE, token_N)), eps_NE, token_N


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ancestral", "posterior"])
def test_a_step_adds_evidence_at_the_rate_of_localization(name):
    """y = x / sigma^2, tau = sigma^-2: y += e dtau + sqrt(dtau) eps, with e the mean embedding or a drawn token's.

    For the mean it is the Euler-Maruyama step of localization; to rounding, with the same eps.
    """
    step, eps_NE, token_N = some_step()
    e_NE = bayes(step.x_NE, step.sigma_N).softmax(-1) @ TABLE if name == "ancestral" else TABLE[token_N]
    tau_N1, next_tau_N1 = step.sigma_N[:, None] ** -2, step.target_N[:, None] ** -2
    y_NE = step.x_NE * tau_N1 + e_NE * (next_tau_N1 - tau_N1) + (next_tau_N1 - tau_N1).sqrt() * eps_NE
    torch.testing.assert_close(make_solver(name).move(step), y_NE / next_tau_N1, rtol=1e-9, atol=1e-9)


def test_posterior_is_the_bridge_to_the_drawn_embedding():
    """``p(x' | x, e)`` of two Gaussian levels: precision weighs x by t^2 / s^2; variance t^2 (1 - t^2 / s^2)."""
    step, eps_NE, token_N = some_step()
    kept_N1 = (step.target_N / step.sigma_N)[:, None] ** 2
    expected = kept_N1 * step.x_NE + (1 - kept_N1) * TABLE[token_N]
    expected += step.target_N[:, None] * (1 - kept_N1).sqrt() * eps_NE
    torch.testing.assert_close(posterior().move(step), expected, rtol=0, atol=1e-11)


def test_renoise_is_the_drawn_embedding_and_fresh_noise():
    step, eps_NE, token_N = some_step()
    expected = TABLE[token_N] + step.target_N[:, None] * eps_NE
    torch.testing.assert_close(make_solver("renoise").move(step), expected, rtol=0, atol=1e-12)


def test_mean_and_variance_of_one_ancestral_step():
    """By sampling: the two draws of a step, if there are two, are independent and the noise has the right size."""
    count, sigma, target = 100_000, 3.0, 1.0
    x_E = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=F64)
    full = torch.full((count,), 1.0, dtype=F64)
    x_NE = x_E.expand(count, E)
    draws = Random(count, torch.Generator().manual_seed(0))
    moved_NE = ancestral(1.0).move(
        Step(x_NE, sigma * full, target * full, bayes(x_NE, sigma * full), TABLE, draws)
    )  # fmt: skip
    x0_E = bayes(x_E[None], full[:1] * sigma).softmax(-1)[0] @ TABLE
    dtau = target**-2 - sigma**-2
    mean_E = (x_E / sigma**2 + x0_E * dtau) * target**2
    deviation = math.sqrt(dtau) * target**2
    assert (moved_NE.mean(0) - mean_E).abs().max() < 5 * deviation / math.sqrt(count)
    assert (moved_NE.T.cov() / deviation**2 - torch.eye(E, dtype=F64)).abs().max() < 5 * math.sqrt(2 / count)


@settings(max_examples=100, deadline=None)
@given(eta=st.floats(0, 1), sigma=st.floats(1e-2, 1e3), share=st.floats(0, 1))
def test_noise_and_signal_of_a_step_add_up(eta, sigma, share):
    """The variance around x0 after a step is target^2, whatever eta: residual and fresh noise are orthogonal."""
    target = sigma * share
    one = torch.ones(1, dtype=F64)
    table = torch.zeros(1, E, dtype=F64)  # a vocabulary of one word at the origin, so that x0 = 0

    def move(x, eps):
        draws = Given(torch.full((1, E), eps, dtype=F64))
        x_NE = torch.full((1, E), x, dtype=F64)
        step = Step(x_NE, sigma * one, target * one, torch.zeros(1, 1, dtype=F64), table, draws)
        return float(ancestral(eta).move(step)[0, 0])

    kept, fresh = move(sigma, 0.0), move(0.0, 1.0)
    assert kept >= 0 and fresh >= 0
    assert kept**2 + fresh**2 == pytest.approx(target**2, rel=1e-9, abs=1e-12)


def test_euler_keeps_quantiles_in_one_dimension():
    """In 1-D the probability flow is the monotone map between marginals: F_sigma(x) is constant along it."""
    table, prior = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.7, 0.3], dtype=F64)

    def quantile(x_N, sigma):
        return torch.distributions.Normal(table[:, 0], sigma).cdf(x_N[:, None]) @ prior

    start_NE = torch.linspace(-12, 12, 41, dtype=F64)[:, None]
    x_NE, never = start_NE, Given(torch.full_like(start_NE, math.nan))
    for sigma, target in pairwise(torch.linspace(6.0, 0.3, 1501, dtype=F64)):
        logits_NV = prior.log() - (x_NE - table[:, 0]) ** 2 / (2 * sigma**2)
        x_NE = euler().move(Step(x_NE, sigma.expand(41), target.expand(41), logits_NV, table, never))
    assert (quantile(x_NE[:, 0], 0.3) - quantile(start_NE[:, 0], 6.0)).abs().max() < 5e-3
    assert (x_NE[:, 0].diff() > 0).all()


# --- the ends, and steps that are none --------------------------------------------------------------------------------


@EVERY
def test_the_same_level_again_changes_nothing(name):
    sigma_N = torch.tensor([0.3, 1.0, 4.0, 100.0], dtype=F64)
    x_NE = 3 * normals(4, E, seed=11)
    before = Estimate(normals(4, E, seed=12), 2 * sigma_N)
    step = Step(x_NE, sigma_N, sigma_N, bayes(x_NE, sigma_N), TABLE, Given(normals(4, E)), before)
    torch.testing.assert_close(whole_step(make_solver(name), step, bayes), x_NE, rtol=1e-10, atol=1e-10)


@EVERY
def test_a_finished_position_stays_what_it_is(name):
    """sigma = target = 0, which the contract of `Step` allows."""
    zero_N = torch.zeros(4, dtype=F64)
    step = Step(
        TABLE.clone(), zero_N, zero_N, 100 * torch.eye(4, dtype=F64), TABLE,
        Given(torch.ones(4, E, dtype=F64), torch.arange(4)),
    )  # fmt: skip
    torch.testing.assert_close(whole_step(make_solver(name), step, bayes), TABLE)


@EVERY
def test_target_zero_is_the_clean_estimate(name):
    """From a level in between, and from no evidence at all."""
    step, eps_NE, token_N = some_step(target=torch.zeros(64, dtype=F64))
    for sigma_N, logits_NV in (
        (step.sigma_N, step.logits_NV),
        (torch.full((64,), INF, dtype=F64), PRIOR.log().expand(64, 4)),
    ):
        last = Step(step.x_NE, sigma_N, step.target_N, logits_NV, TABLE, Given(eps_NE, token_N))
        expected = TABLE[token_N] if name in DRAWS_TOKENS else logits_NV.softmax(-1) @ TABLE
        torch.testing.assert_close(whole_step(make_solver(name), last, bayes), expected)


@EVERY
def test_from_no_evidence_the_state_has_no_say(name):
    """At level 5 from inf it is fresh noise around the mean under the prior, or around tokens drawn from it."""
    count, solver = 20_000, make_solver(name)
    sigma_N, target_N = torch.full((count,), INF, dtype=F64), torch.full((count,), 5.0, dtype=F64)
    moved = []
    for x in (0.0, 1e9):
        draws = Random(count, torch.Generator().manual_seed(0))
        x_NE = torch.full((count, E), x, dtype=F64)
        logits_NV = PRIOR.log().expand(count, 4)
        moved.append(whole_step(solver, Step(x_NE, sigma_N, target_N, logits_NV, TABLE, draws), bayes))
    assert torch.equal(*moved)
    mean_E = PRIOR @ TABLE
    law_EE = 25 * torch.eye(E, dtype=F64)
    if name in DRAWS_TOKENS:
        law_EE = law_EE + (TABLE.T * PRIOR) @ TABLE - mean_E[:, None] * mean_E
    assert (moved[0].mean(0) - mean_E).abs().max() < 4.5 * 5.4 / math.sqrt(count)
    assert (moved[0].T.cov() - law_EE).abs().max() < 5 * 29 * math.sqrt(2 / count)


@EVERY
def test_single_precision_in_and_out(name):
    sigma_N = torch.tensor([INF, INF, 5.0, 2.0, 1.0, 1.0, 0.0], dtype=F64)
    target_N = torch.tensor([6.0, 0.0, 2.0, 0.0, 0.5, 1.0, 0.0], dtype=F64)
    x_NE, eps, tokens = 2 * normals(7, E, seed=13), normals(7, E, seed=14), torch.arange(7) % 4
    before = Estimate(normals(7, E, seed=15), torch.tensor([INF, INF, 8.0, 3.0, 2.0, 1.5, 0.5], dtype=F64))
    moved = {}
    for dtype in (F64, torch.float32):
        step = Step(
            x_NE.to(dtype), sigma_N.to(dtype), target_N.to(dtype), bayes(x_NE, sigma_N).to(dtype), TABLE.to(dtype),
            Given(eps.to(dtype), tokens), Estimate(*(t.to(dtype) for t in before)),
        )  # fmt: skip
        moved[dtype] = whole_step(
            make_solver(name), step, lambda x, s, dtype=dtype: bayes(x.double(), s.double()).to(dtype)
        )  # fmt: skip
        assert moved[dtype].dtype == dtype and torch.isfinite(moved[dtype]).all()
    torch.testing.assert_close(moved[torch.float32].double(), moved[F64], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["heun", "sde"])
def test_a_correction_is_one_further_evaluation_except_to_nothing_and_from_no_evidence(name):
    asked = []

    def counted(x_NE, sigma_N):
        asked.append(sigma_N)
        return bayes(x_NE, sigma_N)

    def evaluations(sigma, target):
        asked.clear()
        sigma_N, target_N = (torch.tensor(level, dtype=F64) for level in (sigma, target))
        x_NE, eps_NE = (5 * normals(len(sigma), E, seed=k) for k in (1, 2))
        step = Step(x_NE, sigma_N, target_N, bayes(x_NE, sigma_N), TABLE, Given(eps_NE))
        whole_step(make_solver(name), step, counted)
        return len(asked)

    assert evaluations([3.0, 3.0], [1.0, 1.0]) == 1
    assert evaluations([3.0, 3.0], [0.0, 0.0]) == 0 and evaluations([INF, INF], [3.0, 0.0]) == 0
    assert evaluations([INF, 2.0, 2.0], [3.0, 0.0, 1.0]) == 1
    assert asked[0].tolist() == [INF, 2.0, 1.0]  # the others stand where they stood


def test_churn_is_edm_gamma():
    sigma = torch.tensor([0.0, 0.1, 0.5, 1.0, 5.0, 5.1, INF], dtype=F64)
    raised = make_solver("sde:10,1,0.5,5").churn(sigma, 100)
    torch.testing.assert_close(raised, torch.tensor([0, 0.1, 0.55, 1.1, 5.5, 5.1, INF], dtype=F64))
    capped = make_solver("sde:10").churn(sigma, 3)
    torch.testing.assert_close(capped, sigma * math.sqrt(2))
    assert make_solver("sde:1,0.9").churn_noise == 0.9
    assert torch.equal(make_solver("sde:0").churn(sigma, 7), sigma)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ancestral:0", "ancestral", "heun"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_score_temperature_divides_the_score(name, temperature):
    """One step to a far lower level: around ``x + (x0 - x) / T``, and around x0 itself where there is no evidence."""
    gen = torch.Generator().manual_seed(0)
    table_VE = torch.randn(5, 3, dtype=F64, generator=gen)
    x_NE, eps_NE = torch.randn(2, 4, 3, dtype=F64, generator=gen)
    logits_NV = torch.randn(4, 5, dtype=F64, generator=gen)
    sigma_N = torch.tensor([2.0, 3.0, INF, INF], dtype=F64)
    target_N = torch.tensor([0.0, 1e-9, 1e-9, 0.0], dtype=F64)
    step = Step(x_NE, sigma_N, target_N, logits_NV, table_VE, Given(eps_NE), score_temperature=temperature)
    x0_NE = logits_NV.softmax(-1) @ table_VE
    expected = torch.where(sigma_N[:, None].isinf(), x0_NE, x_NE + (x0_NE - x_NE) / temperature)
    moved_NE = whole_step(make_solver(name), step, lambda x_NE, sigma_N: logits_NV)
    rows = [0, 2, 3] if name == "heun" else [0, 1, 2, 3]  # heun's slope at the far end is 1e9 times as long
    torch.testing.assert_close(moved_NE[rows], expected[rows], rtol=0, atol=1e-7)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "stochastic"),
    [
        ("euler", "euler", False),
        ("posterior", "posterior", True),
        ("posterior:50,0.9", "posterior:50,0.9", True),
        ("ancestral", "ancestral:1", True),
        ("ancestral:0.5", "ancestral:0.5", True),
        ("ancestral:0", "ancestral:0", True),
        ("sde", "sde:40,1,0,inf", True),
    ],
)
def test_make_solver(text, name, stochastic):
    solver = make_solver(text)
    assert (solver.name, solver.stochastic) == (name, stochastic)
    assert make_solver(solver.name).name == name


@pytest.mark.parametrize(
    "text",
    ["", "simpson", "Euler", "euler:1", "posterior:0.5", "sde:-1", "sde:1,1,3,2", "sde:1,2,3,4,5",
     "ancestral:x", "ancestral:-0.1", "ancestral:1.5", "ancestral:nan", "ancestral:inf", "ancestral:0.5:1"],
)  # fmt: skip
def test_bad_solvers_are_refused(text):
    with pytest.raises(ValueError) as error:
        make_solver(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["posterior:-1", "posterior:1.5", "posterior:0,0", "posterior:0,2", "posterior:nan"])
def test_bad_limits_of_the_posterior_solver_are_refused_in_one_line(text):
    with pytest.raises(ValueError, match="top_") as error:
        make_solver(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 160


def test_every_solver_is_tested_here():
    assert {name.partition(":")[0] for name in SOLVERS} == set(REGISTRY)
    for name, make in REGISTRY.items():
        assert make_solver(name).name.partition(":")[0] == name and inspect.getdoc(make)

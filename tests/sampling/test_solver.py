"""Solvers against exact laws: every posterior here is Bayes' rule on an enumerable law, no network."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.sampling.paths import make_path
from scorelm.noise.plan import Observation, Plan
from scorelm.noise.schedule import Power
from scorelm.sampling.solvers import Step, ancestral, euler, make_solver, posterior

INF = math.inf
F64 = torch.float64
PRIOR = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=F64)
E = 4
R = math.sqrt(E)


def make_table(seed=0, vocab=4, dtype=F64):
    gen = torch.Generator().manual_seed(seed)
    table = torch.randn(vocab, E, dtype=F64, generator=gen)
    return (R * table / table.norm(dim=-1, keepdim=True)).to(dtype)


TABLE = make_table()


class Random:
    """Draws for a step of N positions from one seeded generator."""

    def __init__(self, count, seed=0, dtype=F64):
        self.count, self.dtype = count, dtype
        self.gen = torch.Generator().manual_seed(seed)

    def normal(self):
        return torch.randn(self.count, E, dtype=self.dtype, generator=self.gen)

    def token(self, logits_NV):
        u_N1 = torch.rand(len(logits_NV), 1, dtype=self.dtype, generator=self.gen)
        return (u_N1 > logits_NV.softmax(-1).cumsum(-1)[:, :-1]).sum(-1)


class Fixed:
    """The same normal and the same tokens whenever they are asked for, so that a step is a function."""

    def __init__(self, eps_NE, token_N=None):
        self.eps_NE, self.token_N = eps_NE, token_N

    def normal(self):
        return self.eps_NE

    def token(self, logits_NV):
        assert self.token_N is not None
        return self.token_N


def bayes_logits(x_NE, sigma_N, prior_V=PRIOR, table_VE=TABLE):
    """log prior - |x - e|^2 / (2 sigma^2), densities written out; the prior alone at sigma inf."""
    square_NV = (x_NE[:, None] - table_VE).pow(2).sum(-1)
    return prior_V.log() - square_NV / (2 * sigma_N[:, None] ** 2)


def levels(count, low=0.25, high=12.0):
    """From inf down to 0 in `count` steps."""
    if count == 1:
        return [INF, 0.0]
    inner = Power(low, high, rho=4.0).sigma(torch.linspace(1, 0, count - 1, dtype=F64)) if count > 2 else [3.0]
    return [INF, *map(float, inner), 0.0]


def run_one_position(solver, grid, count, seed=0):
    """`count` independent copies of one position along `grid`: the final x."""
    draws, x_NE = Random(count, seed), torch.zeros(count, E, dtype=F64)
    for sigma, target in pairwise(grid):
        sigma_N, target_N = (torch.full((count,), level, dtype=F64) for level in (sigma, target))
        x_NE = solver.move(Step(x_NE, sigma_N, target_N, bayes_logits(x_NE, sigma_N), TABLE, draws))
    return x_NE


def nearest(x_NE, table_VE=TABLE):
    return torch.cdist(x_NE, table_VE).argmin(-1)


def chi_square(ids_N, law_V):
    expected = law_V * len(ids_N)
    return float(((torch.bincount(ids_N, minlength=len(law_V)) - expected) ** 2 / expected).sum())


def some_step(seed=0, count=64, sigma=None, target=None):
    """A step of `count` positions between random levels, (step, eps, token)."""
    gen = torch.Generator().manual_seed(seed)
    sigma_N = 0.3 + 6 * torch.rand(count, dtype=F64, generator=gen) if sigma is None else sigma
    target_N = sigma_N * torch.rand(count, dtype=F64, generator=gen) if target is None else target
    x_NE = 5 * torch.randn(count, E, dtype=F64, generator=gen)
    eps_NE = torch.randn(count, E, dtype=F64, generator=gen)
    token_N = torch.randint(4, (count,), generator=gen)
    step = Step(x_NE, sigma_N, target_N, bayes_logits(x_NE, sigma_N), TABLE, Fixed(eps_NE, token_N))
    return step, eps_NE, token_N


# --- one position, exact posterior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_posterior_is_exact_at_any_number_of_steps(steps):
    x_NE = run_one_position(posterior(), levels(steps), 40_000, seed=steps)
    ids_N = nearest(x_NE)
    torch.testing.assert_close(x_NE, TABLE[ids_N])  # at sigma 0 it is an embedding
    assert chi_square(ids_N, PRIOR) < 16.3  # 3 degrees of freedom: 0.1%


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_posterior_has_the_right_law_on_the_way(steps):
    """At the last level before 0 the state is the mixture of Gaussians: mean, covariance and a chi-square of cells."""
    grid = levels(steps)[:-1]
    x_NE = run_one_position(posterior(), grid, 40_000, seed=steps)
    sigma = grid[-1]
    mean_E = PRIOR @ TABLE
    between_EE = (TABLE.T * PRIOR) @ TABLE - mean_E[:, None] * mean_E
    error = 5 * (sigma + R) / math.sqrt(40_000)
    assert (x_NE.mean(0) - mean_E).abs().max() < error
    expected = between_EE + sigma**2 * torch.eye(E, dtype=F64)
    assert (x_NE.T.cov() - expected).abs().max() < error * (sigma + R) * 1.5
    # Its own posterior, averaged over the law, is the prior.
    assert (bayes_logits(x_NE, torch.full((40_000,), sigma, dtype=F64)).softmax(-1).mean(0) - PRIOR).abs().max() < 0.01


def test_one_step_that_ignores_the_posterior_would_be_noticed():
    """The chi-square above has the power to see a law that is off by two per cent."""
    wrong = PRIOR + torch.tensor([0.02, -0.02, 0, 0], dtype=F64)
    ids_N = torch.multinomial(wrong, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert chi_square(ids_N, PRIOR) > 16.3


def test_ancestral_has_the_right_law_at_many_steps():
    ids_N = nearest(run_one_position(ancestral(1.0), levels(150), 20_000))
    found = torch.bincount(ids_N, minlength=4) / len(ids_N)
    assert float((found - PRIOR).abs().sum() / 2) < 0.015
    few = nearest(run_one_position(ancestral(1.0), levels(3), 20_000))
    assert float((torch.bincount(few, minlength=4) / len(few) - PRIOR).abs().sum() / 2) > 0.03


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_every_eta_has_the_right_law_at_many_steps(eta):
    ids_N = nearest(run_one_position(ancestral(eta), levels(150), 20_000, seed=1))
    found = torch.bincount(ids_N, minlength=4) / len(ids_N)
    assert float((found - PRIOR).abs().sum() / 2) < 0.015


# --- one step ---------------------------------------------------------------------------------------------------------


def test_ancestral_is_the_euler_maruyama_step_of_localization():
    """y = x / sigma^2, tau = sigma^-2: y += x0 dtau + sqrt(dtau) eps, to rounding, with the same eps."""
    step, eps_NE, _ = some_step()
    x0_NE = bayes_logits(step.x_NE, step.sigma_N).softmax(-1) @ TABLE
    tau_N1, next_tau_N1 = step.sigma_N[:, None] ** -2, step.target_N[:, None] ** -2
    y_NE = step.x_NE * tau_N1 + x0_NE * (next_tau_N1 - tau_N1) + (next_tau_N1 - tau_N1).sqrt() * eps_NE
    torch.testing.assert_close(ancestral(1.0).move(step), y_NE / next_tau_N1, rtol=1e-9, atol=1e-9)


def test_posterior_is_the_same_step_towards_a_drawn_embedding():
    step, eps_NE, token_N = some_step()
    tau_N1, next_tau_N1 = step.sigma_N[:, None] ** -2, step.target_N[:, None] ** -2
    y_NE = step.x_NE * tau_N1 + TABLE[token_N] * (next_tau_N1 - tau_N1) + (next_tau_N1 - tau_N1).sqrt() * eps_NE
    torch.testing.assert_close(posterior().move(step), y_NE / next_tau_N1, rtol=1e-9, atol=1e-9)


def test_mean_and_variance_of_one_ancestral_step():
    """By sampling: the two draws of a step, if there are two, are independent and the noise has the right size."""
    count, sigma, target = 200_000, 3.0, 1.0
    x_E = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=F64)
    full = torch.full((count,), 1.0, dtype=F64)
    x_NE = x_E.expand(count, E)
    step = Step(x_NE, sigma * full, target * full, bayes_logits(x_NE, sigma * full), TABLE, Random(count))
    moved_NE = ancestral(1.0).move(step)
    x0_E = bayes_logits(x_E[None], full[:1] * sigma).softmax(-1)[0] @ TABLE
    dtau = target**-2 - sigma**-2
    mean_E = (x_E / sigma**2 + x0_E * dtau) * target**2
    deviation = math.sqrt(dtau) * target**2
    assert (moved_NE.mean(0) - mean_E).abs().max() < 5 * deviation / math.sqrt(count)
    covariance = moved_NE.T.cov() / deviation**2
    assert (covariance - torch.eye(E, dtype=F64)).abs().max() < 0.02


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_is_karras_ancestral_sampler(eta):
    """k-diffusion's get_ancestral_step and sample_euler_ancestral, one position at a time."""
    step, eps_NE, _ = some_step(seed=3)
    moved_NE = ancestral(eta).move(step)
    x0_NE = bayes_logits(step.x_NE, step.sigma_N).softmax(-1) @ TABLE
    for k in range(len(eps_NE)):
        sigma_from, sigma_to = float(step.sigma_N[k]), float(step.target_N[k])
        sigma_up = min(
            sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5
        )  # fmt: skip
        sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
        d = (step.x_NE[k] - x0_NE[k]) / sigma_from
        expected = step.x_NE[k] + d * (sigma_down - sigma_from) + eps_NE[k] * sigma_up
        torch.testing.assert_close(moved_NE[k], expected, rtol=1e-8, atol=1e-8)


def test_euler_is_the_step_of_the_probability_flow():
    step, _, _ = some_step(seed=4)
    x0_NE = bayes_logits(step.x_NE, step.sigma_N).softmax(-1) @ TABLE
    slope = (step.x_NE - x0_NE) / step.sigma_N[:, None]
    expected = step.x_NE + slope * (step.target_N - step.sigma_N)[:, None]
    torch.testing.assert_close(euler().move(step), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ancestral(0.0).move(step), euler().move(step), rtol=0, atol=0)


SOLVERS = [euler(), ancestral(0.0), ancestral(0.5), ancestral(1.0), posterior()]
EVERY = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)


@EVERY
def test_a_step_to_the_same_level_changes_nothing(solver):
    step, _, _ = some_step()
    step = Step(step.x_NE, step.sigma_N, step.sigma_N, step.logits_NV, TABLE, step.draws)
    torch.testing.assert_close(solver.move(step), step.x_NE, rtol=1e-10, atol=1e-10)


@EVERY
def test_a_finished_position_stays_what_it_is(solver):
    """sigma = target = 0, which the contract of Step allows."""
    zero, x_NE = torch.zeros(4, dtype=F64), TABLE.clone()
    logits_NV = 100 * torch.eye(4, dtype=F64)
    step = Step(x_NE, zero, zero, logits_NV, TABLE, Fixed(torch.ones(4, E, dtype=F64), torch.arange(4)))
    torch.testing.assert_close(solver.move(step), TABLE)


@EVERY
def test_target_zero_is_the_clean_estimate(solver):
    step, _, token_N = some_step(target=torch.zeros(64, dtype=F64))
    expected = step.logits_NV.softmax(-1) @ TABLE if solver.name != "posterior" else TABLE[token_N]
    torch.testing.assert_close(solver.move(step), expected)


@EVERY
def test_per_position_levels_are_each_position_alone(solver):
    step, eps_NE, token_N = some_step(count=12)
    sigma_N, target_N = step.sigma_N.clone(), step.target_N.clone()
    sigma_N[0], target_N[3], sigma_N[5], target_N[5] = INF, 0, INF, 0
    mixed = Step(step.x_NE, sigma_N, target_N, step.logits_NV, TABLE, step.draws)
    together = solver.move(mixed)
    assert torch.isfinite(together).all()
    for k in range(12):
        part = slice(k, k + 1)
        draws = Fixed(eps_NE[part], token_N[part])
        alone = Step(step.x_NE[part], sigma_N[part], target_N[part], step.logits_NV[part], TABLE, draws)
        torch.testing.assert_close(together[part], solver.move(alone), rtol=1e-12, atol=1e-12)


@EVERY
def test_from_no_evidence_the_state_is_fresh_noise_around_the_estimate(solver):
    """At the level 5 from inf: x of the step before has no say; mean and variance are those of p(x at 5)."""
    count, target = 50_000, 5.0
    sigma_N, target_N = torch.full((count,), INF, dtype=F64), torch.full((count,), target, dtype=F64)
    logits_NV = PRIOR.log().expand(count, 4)

    def move(x_NE):
        return solver.move(Step(x_NE, sigma_N, target_N, logits_NV, TABLE, Random(count, seed=7)))

    moved_NE = move(torch.zeros(count, E, dtype=F64))
    assert torch.equal(moved_NE, move(torch.full((count, E), 1e9, dtype=F64)))
    mean_E = PRIOR @ TABLE
    covariance_EE = target**2 * torch.eye(E, dtype=F64)
    if solver.name == "posterior":  # the others start around the mean embedding, which differs by O(1 / sigma^2)
        covariance_EE = covariance_EE + (TABLE.T * PRIOR) @ TABLE - mean_E[:, None] * mean_E
    assert (moved_NE.mean(0) - mean_E).abs().max() < 5 * (target + R) / math.sqrt(count)
    assert (moved_NE.T.cov() - covariance_EE).abs().max() < 5 * (target + R) ** 2 * math.sqrt(2 / count)


@EVERY
def test_the_last_step_may_be_the_first(solver):
    count = 100
    sigma_N, target_N = torch.full((count,), INF, dtype=F64), torch.zeros(count, dtype=F64)
    step = Step(torch.zeros(count, E, dtype=F64), sigma_N, target_N, PRIOR.log().expand(count, 4), TABLE, Random(count))
    moved_NE = solver.move(step)
    if solver.name == "posterior":
        torch.testing.assert_close(moved_NE, TABLE[nearest(moved_NE)])
    else:
        torch.testing.assert_close(moved_NE, (PRIOR @ TABLE).expand(count, E))


@EVERY
def test_float32_in_float32_out(solver):
    step, eps_NE, token_N = some_step()
    single = Step(
        step.x_NE.float(), step.sigma_N.float(), step.target_N.float(), step.logits_NV.float(), TABLE.float(),
        Fixed(eps_NE.float(), token_N),
    )  # fmt: skip
    moved_NE = solver.move(single)
    assert moved_NE.dtype == torch.float32
    torch.testing.assert_close(moved_NE.double(), solver.move(step), rtol=1e-3, atol=1e-3)


# --- the deterministic solver -----------------------------------------------------------------------------------------


def flow(steps, x_NE, high=6.0, low=0.4, table=TABLE, prior=PRIOR):
    """Euler from `high` to `low`; its draws are not numbers, so that none can be used."""
    grid = torch.linspace(high, low, steps + 1, dtype=F64)
    for sigma, target in pairwise(grid):
        sigma_N, target_N = sigma.expand(len(x_NE)), target.expand(len(x_NE))
        step = Step(x_NE, sigma_N, target_N, bayes_logits(x_NE, sigma_N, prior, table), table,
                    Fixed(torch.full_like(x_NE, math.nan)))  # fmt: skip
        x_NE = euler().move(step)
    return x_NE


def test_euler_uses_no_noise_and_converges_at_first_order():
    start = 6 * torch.randn(60, E, dtype=F64, generator=torch.Generator().manual_seed(0))
    reference = 2 * flow(4096, start) - flow(2048, start)  # Richardson: second order
    errors = [float((flow(steps, start) - reference).norm(dim=-1).median()) for steps in (32, 64, 128, 256)]
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios)
    assert errors[-1] < 0.03


def test_euler_keeps_quantiles_in_one_dimension():
    """In 1-D the probability flow is the monotone map between marginals: F_sigma(x) is constant along it."""
    table, prior = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.7, 0.3], dtype=F64)

    def quantile(x_N, sigma):
        return torch.distributions.Normal(table[:, 0], sigma).cdf(x_N[:, None]) @ prior

    x_NE = torch.linspace(-12, 12, 41, dtype=F64)[:, None]
    end_NE = flow(1500, x_NE, high=6.0, low=0.3, table=table, prior=prior)
    assert (quantile(end_NE[:, 0], 0.3) - quantile(x_NE[:, 0], 6.0)).abs().max() < 5e-3
    assert (end_NE[:, 0].diff() > 0).all()


# --- a joint law over three dependent tokens --------------------------------------------------------------------------

SEQUENCES = torch.tensor(list(product(range(4), repeat=3)))


def joint_law():
    """Strongly dependent: the second token usually follows the first, the third is usually their sum mod 4."""
    law = torch.tensor([
        float(PRIOR[a]) * (0.85 if b == (a + 1) % 4 else 0.05) * (0.91 if c == (a + b) % 4 else 0.03)
        for a, b, c in SEQUENCES.tolist()
    ], dtype=F64)  # fmt: skip
    return law / law.sum()


LAW = joint_law()
ONE_HOT = torch.nn.functional.one_hot(SEQUENCES, 4).reshape(64, 12).float()


def joint_posterior(x_BLE, sigma_BL, table_VE):
    """log p(token i | all of x) by brute force over the 64 sequences, [B, 3, 4]."""
    square = (x_BLE[:, :, None] - table_VE).pow(2).sum(-1)
    tau = torch.where(sigma_BL == 0, 1e4, sigma_BL.clamp(min=1e-2) ** -2)[..., None]
    evidence = -(square * tau) / 2
    evidence = evidence - evidence.amax(-1, keepdim=True)
    weight = (LAW.float().log() + evidence.reshape(-1, 12) @ ONE_HOT.T).softmax(-1)
    return (weight @ ONE_HOT).clamp(min=1e-12).log().view(-1, 3, 4)


def sample_jointly(path_name, solver, steps, rows, seed=0):
    """Rows of three tokens along a path; the loop of generation, written here again."""
    path, schedule = make_path(path_name), Power(0.3, 16.0, rho=5.0)
    table = TABLE.float()
    free_BL = torch.ones(rows, 3, dtype=torch.bool)
    block_BL = (torch.arange(3) // path.block if path.block else torch.zeros(3).long()).expand(rows, 3)
    gen = torch.Generator().manual_seed(seed)

    class Draws(Random):
        def __init__(self, count):
            super().__init__(count, dtype=torch.float32)
            self.gen = gen

    x_BLE, sigma_BL = torch.zeros(rows, 3, E), torch.full((rows, 3), INF)
    evaluations = 0

    def observe():
        p_BLV = joint_posterior(x_BLE, sigma_BL, table).softmax(-1)
        entropy_BL = -(p_BLV * p_BLV.clamp(min=1e-30).log()).sum(-1)
        return Observation(sigma_BL, entropy_BL, (E - (p_BLV @ table).square().sum(-1)) / 2, p_BLV.amax(-1))

    def shuffle():
        return torch.rand(rows, 3, generator=gen).argsort(-1)

    plan = Plan(free_BL, block_BL, steps, schedule, observe, shuffle)
    for target_BL in path.levels(plan):
        moving = target_BL < sigma_BL
        if not moving.any():
            continue
        evaluations += 1
        logits = joint_posterior(x_BLE, sigma_BL, table)[moving]
        draws = Draws(len(logits))
        moved = solver.move(Step(x_BLE[moving], sigma_BL[moving], target_BL[moving], logits, table, draws))
        finishing = target_BL[moving] == 0
        if finishing.any():
            moved = torch.where(finishing[:, None], table[draws.token(logits)], moved)
        x_BLE[moving] = moved
        sigma_BL[moving] = target_BL[moving]
    assert (sigma_BL == 0).all()
    ids = nearest(x_BLE.view(-1, E), table).view(rows, 3)
    return ids @ torch.tensor([16, 4, 1]), evaluations


def total_variation(codes):
    return float((torch.bincount(codes, minlength=64) / len(codes) - LAW).abs().sum() / 2)


ROWS = 20_000


def test_the_yardstick_is_sharp():
    """20,000 draws of the law itself are 0.014 away; independent tokens with the right marginals are far away."""
    gen = torch.Generator().manual_seed(0)
    exact = torch.multinomial(LAW, ROWS, replacement=True, generator=gen)
    assert total_variation(exact) < 0.02
    assert total_variation(sample_jointly("uniform", posterior(), 1, ROWS)[0]) > 0.4


@pytest.mark.parametrize("solver", ["posterior", "ancestral"])
@pytest.mark.parametrize(
    ("path", "steps"), [("uniform", 64), ("ramp:1", 80), ("blocks:1", 150), ("confidence", 128), ("entropy", 128)]
)
def test_every_path_and_stochastic_solver_samples_the_joint_law(path, steps, solver):
    codes, evaluations = sample_jointly(path, make_solver(solver), steps, ROWS)
    assert evaluations <= steps
    assert total_variation(codes) < (0.02 if solver == "posterior" else 0.035)


@pytest.mark.parametrize("path", ["blocks:1", "ramp:1e6", "shuffled", "surest", "bounded:0"])
def test_token_by_token_the_posterior_solver_is_exact_in_three_evaluations(path):
    codes, evaluations = sample_jointly(path, posterior(), 3, ROWS)
    assert evaluations == 3 and total_variation(codes) < 0.02


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "stochastic"),
    [
        ("euler", "euler", False),
        ("posterior", "posterior", True),
        ("ancestral", "ancestral:1", True),
        ("ancestral:0.5", "ancestral:0.5", True),
        ("ancestral:0", "ancestral:0", True),
    ],
)
def test_make_solver(text, name, stochastic):
    solver = make_solver(text)
    assert (solver.name, solver.stochastic) == (name, stochastic)
    assert make_solver(solver.name).name == name


@pytest.mark.parametrize(
    "text",
    ["", "simpson", "Euler", "euler:1", "posterior:0.5", "sde:-1", "sde:1,1,3,2", "sde:1,2,3,4,5",
     "ancestral:x", "ancestral:-0.1", "ancestral:1.5", "ancestral:nan",
     "ancestral:inf", "ancestral:0.5:1"],
)  # fmt: skip
def test_bad_solvers_are_refused(text):
    with pytest.raises(ValueError):
        make_solver(text)


@settings(max_examples=100, deadline=None)
@given(eta=st.floats(0, 1), sigma=st.floats(1e-2, 1e3), share=st.floats(0, 1))
def test_noise_and_signal_of_a_step_add_up(eta, sigma, share):
    """The variance around x0 after a step is target^2, whatever eta: residual and fresh noise are orthogonal."""
    target = sigma * share
    one = torch.ones(1, dtype=F64)
    table = torch.zeros(1, E, dtype=F64)  # a vocabulary of one word at the origin, so that x0 = 0

    def move(x, eps):
        step = Step(torch.full((1, E), x, dtype=F64), sigma * one, target * one, torch.zeros(1, 1, dtype=F64), table,
                    Fixed(torch.full((1, E), eps, dtype=F64)))  # fmt: skip
        return float(ancestral(eta).move(step)[0, 0])

    kept, fresh = move(sigma, 0.0), move(0.0, 1.0)
    assert kept >= 0 and fresh >= 0
    assert kept**2 + fresh**2 == pytest.approx(target**2, rel=1e-9, abs=1e-12)

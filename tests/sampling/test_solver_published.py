"""Solvers against the algorithms of the papers, written out here again, step by step and through the library's loop."""

import math
from itertools import pairwise

import pytest
import torch

from scorelm.sampling.evaluator import Dense, Network
from scorelm.sampling.loop import Draw, StepRecord, denoise, generate
from scorelm.sampling.solvers import Estimate, Step, make_solver, tempered
from scorelm.sampling.state import Budget, start

from ..conftest import SPECIAL
from .draws import Given, normals
from .laws import (
    BOS,
    EOS,
    F64,
    INF,
    LAW,
    PRIOR,
    SCHEDULE,
    SEQUENCES,
    SOLVERS,
    TABLE,
    E,
    bayes,
    mixture_denoiser,
    settings_for_steps,
)  # fmt: skip
from .steps import whole_step

DETERMINISTIC = ["euler", "heun", "dpmpp_2m"]


def denoised(x_NE, sigma):
    """D(x; sigma) = E[e | x], one level for all."""
    return bayes(x_NE, torch.full((len(x_NE),), float(sigma), dtype=F64)).softmax(-1) @ TABLE


def drive(solver, grid, x_NE, draws=None, churn=None, temperature=1.0, posterior=bayes, table=TABLE):
    """`x_NE` along one grid for all positions ([K + 1]) or one for each ([K + 1, N]), in float64.

    `draws[k]` are the draws of step k and `churn[k]` the normal that is added before it; NaN where left out.
    """
    levels = [torch.as_tensor(level, dtype=F64).expand(len(x_NE)) for level in grid]
    never = Given(torch.full_like(x_NE, math.nan))
    before = Estimate(torch.zeros_like(x_NE), torch.full((len(x_NE),), INF, dtype=F64))
    for k, (sigma_N, target_N) in enumerate(pairwise(levels)):
        moving_N = target_N < sigma_N
        if solver.churn is not None:
            raised_N = torch.where(moving_N, solver.churn(sigma_N, len(levels) - 1), sigma_N)
            scale_N = torch.where(sigma_N.isfinite(), (raised_N**2 - sigma_N**2).sqrt(), 0.0)
            added_NE = never.eps_NE if churn is None else churn[k]
            x_NE = torch.where(
                scale_N[:, None] > 0, x_NE + solver.churn_noise * scale_N[:, None] * added_NE, x_NE
            )  # fmt: skip
            sigma_N = raised_N
        logits_NV = posterior(x_NE, sigma_N)
        step = Step(x_NE, sigma_N, target_N, logits_NV, table, draws[k] if draws else never, before, temperature)
        x0_NE = tempered(step, logits_NV.softmax(-1) @ table, x_NE, sigma_N)
        before = Estimate(
            torch.where(moving_N[:, None], x0_NE, before.x0_NE), torch.where(moving_N, sigma_N, before.sigma_N)
        )
        moved_NE = whole_step(solver, step, posterior)
        x_NE = torch.where(target_N[:, None].isinf(), x_NE, moved_NE)  # those that wait are in no step
    return x_NE


# --- the published algorithms -----------------------------------------------------------------------------------------


def karras_grid(steps, low=0.25, high=8.0, rho=7):
    """EDM, eq. 5: t_0 > ... > t_N = 0."""
    share = torch.arange(steps, dtype=F64) / (steps - 1)
    inner = (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [*inner.tolist(), 0.0]


def edm_algorithm_1(x, t, D):
    """EDM (arXiv 2206.00364), Alg. 1, for sigma(t) = t and s(t) = 1."""
    for i in range(len(t) - 1):
        d_i = (x - D(x, t[i])) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d_i
        if t[i + 1] != 0:
            d_prime = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (d_i / 2 + d_prime / 2)
        x = x_next
    return x


def edm_algorithm_2(x, t, D, noise, S_churn, S_noise, S_tmin, S_tmax):
    """EDM, Alg. 2: `noise[i]` is standard normal."""
    N = len(t) - 1
    for i in range(N):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * S_noise * noise[i]
        d_i = (x_hat - D(x_hat, t_hat)) / t_hat
        x_next = x_hat + (t[i + 1] - t_hat) * d_i
        if t[i + 1] != 0:
            d_prime = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x_hat + (t[i + 1] - t_hat) * (d_i / 2 + d_prime / 2)
        x = x_next
    return x


def dpm_solver_pp_2m(x, t, D):
    """DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2), as in the paper for a variance-preserving process.

    ``alpha^2 + sigma^2 = 1``, lambda = log(alpha / sigma), and the state is alpha times ours; a last step to sigma 0 is
    of first order, its limit being the data prediction.
    """
    alpha = [1 / math.sqrt(1 + s**2) for s in t]
    sigma = [s / math.sqrt(1 + s**2) for s in t]
    lam = [math.log(a / s) if s else INF for a, s in zip(alpha, sigma, strict=True)]
    x = alpha[0] * x
    previous = None
    for i in range(1, len(t)):
        prediction = D(x / alpha[i - 1], t[i - 1])
        h = lam[i] - lam[i - 1]
        mixed = prediction
        if previous is not None and t[i] != 0:
            r = (lam[i - 1] - lam[i - 2]) / h
            mixed = (1 + 1 / (2 * r)) * prediction - 1 / (2 * r) * previous
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * mixed
        previous = prediction
    return x / alpha[-1]


def euler_ancestral(x, t, D, noise, eta):
    """k-diffusion's sample_euler_ancestral."""
    for i in range(len(t) - 1):
        up = min(t[i + 1], eta * (t[i + 1] ** 2 * (t[i] ** 2 - t[i + 1] ** 2) / t[i] ** 2) ** 0.5)
        down = (t[i + 1] ** 2 - up**2) ** 0.5
        x = x + (x - D(x, t[i])) / t[i] * (down - t[i])
        if t[i + 1] > 0:
            x = x + noise[i] * up
    return x


def flow_by_euler(x, t, D):
    """dx = -sigma score dsigma with Tweedie's score, step by step (EDM, eq. 1)."""
    for a, b in pairwise(t):
        score = (D(x, a) - x) / a**2
        x = x + (b - a) * (-a * score)
    return x


GRID = karras_grid(18)
START = TABLE[torch.arange(48) % 4] + 8 * normals(48, E, seed=1)
NOISE = normals(18, 48, E, seed=2)
CHURN = normals(18, 48, E, seed=3)
PUBLISHED = {
    "euler": flow_by_euler,
    "heun": edm_algorithm_1,
    "dpmpp_2m": dpm_solver_pp_2m,
    "ancestral": lambda x, t, D: euler_ancestral(x, t, D, NOISE, 1.0),
    "ancestral:0.3": lambda x, t, D: euler_ancestral(x, t, D, NOISE, 0.3),
    "ancestral:0": lambda x, t, D: euler_ancestral(x, t, D, NOISE, 0.0),
    "sde": lambda x, t, D: edm_algorithm_2(x, t, D, CHURN, 40, 1, 0, INF),
    "sde:0": edm_algorithm_1,
    "sde:4,1.1": lambda x, t, D: edm_algorithm_2(x, t, D, CHURN, 4, 1.1, 0, INF),
    "sde:6,0.9,0.5,5": lambda x, t, D: edm_algorithm_2(x, t, D, CHURN, 6, 0.9, 0.5, 5),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("steps", [18, 2, 1])
def test_a_trajectory_is_that_of_the_published_algorithm(name, steps):
    """Every grid ends at 0; the last level above it is looked at as well, where the samples still differ."""
    grid = GRID if steps == 18 else [8.0, 0.7, 0.0] if steps == 2 else [3.0, 0.0]
    draws = [Given(eps) for eps in NOISE]
    for t in (grid, grid[:-1])[: min(steps, 2)]:
        found = drive(make_solver(name), t, START, draws, CHURN)
        torch.testing.assert_close(found, PUBLISHED[name](START, t, denoised), rtol=0, atol=1e-9)


def test_the_published_algorithms_are_not_all_the_same():
    """The comparison above has something to see: the ends and the levels before them differ between algorithms."""
    for t in (GRID[:-1], [8.0, 3.0, 1.0]):
        ends = [algorithm(START, t, denoised) for name, algorithm in PUBLISHED.items() if name not in ("sde:0",)]
        for i, one in enumerate(ends):
            for j, other in enumerate(ends[:i]):
                same = {i, j} == {0, 5}  # euler and ancestral:0
                assert ((one - other).abs().max() > 1e-3) != same


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_tempered_trajectory_is_the_published_one_with_a_divided_score(name, temperature):
    """``score / T`` is the score of the denoiser ``x + (D - x) / T``, whatever the algorithm."""

    def tempered(x, t):
        return x + (denoised(x, t) - x) / temperature

    t = GRID[:-1] if "sde" not in name else GRID
    found = drive(make_solver(name), t, START, [Given(eps) for eps in NOISE], CHURN, temperature)
    torch.testing.assert_close(found, PUBLISHED[name](START, t, tempered), rtol=0, atol=1e-9)


# --- order of convergence ---------------------------------------------------------------------------------------------


def smooth_grid(steps, high=6.0, low=0.5):
    return torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=F64)


def richardson(solve, counts=(24, 48, 96)):
    """log2 of the ratio of successive differences: the order, with no reference solution."""
    ends = [solve(count) for count in (*counts, 2 * counts[-1])]
    steps = [float((a - b).norm(dim=-1).mean()) for a, b in pairwise(ends)]
    return [math.log2(a / b) for a, b in pairwise(steps)]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("sde:0", 2)])
@pytest.mark.parametrize("grids", ["one", "own"])
def test_order_of_convergence_on_a_mixture(name, order, grids):
    """With one level for all, and with a level of each position's own."""
    high = 6.0 if grids == "one" else torch.linspace(3, 9, 40, dtype=F64)
    low = 0.5 if grids == "one" else torch.linspace(0.8, 0.4, 40, dtype=F64)

    def grid(steps):
        u = torch.linspace(0, 1, steps + 1, dtype=F64)
        return [high * (low / high) ** share for share in u]

    orders = richardson(lambda steps: drive(make_solver(name), grid(steps), START[:40] * 0.75))
    assert orders == pytest.approx([order] * 2, abs=0.15)


def coupled(x_N1, sigma_N):
    """log p(token | all of x) by Bayes' rule over the eight sequences of `LAW`, three positions after each other."""
    evidence_BL = (x_N1[:, 0] * sigma_N**-2).view(-1, 3)
    one_BL = (LAW.log() + evidence_BL @ (2 * SEQUENCES - 1).double().T).softmax(-1) @ SEQUENCES.double()
    return torch.stack([1 - one_BL, one_BL], -1).log().view(-1, 2)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence_with_coupled_positions_on_levels_of_their_own(name, order):
    """Each position's slope depends on where the others stand, which move at other speeds at the same time."""
    high, low = torch.tensor([2.0, 3.0, 5.0], dtype=F64), torch.tensor([0.3, 0.5, 0.8], dtype=F64)
    start = high.repeat(40)[:, None] * normals(120, 1, seed=5)

    def solve(steps):
        grid = [(high * (low / high) ** (k / steps)).repeat(40) for k in range(steps + 1)]
        words = torch.tensor([[-1.0], [1.0]], dtype=F64)
        return drive(make_solver(name), grid, start, posterior=coupled, table=words)

    assert richardson(solve) == pytest.approx([order] * 2, abs=0.2)


# --- levels of each position's own, and the ends ----------------------------------------------------------------------


MIXED = [
    [9.0, 5.0, 3.0, 2.0, 1.0, 0.4, 0.0],
    [INF, 7.0, 3.0, 1.0, 0.5, 0.3, 0.0],
    [INF, INF, INF, 4.0, 2.0, 0.5, 0.0],  # starts late
    [2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # finishes early
    [INF, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # in one step
    [6.0, 6.0, 2.0, 2.0, 2.0, 1.0, 0.5],  # pauses, and is left on the way
    [INF, INF, INF, INF, INF, INF, 0.0],
    [0.0] * 7,  # given
]


@pytest.mark.parametrize(
    ("name", "temperature"),
    [*((name, 1.0) for name in (*SOLVERS, "sde:20,1.1,1,4")), *((name, 1.7) for name in SOLVERS[:-2])],
)
def test_levels_of_its_own_are_each_position_alone(name, temperature):
    """Steps from inf, to 0, to the same level and between, mixed in one batch, against each position's own walk."""
    solver, count = make_solver(name), len(MIXED)
    eps, churn, tokens = normals(6, count, E, seed=7), normals(6, count, E, seed=8), torch.arange(6 * count) % 4
    x_NE = torch.where(torch.tensor(MIXED)[:, :1].isinf(), 1e6, 2 * normals(count, E, seed=9))
    x_NE[-1] = TABLE[2]
    tokens.view(6, count)[:, -1] = 2  # what is given is what is drawn
    draws = [Given(eps[k], tokens.view(6, count)[k]) for k in range(6)]
    grid = torch.tensor(MIXED, dtype=F64).T
    together = drive(solver, list(grid), x_NE, draws, churn, temperature)
    assert torch.isfinite(together).all()
    for row in range(count):
        part = slice(row, row + 1)
        own = [Given(eps[k, part], draws[k].token_N[part]) for k in range(6)]
        alone = drive(solver, grid[:, row].tolist(), x_NE[part], own, churn[:, part], temperature)
        torch.testing.assert_close(together[part], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[-1], TABLE[2], rtol=0, atol=1e-9)
    last = TABLE[draws[-1].token_N[-2]] if name in ("posterior", "renoise") else PRIOR @ TABLE
    torch.testing.assert_close(together[-2], last, rtol=0, atol=1e-9)  # from no evidence straight to 0


# --- through the library's loop, with the denoiser whose posterior is exactly this mixture -----------------------------


def loop_steps(name, steps, count=30, **options):
    """Records and the state after each of `steps` steps of the uniform path over `count` free positions of one row."""
    network = Network(mixture_denoiser(), SPECIAL)
    settings = settings_for_steps("uniform", name, steps, **options)
    state = start(network.table_VE, [[BOS, *[None] * count, EOS]], [3], SPECIAL, 0, Budget(SCHEDULE, steps))
    way, evaluate = denoise(state, settings, Draw(settings.solver)), Dense(network)
    item = next(way)
    while item is not None:
        if isinstance(item, StepRecord):
            yield item, state
            item = next(way, None)
        else:
            item = way.send(evaluate([item])[0])


def trajectory_levels(steps):
    """Levels after each of `steps` steps of the uniform path: u = (K - k) / K, with 0 at the end."""
    return [0.4 * 20 ** (1 - k / steps) for k in range(1, steps)] + [0.0]


def likeliest(x_NE, sigma):
    return bayes(x_NE, torch.full((len(x_NE),), sigma, dtype=F64)).argmax(-1)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@torch.inference_mode()
def test_the_loop_makes_the_published_steps(name, temperature):
    """From the state after the first step, which starts from no evidence, every state is that of the algorithm."""

    def colder(x, t):
        return x + (denoised(x, t) - x) / temperature

    steps, states = 9, []
    for _, state in loop_steps(name, steps, score_temperature=temperature):
        states.append(state.x_BLE[0, 1:-1].double().clone())
    assert len(states) == steps
    levels = trajectory_levels(steps)
    for k in range(1, steps - 1):
        expected = PUBLISHED[name](states[0], levels[: k + 1], colder)
        torch.testing.assert_close(states[k], expected, rtol=0, atol=2e-4)
    chosen = state.ids_BL[0, 1:-1] - 4
    assert torch.equal(chosen, likeliest(states[-2], levels[-2]))
    torch.testing.assert_close(states[-1], TABLE[chosen], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_loop_adds_edm_noise():
    """The normal that `sde` adds is the first that the row's generator gives in a step; the rest is Alg. 2."""
    steps = 9
    levels, states, noise = trajectory_levels(steps), [], []
    for _, state in loop_steps("sde:3,1.1,0.5,4", steps):
        twin = torch.Generator()
        twin.set_state(state.rows.generators[0].get_state())
        noise.append(torch.randn(30, E, generator=twin).double())
        states.append(state.x_BLE[0, 1:-1].double().clone())
    assert len(states) == steps
    for k in range(1, steps - 1):
        sigma, target = levels[k - 1], levels[k]
        gamma = 3 / steps if 0.5 <= sigma <= 4 else 0.0
        raised = sigma * (1 + gamma)
        x_hat = states[k - 1] + 1.1 * math.sqrt(raised**2 - sigma**2) * noise[k - 1]
        expected = edm_algorithm_1(x_hat, [raised, target], denoised)
        torch.testing.assert_close(states[k], expected, rtol=0, atol=2e-4)
    assert state.nfe_B.tolist() == [2 * (steps - 1)]


@pytest.mark.parametrize("steps", [2, 7])
@torch.inference_mode()
def test_a_finishing_token_is_limited_at_every_number_of_steps(steps):
    """With `posterior:1` every token that is written is the likeliest at the state that it was written from."""
    for record, state in loop_steps("posterior:1", steps, count=300):
        if record.step == steps - 1:
            before = state.x_BLE[0, 1:-1].double().clone()
    assert torch.equal(state.ids_BL[0, 1:-1] - 4, likeliest(before, trajectory_levels(steps)[-2]))


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_those_asked_for(loop_of, settings_of, name):
    """Two-stage solvers take one in the first and one in the last step of the uniform path, two in the others."""
    for steps in (1, 2, 3, 8):
        settings = settings_of(path="uniform", solver=name, steps=steps)
        *_, last = generate(loop_of(mixture_denoiser(), SCHEDULE), [[BOS, None, None, EOS]], [0], settings)
        expected = steps - steps % 2 if make_solver(name).evaluations == 2 and steps > 1 else steps
        assert last.nfe_B.tolist() == [expected]

"""Solvers against the algorithms of the papers, written out here again, and against laws that are known exactly."""

import math
from itertools import pairwise, product

import pytest
import torch

from scorelm.config.recipe import ModelConfig
from scorelm.model.denoiser import Denoiser
from scorelm.sampling.paths import make_path
from scorelm.noise.plan import Observation, Plan
from scorelm.noise.schedule import Log, Power
from scorelm.sampling.generate import Sampler, generate
from scorelm.sampling.guidance import Guidance
from scorelm.sampling.options import Options
from scorelm.sampling.solvers import Estimate, Step, make_solver
from scorelm.text.sentencepiece import BOS, EOS

INF, F64 = math.inf, torch.float64
PRIOR = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=F64)
E = 4
SOLVERS = ["euler", "heun", "dpmpp_2m", "ancestral", "ancestral:0.5", "sde", "posterior", "renoise"]
DETERMINISTIC = ["euler", "heun", "dpmpp_2m"]
DRAWS_TOKENS = ("posterior", "renoise")


def make_table():
    table = torch.randn(4, E, dtype=F64, generator=torch.Generator().manual_seed(0))
    return math.sqrt(E) * table / table.norm(dim=-1, keepdim=True)


TABLE = make_table()


def bayes(x_NE, sigma_N):
    """log prior + log N(x; e, sigma^2), up to a constant: a Gaussian mixture. At sigma 0 the embedding itself."""
    square_NV = (x_NE[:, None] - TABLE.to(x_NE)).pow(2).sum(-1)
    return PRIOR.to(x_NE).log() - square_NV / (2 * sigma_N.clamp(min=1e-3)[:, None] ** 2)


def denoised(x_NE, sigma):
    """D(x; sigma) = E[e | x], one level for all."""
    return bayes(x_NE, torch.full((len(x_NE),), float(sigma), dtype=F64)).softmax(-1) @ TABLE


class Given:
    """The normal and the tokens that the test has chosen for this step, whenever they are asked for."""

    def __init__(self, eps_NE, token_N=None):
        self.eps_NE, self.token_N = eps_NE, token_N

    def normal(self):
        return self.eps_NE

    def token(self, logits_NV):
        return self.token_N if self.token_N is not None else logits_NV.argmax(-1)


class Random:
    """Draws for N positions."""

    def __init__(self, count, gen, dim=E):
        self.count, self.gen, self.dim = count, gen, dim

    def normal(self):
        return torch.randn(self.count, self.dim, dtype=F64, generator=self.gen)

    def token(self, logits_NV):
        u_N1 = torch.rand(len(logits_NV), 1, dtype=F64, generator=self.gen)
        return (u_N1 > logits_NV.softmax(-1).cumsum(-1)[:, :-1]).sum(-1)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def drive(solver, grid, x_NE, draws=None, churn=None, temperature=1.0, posterior=bayes):
    """`x_NE` along one grid for all positions ([K + 1]) or one for each ([K + 1, N]): the loop of `Sampler`.

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
        step = Step(
            x_NE, sigma_N, target_N, logits_NV, TABLE, draws[k] if draws else never, posterior, before, temperature
        )
        before = Estimate(
            torch.where(moving_N[:, None], logits_NV.softmax(-1) @ TABLE, before.x0_NE),
            torch.where(moving_N, sigma_N, before.sigma_N),
        )
        x_NE = torch.where(target_N[:, None].isinf(), x_NE, solver.move(step))  # those that wait are in no step
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


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "dpmpp_2m"])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_tempered_trajectory_is_the_published_one_with_a_divided_score(name, temperature):
    """``score / T`` is the score of the denoiser ``x + (D - x) / T``, whatever the algorithm."""

    def tempered(x, t):
        return x + (denoised(x, t) - x) / temperature

    t = GRID[:-1] if "sde" not in name else GRID
    found = drive(make_solver(name), t, START, [Given(eps) for eps in NOISE], CHURN, temperature)
    torch.testing.assert_close(found, PUBLISHED[name](START, t, tempered), rtol=0, atol=1e-9)


def test_churn_is_edm_gamma():
    sigma = torch.tensor([0.0, 0.1, 0.5, 1.0, 5.0, 5.1, INF], dtype=F64)
    raised = make_solver("sde:10,1,0.5,5").churn(sigma, 100)
    torch.testing.assert_close(raised, torch.tensor([0, 0.1, 0.55, 1.1, 5.5, 5.1, INF], dtype=F64))
    capped = make_solver("sde:10").churn(sigma, 3)
    torch.testing.assert_close(capped, sigma * math.sqrt(2))
    assert make_solver("sde:1,0.9").churn_noise == 0.9
    assert torch.equal(make_solver("sde:0").churn(sigma, 7), sigma)


@pytest.mark.parametrize("name", ["heun", "sde"])
def test_two_stages_are_one_further_evaluation_except_to_nothing_and_from_no_evidence(name):
    asked = []

    def counted(x_NE, sigma_N):
        asked.append(sigma_N)
        return bayes(x_NE, sigma_N)

    def evaluations(sigma, target):
        asked.clear()
        sigma_N, target_N = (torch.tensor(level, dtype=F64) for level in (sigma, target))
        x_NE = START[: len(sigma)]
        make_solver(name).move(
            Step(x_NE, sigma_N, target_N, bayes(x_NE, sigma_N), TABLE, Given(NOISE[0][: len(sigma)]), counted)
        )
        return len(asked)

    assert evaluations([3.0, 3.0], [1.0, 1.0]) == 1
    assert evaluations([3.0, 3.0], [0.0, 0.0]) == 0 and evaluations([INF, INF], [3.0, 0.0]) == 0
    assert evaluations([INF, 2.0, 2.0], [3.0, 0.0, 1.0]) == 1
    assert asked[0].tolist() == [INF, 2.0, 1.0]  # the others stand where they stood


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


# --- coupled positions: a joint law over three tokens of two words ----------------------------------------------------

SEQUENCES = torch.tensor(list(product((0, 1), repeat=3)))
SIGNS = (2 * SEQUENCES - 1).double()
BINARY = torch.tensor([[-1.0], [1.0]], dtype=F64)
LAW = torch.tensor(
    [(0.6 if a else 0.4) * (0.85 if b == a else 0.15) * (0.9 if c == a ^ b else 0.1) for a, b, c in SEQUENCES.tolist()],
    dtype=F64,
)
"""The second token mostly repeats the first, the third is mostly their exclusive or."""


def joint_posterior(x_BL, sigma_BL):
    """log p(token | all of x) by Bayes' rule over the eight sequences, [B, 3, 2]; embeddings are -1 and 1."""
    evidence_BL = x_BL * sigma_BL.clamp(min=1e-2) ** -2
    one_BL = ((LAW.log() + evidence_BL @ SIGNS.T).softmax(-1) @ SEQUENCES.double()).clamp(1e-15, 1 - 1e-15)
    return torch.stack([1 - one_BL, one_BL], -1).log()


def sample_jointly(path_name, name, steps, rows, seed=0):
    """Frequencies of the eight sequences in `rows` samples along a path, and the steps made: `Sampler` again."""
    path, solver, gen = make_path(path_name), make_solver(name), torch.Generator().manual_seed(seed)
    block_BL = (torch.arange(3) // path.block if path.block else torch.zeros(3).long()).expand(rows, 3)
    x_BL, sigma_BL = torch.zeros(rows, 3, dtype=F64), torch.full((rows, 3), INF, dtype=F64)
    x0_BL, level_BL = x_BL.clone(), sigma_BL.clone()
    made = 0

    def observe():
        log_BLV = joint_posterior(x_BL, sigma_BL)
        mean_BL = (log_BLV.exp() @ BINARY).squeeze(-1)
        p_BLV = log_BLV.exp()
        return Observation(sigma_BL, -(p_BLV * log_BLV).sum(-1), (1 - mean_BL**2) / 2, p_BLV.amax(-1))

    plan = Plan(
        torch.ones(rows, 3, dtype=torch.bool), block_BL, steps, Power(0.15, 8.0, rho=5.0), observe,
        lambda: torch.rand(rows, 3, generator=gen).argsort(-1),
    )  # fmt: skip
    for target_BL in path.levels(plan):
        moving_BL = target_BL.double() < sigma_BL
        if not moving_BL.any():
            continue
        made += 1
        target_N, sigma_N, x_N1 = target_BL.double()[moving_BL], sigma_BL[moving_BL], x_BL[moving_BL][:, None]
        draws = Random(len(target_N), gen, dim=1)
        if solver.churn is not None:
            raised_N = solver.churn(sigma_N, steps)
            scale_N = torch.where(sigma_N.isfinite(), (raised_N**2 - sigma_N**2).sqrt(), 0.0)
            x_N1, sigma_N = x_N1 + solver.churn_noise * scale_N[:, None] * draws.normal(), raised_N
            x_BL[moving_BL], sigma_BL[moving_BL] = x_N1.squeeze(1), sigma_N

        def elsewhere(x_N1, sigma_N, moving_BL=moving_BL):
            there_BL, level_BL = x_BL.clone(), sigma_BL.clone()
            there_BL[moving_BL], level_BL[moving_BL] = x_N1.squeeze(1), sigma_N
            return joint_posterior(there_BL, level_BL)[moving_BL]

        logits_NV = joint_posterior(x_BL, sigma_BL)[moving_BL]
        before = Estimate(x0_BL[moving_BL][:, None], level_BL[moving_BL])
        moved_N = solver.move(Step(x_N1, sigma_N, target_N, logits_NV, BINARY, draws, elsewhere, before)).squeeze(1)
        x0_BL[moving_BL], level_BL[moving_BL] = (logits_NV.softmax(-1) @ BINARY).squeeze(1), sigma_N
        last_N = draws.token(logits_NV) if solver.stochastic else logits_NV.argmax(-1)
        x_BL[moving_BL] = torch.where(target_N == 0, BINARY[last_N, 0], moved_N)
        sigma_BL[moving_BL] = target_N
    assert (sigma_BL == 0).all() and (x_BL.abs() == 1).all()
    codes_B = (x_BL > 0).long() @ torch.tensor([4, 2, 1])
    return torch.bincount(codes_B, minlength=8).double() / rows, made


def total_variation(share_V):
    return float((share_V - LAW).abs().sum() / 2)


def coupled(x_N1, sigma_N):
    return joint_posterior(x_N1.view(-1, 3), sigma_N.view(-1, 3)).view(-1, 2)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence_with_coupled_positions_on_levels_of_their_own(name, order):
    """Each position's slope depends on where the others stand, which move at other speeds at the same time."""
    high, low = torch.tensor([2.0, 3.0, 5.0], dtype=F64), torch.tensor([0.3, 0.5, 0.8], dtype=F64)
    start = high.repeat(40)[:, None] * normals(120, 1, seed=5)

    def solve(steps):
        x_N1, before = start, Estimate(torch.zeros_like(start), torch.full((120,), INF, dtype=F64))
        grid = [(high * (low / high) ** (k / steps)).repeat(40) for k in range(steps + 1)]
        for sigma_N, target_N in pairwise(grid):
            logits_NV = coupled(x_N1, sigma_N)
            step = Step(
                x_N1, sigma_N, target_N, logits_NV, BINARY, Given(torch.full_like(x_N1, math.nan)), coupled, before
            )
            before = Estimate(logits_NV.softmax(-1) @ BINARY, sigma_N)
            x_N1 = make_solver(name).move(step)
        return x_N1

    assert richardson(solve) == pytest.approx([order] * 2, abs=0.2)


STATIC = {
    "uniform": [
        ("euler", 2, 32, 0.028), ("heun", 2, 9, 0.028), ("dpmpp_2m", 2, 16, 0.028), ("ancestral", 4, 40, 0.028),
        ("sde", 2, 9, 0.028), ("posterior", 4, 40, 0.028), ("renoise", 6, 72, 0.042),
    ],
    "ramp:1": [
        ("euler", 4, 24, 0.028), ("heun", 4, 12, 0.028), ("dpmpp_2m", 4, 16, 0.028), ("ancestral", 9, 64, 0.028),
        ("sde", 2, 12, 0.028), ("posterior", 2, 24, 0.028), ("renoise", 2, 16, 0.028),
    ],
    "blocks:1": [
        ("euler", 6, 64, 0.028), ("heun", 6, 16, 0.028), ("dpmpp_2m", 6, 32, 0.028), ("ancestral", 12, 96, 0.042),
        ("sde", None, 12, 0.028), ("posterior", None, 9, 0.028), ("renoise", None, 9, 0.028),
    ],
}  # fmt: skip
"""By path: solver, steps at which it is seen to be off, more steps, and how near the law it is then."""


@pytest.mark.parametrize(("path", "name", "few", "many", "near"), [(p, *row) for p in STATIC for row in STATIC[p]])
def test_every_solver_reaches_the_joint_law_on_static_paths(path, name, few, many, near):
    """4,000 rows of the law itself are about 0.014 away from it. What draws tokens is right at once, one by one."""
    if few:
        off, made = sample_jointly(path, name, few, 1500)
        assert made == few and total_variation(off) > 0.055
    right, made = sample_jointly(path, name, many, 4000)
    assert made == many and total_variation(right) < near


@pytest.mark.parametrize("name", ["ancestral", "sde", "posterior", "renoise"])
@pytest.mark.parametrize("path", ["blocks:1", "shuffled", "ramp:1e6"])
def test_token_by_token_in_three_evaluations(path, name):
    """From no evidence to finished one by one is exact for whatever draws its token; the flow takes the likeliest."""
    share, made = sample_jointly(path, name, 3, 6000)
    assert made == 3 and total_variation(share) < 0.022
    assert total_variation(sample_jointly(path, "euler", 3, 100)[0]) > 0.4


# --- one position: the law of a mixture -------------------------------------------------------------------------------


def from_no_evidence(steps, low=0.25, high=12.0):
    """inf, then `steps` - 1 levels from high to low, then 0."""
    share = torch.linspace(0, 1, steps - 1, dtype=F64) if steps > 2 else torch.full((steps - 1,), 0.5, dtype=F64)
    return [INF, *(high ** (1 / 4) + share * (low ** (1 / 4) - high ** (1 / 4))).pow(4).tolist(), 0.0]


def random_walk(name, grid, count, seed=0, start=None):
    gen = torch.Generator().manual_seed(seed)
    start = torch.zeros(count, E, dtype=F64) if start is None else start
    draws = [Random(count, gen)] * len(grid)
    churn = [normals(count, E, seed=100 + k) for k in range(len(grid))] if "sde" in name else None
    return drive(make_solver(name), grid, start, draws, churn)


def frequencies(x_NE):
    return torch.bincount(torch.cdist(x_NE, TABLE).argmin(-1), minlength=4) / len(x_NE)


def chi_square(share_V, law_V, count):
    return float(count * ((share_V - law_V) ** 2 / law_V).sum())


@pytest.mark.parametrize(
    ("name", "steps"),
    [("euler", 48), ("heun", 16), ("dpmpp_2m", 24), ("ancestral", 64), ("ancestral:0.5", 48), ("sde", 16),
     ("sde:4,1,0.5,4", 16), ("posterior", 1), ("posterior", 2), ("posterior", 7), ("renoise", 1), ("renoise", 2),
     ("renoise", 7)],
)  # fmt: skip
def test_from_no_evidence_to_finished_the_samples_have_the_law(name, steps):
    """Weights of the modes by chi-square (0.1% for the exact ones); at the last level above 0, mean and covariance."""
    count, grid = 4000, from_no_evidence(steps)
    x_NE, sigma = random_walk(name, grid[:-1], count), grid[-2]
    if steps > 1:
        mean_E = PRIOR @ TABLE
        law_EE = (TABLE.T * PRIOR) @ TABLE - mean_E[:, None] * mean_E + sigma**2 * torch.eye(E, dtype=F64)
        deviation_E = law_EE.diagonal().sqrt()
        error_EE = (x_NE.T.cov() - law_EE) / (deviation_E[:, None] * deviation_E)
        assert ((x_NE.mean(0) - mean_E) / deviation_E).abs().max() < 4.5 / math.sqrt(count)
        assert error_EE.abs().max() < 5 * math.sqrt(2 / count)
    x_NE = random_walk(name, [sigma, 0.0], count, start=x_NE, seed=1)
    assert torch.isfinite(x_NE).all()
    assert chi_square(frequencies(x_NE), PRIOR, count) < 16.3


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ancestral", "sde"])
def test_too_few_steps_show_in_the_law(name):
    """The chi-square has the power to see what three steps do."""
    count = 8000
    assert chi_square(frequencies(random_walk(name, from_no_evidence(3), count)), PRIOR, count) > 40


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
    last = TABLE[draws[-1].token_N[-2]] if name in DRAWS_TOKENS else PRIOR @ TABLE
    torch.testing.assert_close(together[-2], last, rtol=0, atol=1e-9)  # from no evidence straight to 0


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_level_again_changes_nothing(name):
    sigma_N = torch.tensor([0.3, 1.0, 4.0, 100.0], dtype=F64)
    x_NE = 3 * normals(4, E, seed=11)
    before = Estimate(normals(4, E, seed=12), 2 * sigma_N)
    step = Step(x_NE, sigma_N, sigma_N, bayes(x_NE, sigma_N), TABLE, Given(normals(4, E)), bayes, before)
    torch.testing.assert_close(make_solver(name).move(step), x_NE, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_single_precision_in_and_out(name):
    sigma_N = torch.tensor([INF, INF, 5.0, 2.0, 1.0, 1.0, 0.0], dtype=F64)
    target_N = torch.tensor([6.0, 0.0, 2.0, 0.0, 0.5, 1.0, 0.0], dtype=F64)
    x_NE, eps, tokens = 2 * normals(7, E, seed=13), normals(7, E, seed=14), torch.arange(7) % 4
    before = Estimate(normals(7, E, seed=15), torch.tensor([INF, INF, 8.0, 3.0, 2.0, 1.5, 0.5], dtype=F64))
    moved = {}
    for dtype in (F64, torch.float32):
        step = Step(
            x_NE.to(dtype), sigma_N.to(dtype), target_N.to(dtype), bayes(x_NE, sigma_N).to(dtype), TABLE.to(dtype),
            Given(eps.to(dtype), tokens), lambda x, s, dtype=dtype: bayes(x.double(), s.double()).to(dtype),
            Estimate(*(t.to(dtype) for t in before)),
        )  # fmt: skip
        moved[dtype] = make_solver(name).move(step)
        assert moved[dtype].dtype == dtype and torch.isfinite(moved[dtype]).all()
    torch.testing.assert_close(moved[torch.float32].double(), moved[F64], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_from_no_evidence_the_state_has_no_say(name):
    """At level 5 from inf it is fresh noise around the mean under the prior, or around tokens drawn from it."""
    count, solver = 20_000, make_solver(name)
    sigma_N, target_N = torch.full((count,), INF, dtype=F64), torch.full((count,), 5.0, dtype=F64)
    moved = []
    for x in (0.0, 1e9):
        draws = Random(count, torch.Generator().manual_seed(0))
        x_NE = torch.full((count, E), x, dtype=F64)
        logits_NV = PRIOR.log().expand(count, 4)
        moved.append(solver.move(Step(x_NE, sigma_N, target_N, logits_NV, TABLE, draws, bayes)))
    assert torch.equal(*moved)
    mean_E = PRIOR @ TABLE
    law_EE = 25 * torch.eye(E, dtype=F64)
    if name in DRAWS_TOKENS:
        law_EE = law_EE + (TABLE.T * PRIOR) @ TABLE - mean_E[:, None] * mean_E
    assert (moved[0].mean(0) - mean_E).abs().max() < 4.5 * 5.4 / math.sqrt(count)
    assert (moved[0].T.cov() - law_EE).abs().max() < 5 * 29 * math.sqrt(2 / count)


def test_renoise_is_the_drawn_embedding_and_fresh_noise():
    sigma_N, target_N = torch.tensor([3.0, 2.0, INF], dtype=F64), torch.tensor([1.0, 0.0, 4.0], dtype=F64)
    eps, tokens = normals(3, E), torch.tensor([2, 0, 3])
    x_NE = 3 * normals(3, E, seed=1)
    moved = make_solver("renoise").move(
        Step(x_NE, sigma_N, target_N, bayes(x_NE, sigma_N), TABLE, Given(eps, tokens))
    )  # fmt: skip
    torch.testing.assert_close(moved, TABLE[tokens] + target_N[:, None] * eps, rtol=0, atol=1e-12)


def test_posterior_is_the_bridge_to_the_drawn_embedding():
    """``p(x' | x, e)`` of two Gaussian levels: precision weighs x by t^2 / s^2; variance t^2 (1 - t^2 / s^2)."""
    sigma_N, target_N = torch.tensor([3.0, 2.0, 5.0], dtype=F64), torch.tensor([1.0, 0.0, 4.9], dtype=F64)
    eps, tokens, x_NE = normals(3, E), torch.tensor([2, 0, 3]), 3 * normals(3, E, seed=1)
    moved = make_solver("posterior").move(
        Step(x_NE, sigma_N, target_N, bayes(x_NE, sigma_N), TABLE, Given(eps, tokens))
    )  # fmt: skip
    kept_N1 = (target_N / sigma_N)[:, None] ** 2
    expected = kept_N1 * x_NE + (1 - kept_N1) * TABLE[tokens] + target_N[:, None] * (1 - kept_N1).sqrt() * eps
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "law"),
    [("posterior:1", [1, 0, 0, 0]), ("posterior:2", [2 / 3, 1 / 3, 0, 0]),
     ("posterior:0,0.8", [5 / 9, 5 / 18, 1 / 6, 0]), ("posterior:3,0.6", [2 / 3, 1 / 3, 0, 0]),
     ("posterior:4,1", [0.5, 0.25, 0.15, 0.1]), ("posterior:9", [0.5, 0.25, 0.15, 0.1])],
)  # fmt: skip
def test_posterior_draws_from_the_likeliest_tokens(name, law):
    """By hand: the smallest set that makes up 0.8 is {0, 1, 2}; of 5/9, 5/18, 1/6 the first two make up 0.6."""
    law_V = torch.tensor(law, dtype=F64)
    share_V = frequencies(random_walk(name, [INF, 0.0], 20_000))
    assert (share_V[law_V == 0] == 0).all()
    kept = law_V > 0
    assert chi_square(share_V[kept], law_V[kept], 20_000) < 16.3


# --- through `Sampler`, with the denoiser whose posterior is exactly this mixture -------------------------------------


def mixture_denoiser():
    """Without context, `Denoiser` is Bayes' rule on its prior: tokens 4 to 7 are the mixture's, 0 to 3 no text."""
    denoiser = Denoiser(ModelConfig(dim=8, layers=1, heads=1, hidden=8, embedding_dim=E), 8)
    with torch.no_grad():
        denoiser.embedding.weight.copy_(torch.cat([-TABLE, TABLE]))
        denoiser.prior.copy_(torch.cat([torch.full((4,), -30.0), PRIOR.log().float()]))
    return denoiser.eval()


SCHEDULE = Log(0.4, 8.0)


def one_row(name, steps, guidance=None, count=30, path="uniform"):
    """A `Sampler` over `count` free positions whose path takes `steps` steps."""
    solver = make_solver(name)
    evaluations = steps if solver.evaluations == 1 else 2 * (steps - 1)
    chosen = Options(make_path(path), solver, evaluations, guidance or Guidance())
    return Sampler(mixture_denoiser(), SCHEDULE, [[BOS, *[None] * count, EOS]], [3], chosen)


def trajectory_levels(steps):
    """Levels after each of `steps` steps of the uniform path: u = (K - k) / K, with 0 at the end."""
    return [0.4 * 20 ** (1 - k / steps) for k in range(1, steps)] + [0.0]


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@torch.inference_mode()
def test_the_sampler_makes_the_published_steps(name, temperature):
    """From the state after the first step, which starts from no evidence, every state is that of the algorithm."""

    def tempered(x, t):
        return x + (denoised(x, t) - x) / temperature

    steps, states = 9, []
    sampler = one_row(name, steps, Guidance(score_temperature=temperature))
    for _ in sampler.records():
        states.append(sampler.state.x_BLE[0, 1:-1].double().clone())
    assert len(states) == steps
    levels = trajectory_levels(steps)
    for k in range(1, steps - 1):
        expected = PUBLISHED[name](states[0], levels[: k + 1], tempered)
        torch.testing.assert_close(states[k], expected, rtol=0, atol=2e-4)
    chosen = sampler.state.ids_BL[0, 1:-1] - 4
    assert torch.equal(chosen, denoised_ids(states[-2], levels[-2]))
    torch.testing.assert_close(states[-1], TABLE[chosen], rtol=0, atol=1e-5)


def denoised_ids(x_NE, sigma):
    return bayes(x_NE, torch.full((len(x_NE),), sigma, dtype=F64)).argmax(-1)


@torch.inference_mode()
def test_the_sampler_adds_edm_noise():
    """The normal that `sde` adds is the first that the row's generator gives in a step; the rest is Alg. 2."""
    steps = 9
    sampler = one_row("sde:3,1.1,0.5,4", steps)
    levels, states, noise = trajectory_levels(steps), [], []
    records = sampler.records()
    for _ in range(steps):
        twin = torch.Generator()
        twin.set_state(sampler.generators[0].get_state())
        noise.append(torch.randn(30, E, generator=twin).double())
        next(records)
        states.append(sampler.state.x_BLE[0, 1:-1].double().clone())
    for k in range(1, steps - 1):
        sigma, target = levels[k - 1], levels[k]
        gamma = 3 / steps if 0.5 <= sigma <= 4 else 0.0
        raised = sigma * (1 + gamma)
        x_hat = states[k - 1] + 1.1 * math.sqrt(raised**2 - sigma**2) * noise[k]
        expected = edm_algorithm_1(x_hat, [raised, target], denoised)
        torch.testing.assert_close(states[k], expected, rtol=0, atol=2e-4)
    assert next(records, None) is None
    assert sampler.state.nfe_B.tolist() == [2 * (steps - 1)]


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_those_asked_for(name):
    """Two-stage solvers take one in the first and one in the last step of the uniform path, two in the others."""
    for steps in (1, 2, 3, 8):
        chosen = Options(make_path("uniform"), make_solver(name), steps)
        last = list(generate(mixture_denoiser(), SCHEDULE, [[BOS, None, None, EOS]], [0], chosen))[-1]
        expected = steps - steps % 2 if make_solver(name).evaluations == 2 and steps > 1 else steps
        assert last.nfe_B.tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "path", "steps"),
    [("euler", "uniform", 40), ("heun", "ramp:0.5", 32), ("dpmpp_2m", "uniform", 24), ("dpmpp_2m", "ramp:0.5", 24),
     ("ancestral", "uniform", 48), ("sde", "uniform", 32), ("sde", "shuffled", 5), ("posterior", "ramp:0.5", 3),
     ("posterior", "shuffled", 5), ("renoise", "blocks:20", 6), ("renoise", "uniform", 3)],
)  # fmt: skip
def test_generated_tokens_have_the_law(name, path, steps):
    """1,000 independent tokens in 20 rows, from the library's own loop and draws: chi-square, 0.1%."""
    chosen = Options(make_path(path), make_solver(name), steps)
    templates = [[BOS, *[None] * 50, EOS]] * 20
    last = list(generate(mixture_denoiser(), Log(0.25, 12.0), templates, range(20), chosen))[-1]
    written = last.ids_BL[:, 1:-1].flatten()
    assert ((written >= 4) & (written < 8)).all()
    share_V = torch.bincount(written, minlength=8)[4:] / len(written)
    assert chi_square(share_V, PRIOR, len(written)) < 16.3


@pytest.mark.parametrize(
    ("name", "law"), [("posterior:1", [1.0, 0, 0, 0]), ("posterior:2", [2 / 3, 1 / 3, 0, 0]),
                      ("posterior:0,0.8", [5 / 9, 5 / 18, 1 / 6, 0])]
)  # fmt: skip
def test_generated_tokens_are_among_the_likeliest(name, law):
    """The limits of `posterior` hold for the draw that finishes a position too; in one step there is no other."""
    chosen = Options(make_path("uniform"), make_solver(name), 1)
    last = list(generate(mixture_denoiser(), SCHEDULE, [[BOS, *[None] * 200, EOS]] * 5, range(5), chosen))[-1]
    written, law_V = last.ids_BL[:, 1:-1].flatten() - 4, torch.tensor(law, dtype=F64)
    share_V, kept_V = torch.bincount(written, minlength=4) / len(written), law_V > 0
    assert (share_V[~kept_V] == 0).all()
    assert chi_square(share_V[kept_V], law_V[kept_V], len(written)) < 13.8


@pytest.mark.parametrize("steps", [2, 7])
@torch.inference_mode()
def test_a_finishing_token_is_limited_at_every_number_of_steps(steps):
    """With `posterior:1` every token that is written is the likeliest at the state that it was written from."""
    sampler = one_row("posterior:1", steps, count=300)
    before = None
    for record in sampler.records():
        if record.step < steps:
            before = sampler.state.x_BLE[0, 1:-1].double().clone()
    assert torch.equal(sampler.state.ids_BL[0, 1:-1] - 4, denoised_ids(before, trajectory_levels(steps)[-2]))

"""Solvers against the algorithms of the papers: whole trajectories in float64, and their order of convergence."""

import math
from itertools import pairwise

import pytest
import torch

from scorelm.sampling.solvers import make_solver

from ..evaluation.exact import fast
from .draws import Given, normals
from .laws import F64, INF, LAW, PRIOR, SEQUENCES, SOLVERS, TABLE, E
from .published import CHURN, GRID, NOISE, PUBLISHED, START, denoised, drive


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


ORDERS = [(name, order, grids) for name, order in (("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("sde:0", 2))
          for grids in ("one", "own")]  # fmt: skip


@pytest.mark.parametrize(("name", "order", "grids"), fast(*ORDERS[0:6:3], of=ORDERS))
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

"""What samplers draw against laws that are known exactly: one position's mixture, and three tokens that are coupled."""

import math

import pytest
import torch

from scorelm.noise.schedule import Log
from scorelm.sampling.loop import generate
from scorelm.sampling.solvers import make_solver

from ..evaluation.exact import fast
from .draws import Random, normals
from .laws import (
    BOS,
    EOS,
    F64,
    INF,
    LAW,
    PRIOR,
    SCHEDULE,
    TABLE,
    E,
    chi_square,
    frequencies,
    mixture_denoiser,
    sample_jointly,
    total_variation,
)
from .published import drive

# --- one position -----------------------------------------------------------------------------------------------------


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


def nearest(x_NE):
    return torch.cdist(x_NE, TABLE).argmin(-1)


LONE = [
    ("euler", 48, 4000), ("heun", 16, 4000), ("dpmpp_2m", 24, 4000), ("ancestral", 64, 4000),
    ("ancestral:0.5", 48, 4000), ("sde", 16, 4000), ("sde:4,1,0.5,4", 16, 4000), ("posterior", 1, 40_000),
    ("posterior", 2, 40_000), ("posterior", 7, 40_000), ("renoise", 1, 40_000), ("renoise", 7, 40_000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "steps", "count"), fast(*LONE[1::3], of=LONE))
def test_from_no_evidence_to_finished_the_samples_have_the_law(name, steps, count):
    """Weights of the modes by chi-square (0.1% for the exact ones); at the last level above 0, mean and covariance."""
    grid = from_no_evidence(steps)
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
    assert chi_square(frequencies(nearest(x_NE)), PRIOR, count) < 16.3


def test_a_law_that_is_off_by_two_per_cent_would_be_noticed():
    """The chi-square of 40,000 draws, which solvers that are exact at any number of steps get."""
    wrong = PRIOR + torch.tensor([0.02, -0.02, 0, 0], dtype=F64)
    ids_N = torch.multinomial(wrong, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert chi_square(frequencies(ids_N), PRIOR, 40_000) > 40


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ancestral", "sde"])
def test_too_few_steps_show_in_the_law(name):
    """The chi-square of 4,000 draws, which the other solvers get, has the power to see what three steps do."""
    count = 8000
    assert chi_square(frequencies(nearest(random_walk(name, from_no_evidence(3), count))), PRIOR, count) > 40


@pytest.mark.parametrize(
    ("name", "law"),
    [("posterior:1", [1, 0, 0, 0]), ("posterior:2", [2 / 3, 1 / 3, 0, 0]),
     ("posterior:0,0.8", [5 / 9, 5 / 18, 1 / 6, 0]), ("posterior:3,0.6", [2 / 3, 1 / 3, 0, 0]),
     ("posterior:4,1", [0.5, 0.25, 0.15, 0.1]), ("posterior:9", [0.5, 0.25, 0.15, 0.1])],
)  # fmt: skip
def test_posterior_draws_from_the_likeliest_tokens(name, law):
    """By hand: the smallest set that makes up 0.8 is {0, 1, 2}; of 5/9, 5/18, 1/6 the first two make up 0.6."""
    law_V = torch.tensor(law, dtype=F64)
    share_V = frequencies(nearest(random_walk(name, [INF, 0.0], 20_000)))
    assert (share_V[law_V == 0] == 0).all()
    kept = law_V > 0
    assert chi_square(share_V[kept], law_V[kept], 20_000) < 16.3


# --- one position, by the library's loop ------------------------------------------------------------------------------


LOOPED = [
    ("euler", "uniform", 40), ("heun", "ramp:0.5", 32), ("dpmpp_2m", "uniform", 24), ("dpmpp_2m", "ramp:0.5", 24),
    ("ancestral", "uniform", 48), ("sde", "uniform", 32), ("sde", "shuffled", 5), ("posterior", "ramp:0.5", 3),
    ("posterior", "shuffled", 5), ("renoise", "blocks:20", 6), ("renoise", "uniform", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "steps"), fast(LOOPED[3], LOOPED[5], *LOOPED[7:10:2], of=LOOPED))
def test_generated_tokens_have_the_law(loop_of, settings_of, name, path, steps):
    """1,000 independent tokens in 20 rows: chi-square, 0.1%; an error of 4% would be seen 19 times in 20."""
    settings = settings_of(path=path, solver=name, steps=steps)
    loop = loop_of(mixture_denoiser(), Log(0.25, 12.0))
    *_, last = generate(loop, [[BOS, *[None] * 50, EOS]] * 20, range(20), settings)
    written = last.ids_BL[:, 1:-1] - 4
    assert ((written >= 0) & (written < 4)).all()
    assert chi_square(frequencies(written), PRIOR, 1000) < 16.3


@pytest.mark.parametrize(
    ("name", "law"),
    [("posterior:1", [1.0, 0, 0, 0]), ("posterior:2", [2 / 3, 1 / 3, 0, 0]),
     ("posterior:0,0.8", [5 / 9, 5 / 18, 1 / 6, 0])],
)  # fmt: skip
def test_generated_tokens_are_among_the_likeliest(loop_of, settings_of, name, law):
    """The limits of `posterior` hold for the draw that finishes a position too; in one step there is no other."""
    settings = settings_of(path="uniform", solver=name, steps=1)
    *_, last = generate(
        loop_of(mixture_denoiser(), SCHEDULE), [[BOS, *[None] * 200, EOS]] * 5, range(5), settings
    )  # fmt: skip
    share_V, law_V = frequencies(last.ids_BL[:, 1:-1] - 4), torch.tensor(law, dtype=F64)
    kept_V = law_V > 0
    assert (share_V[~kept_V] == 0).all()
    assert chi_square(share_V[kept_V], law_V[kept_V], 1000) < 13.8


# --- three coupled tokens, by the library's loop ----------------------------------------------------------------------


def test_the_yardstick_is_sharp():
    """Of the law itself 2,000 draws are 0.018 away, and 0.048 once in 2,000 times; tokens drawn apart are 0.3 away."""
    gen, hot = torch.Generator().manual_seed(0), torch.eye(8, dtype=F64)
    draws = torch.multinomial(LAW, 4_000_000, replacement=True, generator=gen).view(2000, 2000)
    far = sorted(total_variation(hot[row].mean(0)) for row in draws)
    assert far[1000] < 0.019 and far[-3] < 0.048
    assert total_variation(sample_jointly("uniform", "posterior", 1, 1000)[0]) > 0.25


COUPLED = [
    ("uniform", "euler", 2, 24), ("uniform", "heun", 2, 9), ("uniform", "dpmpp_2m", 2, 16),
    ("uniform", "ancestral", 4, 24), ("uniform", "sde", 2, 9), ("uniform", "posterior", 4, 40),
    ("uniform", "renoise", 6, 60), ("ramp:1", "dpmpp_2m", 4, 16), ("ramp:1", "sde", 2, 12),
    ("ramp:1", "posterior", 2, 24), ("blocks:1", "heun", 6, 16), ("confidence", "posterior", 2, 24),
    ("confidence", "ancestral", 2, 32), ("entropy", "posterior", 2, 32),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "few", "many"), fast(COUPLED[1], COUPLED[7], of=COUPLED))
def test_every_kind_of_solver_reaches_the_joint_law(path, name, few, many):
    """By total variation: far from the law in a few steps, and as near as 2,000 draws of it can be in many."""
    off, made = sample_jointly(path, name, few, 1000)
    assert made == few and total_variation(off) > 0.07
    right, made = sample_jointly(path, name, many, 2000)
    assert made <= many and total_variation(right) < 0.048


TOKEN_BY_TOKEN = [
    ("blocks:1", "posterior"), ("blocks:1", "sde"), ("shuffled", "ancestral"), ("shuffled", "renoise"),
    ("ramp:1e6", "posterior"), ("surest", "posterior"), ("bounded:0", "posterior"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name"), fast(*TOKEN_BY_TOKEN[::3], of=TOKEN_BY_TOKEN))
def test_token_by_token_what_draws_is_exact_in_three_evaluations(path, name):
    """From no evidence to finished one by one is exact for whatever draws its token; the flow takes the likeliest."""
    share, made = sample_jointly(path, name, 3, 4000)
    assert made == 3 and total_variation(share) < 0.031
    assert total_variation(sample_jointly(path, "euler", 3, 50)[0]) > 0.4

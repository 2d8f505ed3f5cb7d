"""The adaptive schedule's fit: the truth is found, whatever the density that levels are drawn from."""

import math

import numpy as np
import pytest
import torch

from scorelm.noise.fit import EntropyCurve, fit_gumbel, sum_by_bin
from scorelm.noise.schedule import Gumbel


def gumbel_curve(sigma, mu, beta):
    return np.exp(-np.exp(-(np.log(sigma) - mu) / beta))


LOW, HIGH = math.log(0.8), math.log(30.0)


def sample_levels(rng, power, size):
    """log sigma with a density that rises or falls steeply over the range, and is nowhere zero."""
    place = np.where(rng.random(size) < 0.2, rng.random(size), rng.random(size) ** power)
    return LOW + (HIGH - LOW) * place


@pytest.mark.parametrize(("mu", "beta"), [(0.9, 0.5), (1.5, 0.3), (1.2, 0.9)])
@pytest.mark.parametrize("power", [0.3, 3.0])
def test_fit_gumbel_recovers_the_truth(mu, beta, power):
    rng = np.random.default_rng(1)
    g = sample_levels(rng, power, 20_000)
    entropy = 7.6 * gumbel_curve(np.exp(g), mu, beta) + 0.5 * rng.standard_normal(len(g))
    found = fit_gumbel(g, entropy, np.ones_like(g), start=(0.6, 0.7))
    assert found == pytest.approx((mu, beta), abs=0.03)


def test_fit_gumbel_weights_count_as_repetitions():
    rng = np.random.default_rng(2)
    g = sample_levels(rng, 1.0, 200)
    entropy = 5 / (1 + np.exp(-3 * (g - 1.2)))  # no Gumbel curve, so that weights matter
    weight = rng.integers(1, 6, 200)
    weighted = fit_gumbel(g, entropy, weight.astype(float), (1.0, 0.5))
    repeated = fit_gumbel(g.repeat(weight), entropy.repeat(weight), np.ones(weight.sum()), (1.0, 0.5))
    unweighted = fit_gumbel(g, entropy, np.ones(200), (1.0, 0.5))
    assert weighted == pytest.approx(repeated, abs=1e-5)
    assert weighted != pytest.approx(unweighted, abs=1e-4)


def add(curve, sigma, cross_entropy):
    sigma, cross_entropy = torch.as_tensor(sigma), torch.as_tensor(cross_entropy)
    yes = torch.ones(len(sigma), dtype=torch.bool)
    curve.add(curve.binned(sigma, cross_entropy, yes), torch.tensor(True))


def observe(curve, truth, power, seed, updates=60):
    rng = np.random.default_rng(seed)
    for _ in range(updates):
        g = sample_levels(rng, power, 2000)
        noisy = truth(g) + 0.3 * rng.standard_normal(len(g))
        add(curve, np.exp(g), noisy)
    return curve


def not_a_gumbel(g):
    return 7 * (0.15 + 0.85 / (1 + np.exp(-2.5 * (g - 1.3))))


START = Gumbel(0.8, 30.0, mu=0.6, beta=0.8)


def test_the_fit_does_not_depend_on_the_sampling_density():
    fits, naive = [], []
    for power in (0.4, 2.5):
        fit = observe(EntropyCurve(START), not_a_gumbel, power, seed=3).fit()
        fits.append((fit.mu, fit.beta))
        g = sample_levels(np.random.default_rng(4), power, 50_000)
        naive.append(fit_gumbel(g, not_a_gumbel(g), np.ones_like(g), (0.6, 0.8)))
    apart = np.abs(np.subtract(*fits)).max()
    assert apart < 0.03
    assert apart < 0.2 * np.abs(np.subtract(*naive)).max()


def test_entropy_curve_recovers_a_gumbel_and_keeps_the_range():
    fit = observe(EntropyCurve(START), lambda g: 6 * gumbel_curve(np.exp(g), 1.3, 0.4), 0.5, seed=5).fit()
    assert (fit.mu, fit.beta) == pytest.approx((1.3, 0.4), abs=0.03)
    assert (fit.sigma_min, fit.sigma_max) == (START.sigma_min, START.sigma_max)


def test_entropy_curve_forgets():
    curve = observe(EntropyCurve(START, forget=0.9), lambda g: 6 * gumbel_curve(np.exp(g), 2.2, 0.4), 1.0, seed=6)
    before = curve.fit()
    after = observe(curve, lambda g: 6 * gumbel_curve(np.exp(g), 1.0, 0.6), 1.0, seed=7).fit()
    assert before.mu == pytest.approx(2.2, abs=0.05)
    assert (after.mu, after.beta) == pytest.approx((1.0, 0.6), abs=0.05)


def test_entropy_curve_waits_for_observations():
    curve = EntropyCurve(START)
    assert curve.fit() == START
    add(curve, torch.empty(0), torch.empty(0))
    add(curve, torch.full((5000,), 2.0), torch.full((5000,), 3.0))  # a single bin
    assert curve.fit() == START


def test_entropy_curve_takes_the_ends_of_the_range():
    curve = EntropyCurve(START)
    add(curve, [START.sigma_min, START.sigma_max], [1.0, 2.0])
    assert curve.sums[0, 0] == curve.sums[0, -1] == 1 and curve.sums[0].sum() == 2
    assert curve.sums[1, 0] == 1.0 and curve.sums[1, -1] == 2.0


def test_what_does_not_count_is_not_seen_whatever_its_numbers():
    curve = EntropyCurve(START)
    sigma, cross_entropy = torch.tensor([2.0, 0.0, math.inf, 2.0]), torch.tensor([1.5, math.nan, math.inf, 7.0])
    sums = curve.binned(sigma, cross_entropy, torch.tensor([True, False, False, False]))
    assert sums.sum(1).tolist() == [1.0, 1.5]
    curve.add(sums, torch.tensor(False))
    assert not curve.sums.any()
    curve.add(sums, torch.tensor(True))
    assert torch.equal(curve.sums, sums)


def test_sums_by_bin_are_those_of_a_loop():
    bins, values = torch.randint(0, 5, (40,)), torch.randn(40, 3, dtype=torch.float64)
    expected = torch.zeros(6, 3, dtype=torch.float64).index_add_(0, bins, values)
    torch.testing.assert_close(sum_by_bin(bins, values, 6), expected)

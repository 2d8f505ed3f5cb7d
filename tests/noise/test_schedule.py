"""Schedules against the published formulas, and what every one of them promises."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.noise.schedule import (
    Cosine,
    Gumbel,
    Log,
    Power,
    easy_snr,
    make_schedule,
    schedule_from_dict,
    schedule_to_dict,
)

NAMES = ["linear", "karras", "log", "cosine", "adaptive", "ddlm", "cdcd"]
CLOSED = [name for name in NAMES if name != "adaptive"]


def grid(n=513):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def gumbel_curve(sigma, mu, beta):
    return np.exp(-np.exp(-(np.log(sigma) - mu) / beta))


def check(schedule):
    """Everything that a schedule promises, in float64."""
    u = grid()
    sigma = schedule.sigma(u)
    assert (sigma.diff() > 0).all()
    assert float(sigma[0]) == pytest.approx(schedule.sigma_min, rel=1e-9)
    assert float(sigma[-1]) == pytest.approx(schedule.sigma_max, rel=1e-9)
    torch.testing.assert_close(schedule.u(sigma), u, rtol=0, atol=1e-7)
    levels = torch.tensor(np.geomspace(schedule.sigma_min, schedule.sigma_max, 301))
    inverse = schedule.u(levels)
    assert (inverse.diff() > 0).all() and float(inverse.min()) >= -1e-12 and float(inverse.max()) <= 1 + 1e-12
    torch.testing.assert_close(schedule.sigma(inverse), levels, rtol=1e-6, atol=0)
    inner, h = u[5:-5], 1e-6
    numeric = (schedule.sigma(inner + h) - schedule.sigma(inner - h)) / (2 * h)
    torch.testing.assert_close(schedule.derivative(inner), numeric, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dim", "vocab"), [(16, 50), (32, 2048), (128, 32768)])
def test_every_schedule_is_a_smooth_bijection(name, dim, vocab):
    check(make_schedule(name, dim, vocab))


@pytest.mark.parametrize("name", CLOSED)
@settings(max_examples=25, deadline=None)
@given(low=st.floats(0.02, 3), ratio=st.floats(1.2, 1000))
def test_closed_forms_over_any_range(name, low, ratio):
    schedule = make_schedule(name, 32, 2048, low, low * ratio)
    assert (schedule.sigma_min, schedule.sigma_max) == (low, low * ratio)
    check(schedule)


@settings(max_examples=60, deadline=None)
@given(low=st.floats(0.05, 3), ratio=st.floats(3, 40), place=st.floats(0.1, 0.9), beta=st.floats(0.35, 3))
def test_fitted_curves_are_smooth_bijections(low, ratio, place, beta):
    place = min(place, 5.0 * beta / math.log(ratio))  # the curve stays above 1e-65 at sigma_min
    check(Gumbel(low, low * ratio, mu=math.log(low) + place * math.log(ratio), beta=beta))


@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_shape_are_kept(name):
    schedule = make_schedule(name, 32, 2048)
    u = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        sigma = schedule.sigma(u.to(dtype))
        assert sigma.dtype == schedule.u(sigma).dtype == schedule.derivative(u.to(dtype)).dtype == dtype
        assert sigma.shape == u.shape
        torch.testing.assert_close(schedule.u(sigma), u.to(dtype), rtol=0, atol=2e-4)


def test_against_published_formulas():
    u = grid(101)
    low, high = 0.3, 40.0
    n = np.arange(101)[::-1]  # Karras counts from the noisy end
    karras = (high ** (1 / 7) + n / 100 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(make_schedule("karras", 32, 50, low, high).sigma(u), karras, rtol=1e-12)
    np.testing.assert_allclose(make_schedule("linear", 32, 50, low, high).sigma(u), np.linspace(low, high, 101))
    np.testing.assert_allclose(make_schedule("log", 32, 50, low, high).sigma(u), np.geomspace(low, high, 101))
    sigma = make_schedule("cosine", 32, 50, low, high).sigma(u).numpy()
    alpha_bar = 1 / (1 + sigma**2)  # variance preserving form of the same signal-to-noise ratio
    angle = np.arccos(np.sqrt(alpha_bar))
    np.testing.assert_allclose(np.diff(angle), np.diff(angle).mean(), rtol=1e-9)


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.7])
def test_equal_steps_of_u_remove_equal_cross_entropy(beta):
    schedule = Gumbel(0.8, 30.0, mu=math.log(3.0), beta=beta)
    height = 7.6
    removed = np.diff(height * gumbel_curve(schedule.sigma(grid(65)).numpy(), schedule.mu, beta))
    np.testing.assert_allclose(removed, removed.mean(), rtol=1e-8)


def test_preset_and_default_ranges():
    assert make_schedule("ddlm", 64, 2048) == Power(1.0, 10.0, rho=1.0)
    assert make_schedule("cdcd", 64, 2048) == Power(1.0, 300.0, rho=1.0)
    for name in ("linear", "karras", "log", "cosine", "adaptive"):
        schedule = make_schedule(name, 64, 2048)
        assert schedule.sigma_max == pytest.approx(8 / 0.25)
        assert 8 / schedule.sigma_min == pytest.approx(1.4 * math.sqrt(2 * math.log(20 * 2047)))
    assert type(make_schedule("log", 64, 50)) is Log and type(make_schedule("cosine", 64, 50)) is Cosine
    assert make_schedule("karras", 64, 50).rho == 7


@pytest.mark.parametrize("vocab", [2, 50, 2048, 32768])
def test_easy_snr_leaves_one_in_twenty(vocab):
    assert (vocab - 1) * math.exp(-(easy_snr(vocab) ** 2) / 2) == pytest.approx(1 / 20)
    assert math.isfinite(easy_snr(1))


def test_easy_snr_is_easy():
    """Tokens found among 2,048 random embeddings at, above and far below easy_snr: Monte Carlo."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((2048, 64))
    table *= 8 / np.linalg.norm(table, axis=1, keepdims=True)

    def found(snr):
        x = table[:300] + 8 / snr * rng.standard_normal((300, 64))
        return ((x @ table.T).argmax(1) == np.arange(300)).mean()

    easy = easy_snr(2048)
    assert found(1.4 * easy) > 0.98 and found(easy) > 0.7 and found(easy / 3) < 0.1 and found(0.25) < 0.02


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("sqrt", None, None),
        ("", None, None),
        ("Log", None, None),
        ("log", 3.0, 3.0),
        ("log", 5.0, 2.0),
        ("linear", -1.0, 2.0),
        ("linear", 0.0, 2.0),
        ("linear", 1.0, 0.0),
        ("karras", math.nan, 2.0),
        ("karras", 1.0, math.inf),
        ("adaptive", 1e9, None),
    ],
)
def test_make_schedule_refuses(name, low, high):
    with pytest.raises(InputError):
        make_schedule(name, 32, 2048, low, high)


@pytest.mark.parametrize("name", NAMES)
def test_dict_round_trip(name):
    schedule = make_schedule(name, 32, 2048)
    values = json.loads(json.dumps(schedule_to_dict(schedule)))
    assert schedule_from_dict(values) == schedule
    assert values["shape"] in ("power", "log", "cosine", "gumbel")


LOG = {"shape": "log", "sigma_min": 1.0, "sigma_max": 2.0}
POWER = {"shape": "power", "sigma_min": 1.0, "sigma_max": 2.0, "rho": 7.0}
GUMBEL = {"shape": "gumbel", "sigma_min": 1.0, "sigma_max": 2.0, "mu": 0.3, "beta": 0.5}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"shape": "log"},
        {"sigma_min": 1.0, "sigma_max": 2.0},
        LOG | {"shape": "exp"},
        LOG | {"shape": None},
        LOG | {"shape": ["log"]},
        LOG | {"rho": 7.0},
        LOG | {"sigma_max": None},
        LOG | {"sigma_max": "2"},
        LOG | {"sigma_max": [2.0]},
        LOG | {"sigma_max": math.nan},
        LOG | {"sigma_max": math.inf},
        LOG | {"sigma_max": 1.0},
        LOG | {"sigma_max": 0.5},
        LOG | {"sigma_min": 0.0},
        LOG | {"sigma_min": -1.0},
        POWER | {"rho": 0.0},
        POWER | {"rho": -7.0},
        {k: v for k, v in POWER.items() if k != "rho"},
        GUMBEL | {"beta": 0.0},
        GUMBEL | {"beta": -0.5},
        GUMBEL | {"mu": math.nan},
        GUMBEL | {"mu": -math.inf},
        {k: v for k, v in GUMBEL.items() if k != "mu"},
    ],
)
def test_bad_dicts_are_refused(values):
    with pytest.raises(InputError, match="noise schedule"):
        schedule_from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        LOG | {"sigma_min": True},  # JSON true is no number
        LOG | {"sigma_max": 10**400},  # a whole number beyond floats
    ],
    ids=["bool", "huge-int"],
)
def test_numbers_that_are_no_floats_are_refused(values):
    with pytest.raises(InputError, match="noise schedule"):
        schedule_from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        POWER | {"rho": 1e-9},  # sigma_max ** (1 / rho) overflows
        POWER | {"rho": 1e300},  # sigma ** (1 / rho) is 1 at both ends
        GUMBEL | {"mu": 1e6},  # a curve that is 0 over the whole range
        GUMBEL | {"mu": -1e6},  # or 1
        GUMBEL | {"beta": 1e-300},
        GUMBEL | {"beta": 1e300},
    ],
    ids=["rho-tiny", "rho-huge", "mu-high", "mu-low", "beta-tiny", "beta-huge"],
)
def test_a_dict_is_refused_or_gives_a_schedule_that_works(values):
    """A model directory is untrusted: no dict may load into a schedule that later gives nan or does not rise."""
    try:
        schedule = schedule_from_dict(values)
    except InputError:
        return
    sigma = schedule.sigma(grid(9))
    assert torch.isfinite(sigma).all() and (sigma.diff() > 0).all()


@pytest.mark.parametrize(
    "schedule",
    [
        make_schedule("adaptive", 32, 2048, sigma_min=0.05),  # the user's own range
        make_schedule("adaptive", 32, 2048, sigma_max=1e5),
        Gumbel(0.8, 22.0, mu=math.log(4.0), beta=0.05),  # the sharpest fit that fit_gumbel returns
        Gumbel(0.8, 22.0, mu=math.log(22.0), beta=0.3),
    ],
    ids=["sigma_min", "sigma_max", "sharp", "late"],
)
def test_derivative_is_finite_wherever_levels_are_drawn(schedule):
    """The likelihood term weights by it at every level, the clamped ends of `spread` and `ramp` included."""
    slope = schedule.derivative(grid())
    assert not slope.isnan().any()
    assert torch.isfinite(slope).all() and (slope > 0).all()

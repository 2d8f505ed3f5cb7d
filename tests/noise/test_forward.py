"""The forward process and the levels of generation, at both ends and between."""

import math

import pytest
import torch

from scorelm.noise.forward import add_noise, to_sigma
from scorelm.noise.schedule import make_schedule

E, INF = 16, math.inf


def test_add_noise_is_the_forward_process():
    e, eps = torch.randn(2, 400, 50, E, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.0, 0.5, 3.0, 40.0, INF]).repeat(10).expand(400, 50)
    x = add_noise(e, sigma, eps)
    assert torch.equal(x[sigma == 0], e[sigma == 0])
    assert (x[sigma.isinf()] == 0).all()
    for level in (0.5, 3.0, 40.0):
        found = ((x - e)[sigma == level] / level).double().flatten()
        torch.testing.assert_close(found, eps[sigma == level].double().flatten(), rtol=0, atol=1e-4)
        assert abs(float(found.mean())) < 5 / math.sqrt(len(found))
        assert float(found.std()) == pytest.approx(1, abs=0.02)


def test_a_gradient_passes_only_where_x_says_something():
    e = torch.ones(3, E, requires_grad=True)
    add_noise(e, torch.tensor([0.0, 2.0, INF]), torch.ones(3, E)).sum().backward()
    assert e.grad.tolist() == [[1.0] * E, [1.0] * E, [0.0] * E]


@pytest.mark.parametrize("name", ["log", "karras", "adaptive"])
def test_levels_of_generation_are_exact_at_both_ends(name):
    schedule = make_schedule(name, E, 50)
    u = torch.tensor([-0.1, 0.0, 1e-9, 0.5, 1 - 1e-9, 1.0, 1.1], dtype=torch.float64)
    sigma = to_sigma(u, schedule)
    assert sigma.dtype == torch.float32
    assert sigma[:2].tolist() == [0, 0] and sigma[-2:].tolist() == [INF, INF]
    inner = schedule.sigma(u[2:5])
    torch.testing.assert_close(sigma[2:5].double(), inner, rtol=1e-6, atol=0)
    assert float(sigma[2]) == pytest.approx(schedule.sigma_min, rel=1e-4)
    assert float(sigma[4]) == pytest.approx(schedule.sigma_max, rel=1e-4)

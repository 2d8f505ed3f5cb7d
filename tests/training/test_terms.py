"""The optional terms of the loss, each against its closed form."""

import math

import pytest
import torch
from torch import nn

from scorelm.config.recipe import Mixture, TrainingConfig
from scorelm.noise.schedule import Gumbel, make_schedule
from scorelm.objectives.score import likelihood_term, z_term

from .batches import SCHEDULE, E, V, gradients, loss_of, noisy_draw, only, pack, predicted, rng, trained_like

INF = math.inf


def test_terms_are_added_with_their_weights():
    denoiser, draw = trained_like(), noisy_draw(pack(4), mixture=only("shared", "prefix", "absorbing"))

    def loss(**weights):
        return loss_of(denoiser, draw, TrainingConfig(**weights))

    seen, _ = predicted(denoiser, draw)
    e, sigma = denoiser.embedding(draw.ids_BS)[draw.open_BS].double(), draw.level_BS[draw.open_BS].double()
    x0 = seen.logits_NV.double().softmax(-1) @ denoiser.embedding.table().double()
    u = SCHEDULE.u(sigma.clamp(max=SCHEDULE.sigma_max))
    h = 1e-6
    inner = u.clamp(h, 1 - h)
    slope = (SCHEDULE.sigma(inner + h) - SCHEDULE.sigma(inner - h)) / (2 * h)
    likelihood = (
        torch.where(sigma.isfinite(), slope / sigma**3 * (e - x0).pow(2).sum(-1), 0.0).sum().detach() / draw.live
    )
    plain = float(loss().loss.detach())
    assert float(likelihood) > 1e-3
    assert float(loss(likelihood_weight=0.5).loss.detach()) == pytest.approx(plain + 0.5 * float(likelihood), rel=1e-3)
    z = (seen.logits_NV.logsumexp(-1) - seen.context_free_NV.logsumexp(-1)).pow(2).sum().detach() / draw.live
    assert float(z) > 1e-3
    assert float(loss(z_loss=2.0).loss.detach()) == pytest.approx(plain + 2 * float(z), rel=1e-4)
    assert torch.equal(loss(z_loss=2.0, likelihood_weight=1.0).cross_entropy_N, loss().cross_entropy_N)


def test_gradients_are_finite_on_the_whole_mixture():
    denoiser, draw = trained_like(), noisy_draw(pack(24), mixture=only(*Mixture.model_fields))
    config = TrainingConfig(likelihood_weight=1.0, z_loss=1.0)
    _, found = gradients(denoiser, draw, config, self_conditioned=True)
    assert len(found) == len(list(denoiser.parameters())) and all(torch.isfinite(g).all() for g in found)


def test_the_likelihood_term_is_finite_on_a_range_of_ones_own():
    """noise.sigma_min = 0.05 with the adaptive schedule: ramps reach u = 0, where the fitted curve underflows."""
    schedule = make_schedule("adaptive", E, V, sigma_min=0.02)
    draw = noisy_draw(pack(24), mixture=only("ramp"), schedule=schedule)
    outcome = loss_of(trained_like(), draw, TrainingConfig(likelihood_weight=1.0), schedule=schedule)
    assert torch.isfinite(outcome.loss)


SCHEDULES = [make_schedule(name, E, V) for name in ("linear", "karras", "log", "cosine", "adaptive", "ddlm")]
SCHEDULES.append(Gumbel(0.8, 25.0, mu=1.4, beta=0.8))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__}-{s.sigma_max:g}")
def test_likelihood_term_integrates_to_the_bound(schedule):
    """Its mean over u is the integral of sigma^-3 |e - x0(sigma)|^2, by quadrature in sigma, for an x0 that moves."""
    e = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)

    def x0(sigma):
        return e / (1 + sigma[:, None] ** 2 / 9)

    n = 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sigma = schedule.sigma(u)
    found = likelihood_term(e.expand(n, 3), x0(sigma), sigma, schedule).mean()
    g = torch.linspace(math.log(schedule.sigma_min), math.log(schedule.sigma_max), n + 1, dtype=torch.float64)
    level = ((g[1:] + g[:-1]) / 2).exp()
    integrand = level**-3 * (e - x0(level)).pow(2).sum(-1) * level  # d sigma = sigma d log sigma
    expected = integrand.sum() * (g[1] - g[0])
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    constant = likelihood_term(e.expand(n, 3), torch.zeros(n, 3, dtype=torch.float64), sigma, schedule).mean()
    closed = float(e.square().sum()) / 2 * (schedule.sigma_min**-2 - schedule.sigma_max**-2)
    assert float(constant) == pytest.approx(closed, rel=1e-4)


def test_likelihood_term_is_nothing_without_evidence():
    e, x0 = torch.ones(3, E, requires_grad=True), torch.zeros(3, E, requires_grad=True)
    term = likelihood_term(e, x0, torch.tensor([INF, 2.0, INF]), SCHEDULE)
    assert term[0] == term[2] == 0 and term[1] > 0
    term.sum().backward()
    assert torch.isfinite(e.grad).all() and torch.isfinite(x0.grad).all() and (x0.grad[0] == 0).all()


def test_z_term_is_zero_at_the_start_and_for_any_normalised_update():
    denoiser = trained_like()
    nn.init.zeros_(denoiser.context.weight)  # as it is built
    seen, _ = predicted(denoiser, noisy_draw(pack(4)))
    assert (z_term(seen.logits_NV, seen.context_free_NV) == 0).all()
    free = 3 * torch.randn(5, V, generator=rng(3), dtype=torch.float64)
    context = torch.randn(5, V, generator=rng(4), dtype=torch.float64)
    mean = (free.softmax(-1) * context.exp()).sum(-1).log()  # log of the update's partition function
    torch.testing.assert_close(z_term(free + context, free), mean**2)
    torch.testing.assert_close(z_term(free + context - mean[:, None], free), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(z_term(free + 3.0, free), torch.full((5,), 9.0, dtype=torch.float64))

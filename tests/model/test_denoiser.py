"""The denoiser: what evidence and prior give, what the trunk adds, the ends of sigma, conditioning and gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from scorelm.model.denoiser import Places
from scorelm.model.layout import Layout

from .denoisers import E, V, fresh, logits, noisy, trained_like, whole

INF = math.inf
BOTH = pytest.mark.parametrize("conditioning", ["none", "film"])
MIXED = torch.tensor([[0, 0.7, 3.0, INF, 0, 1.5, 20.0, INF, 0], [0, INF, INF, 2.0, 5.0, 0.4, 0.2, 1.0, 0]])


# --- what evidence and prior give -------------------------------------------------------------------------------------


@BOTH
def test_as_built_logits_are_evidence_and_prior_exactly(conditioning):
    denoiser = fresh(conditioning)
    nn.init.normal_(denoiser.prior)
    _, x = noisy(denoiser, MIXED)
    found = logits(denoiser, x, MIXED, whole(2, 9))
    table = denoiser.embedding.table()
    for b in range(2):
        for i in range(9):
            sigma = float(MIXED[b, i])
            if sigma > 0:
                tau = max(sigma, math.sqrt(E) / 12) ** -2
                expected = tau * (table.double() @ x[b, i].double()) + denoiser.prior.double()
                torch.testing.assert_close(found[b, i].double(), expected, rtol=1e-5, atol=1e-4)
    at_infinity = found[MIXED.isinf()]
    assert torch.equal(at_infinity, denoiser.prior.expand_as(at_infinity))


@pytest.mark.parametrize("sigma", [0.8, 2.0, 8.0])
def test_a_position_without_context_has_the_bayes_posterior(sigma):
    denoiser = fresh()
    counts = torch.arange(V) ** 2
    denoiser.set_prior(counts)
    prior = (counts.double() + 0.5) / (counts.double() + 0.5).sum()
    torch.testing.assert_close(denoiser.prior.double().exp(), prior, rtol=1e-5, atol=1e-8)
    sigma_BL = torch.full((3, 6), sigma)
    _, x = noisy(denoiser, sigma_BL)
    square = (x.double()[:, :, None] - denoiser.embedding.table().double()).pow(2).sum(-1)
    expected = (prior.log() - square / (2 * sigma**2)).softmax(-1)
    found = denoiser.predict(x, sigma_BL, whole(3, 6)).probability_NV.double()
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sigma", [0.6, 1.5, 6.0])
def test_the_score_is_the_gradient_of_the_log_density(sigma):
    """Tweedie: ``(x0 - x) / sigma^2``; Gaussian mixture over the table, differentiated in float64."""
    denoiser = fresh(dim=4)
    denoiser.set_prior(torch.arange(V))
    sigma_BL = torch.full((2, 5), sigma)
    _, x = noisy(denoiser, sigma_BL)
    x0 = denoiser.predict(x, sigma_BL, whole(2, 5)).x0_NE.view_as(x)
    point = x.double().requires_grad_()
    log_prior = denoiser.prior.detach().double().log_softmax(0)
    table = denoiser.embedding.table().detach().double()
    normal = torch.distributions.Normal(table, torch.full_like(table, sigma))
    density = (normal.log_prob(point[:, :, None]).sum(-1) + log_prior).logsumexp(-1)
    (expected,) = torch.autograd.grad(density.sum(), point)
    torch.testing.assert_close((x0 - x).double() / sigma**2, expected, rtol=1e-3, atol=1e-4)


@BOTH
@pytest.mark.parametrize("self_conditioned", [False, True])
def test_the_trunk_reads_soft_tokens_and_updates_the_evidence(conditioning, self_conditioned):
    """The method in five lines, position by position, with every weight random."""
    denoiser, layout = trained_like(conditioning), whole(2, 9)
    nn.init.normal_(denoiser.prior)  # strong enough to matter
    ids, x = noisy(denoiser, MIXED)
    cond = torch.randn(2, 9, E, generator=torch.Generator().manual_seed(3)) if self_conditioned else None
    table, soft, context_free = denoiser.embedding.table(), torch.zeros(2, 9, 32), torch.zeros(2, 9, V)
    for b in range(2):
        for i in range(9):
            tau = max(float(MIXED[b, i]), math.sqrt(E) / 12) ** -2
            context_free[b, i] = tau * (table @ x[b, i]) + denoiser.prior
            weight = context_free[b, i].softmax(-1) if MIXED[b, i] > 0 else torch.eye(V)[ids[b, i]]
            soft[b, i] = weight @ denoiser.token_in
            if cond is not None:
                soft[b, i] += denoiser.self_condition.weight @ cond[b, i]
    expected = context_free + denoiser.context(denoiser.backbone(soft, MIXED, layout))
    found = denoiser.predict(x, MIXED, layout, cond)
    torch.testing.assert_close(found.logits_NV, expected[MIXED > 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.context_free_NV, context_free[MIXED > 0], rtol=1e-4, atol=1e-4)


# --- what is predicted ------------------------------------------------------------------------------------------------


@BOTH
def test_open_positions_are_those_of_documents_with_noise(conditioning):
    denoiser, layout = trained_like(conditioning), whole(2, 7, padding=2)
    _, x = noisy(denoiser, MIXED)
    found = denoiser.predict(x, MIXED, layout)
    assert torch.equal(found.open_BL, (MIXED > 0) & (torch.arange(9) < 7))
    assert found.logits_NV.shape == (int(found.open_BL.sum()), V)


@BOTH
@pytest.mark.parametrize("sigma", [0.0, 2.0, INF])
def test_all_given_all_noisy_and_no_evidence_at_all(conditioning, sigma):
    denoiser = trained_like(conditioning)
    sigma_BL = torch.full((2, 6), sigma)
    _, x = noisy(denoiser, sigma_BL)
    found = denoiser.predict(x, sigma_BL, whole(2, 6)).logits_NV
    assert found.shape == (12 if sigma else 0, V) and found.dtype == torch.float32 and torch.isfinite(found).all()


def test_what_is_known_already_changes_nothing():
    """Ids of given positions, the table and the places may be handed in; left out, they are found."""
    denoiser, layout = trained_like(), whole(2, 7, padding=2)
    ids, x = noisy(denoiser, MIXED)
    known = denoiser.predict(
        x, MIXED, layout, ids_BL=ids, table_VE=denoiser.embedding.table(), places=Places.of(MIXED, layout)
    )
    assert torch.equal(known.logits_NV, denoiser.predict(x, MIXED, layout).logits_NV)


def test_places_of_each_kind_and_the_order_that_puts_them_together():
    sigma = torch.tensor([[2.0, 0.0, INF], [INF, 1.0, INF]])
    layout = replace(whole(2, 3), segment_BL=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    places = Places.of(sigma, layout)
    assert [t.tolist() for t in places[:4]] == [[0, 4], [2, 3], [1, 5], [0, 2, 3, 4]]
    assert torch.cat(places[:3])[places.order_P].tolist() == list(range(6))


def test_an_autoregressive_prediction_reads_the_token_before():
    """Its logits are the prior and the context of clean tokens under a causal mask; later tokens have no say."""
    denoiser = trained_like()
    gen = torch.Generator().manual_seed(0)
    before = torch.randint(V, (2, 6), generator=gen)
    layout = Layout.causal(torch.ones_like(before), torch.arange(6).expand(2, 6))
    open_BL = torch.rand(2, 6, generator=gen) < 0.6
    found = denoiser.predict_next(before, layout, open_BL)
    hidden = denoiser.backbone(denoiser.token_in[before], torch.zeros(2, 6), layout)
    torch.testing.assert_close(found.logits_NV, (denoiser.context(hidden) + denoiser.prior)[open_BL])
    assert torch.equal(found.context_free_NV, denoiser.prior.expand_as(found.logits_NV))
    later = before.clone()
    later[:, 3:] = (later[:, 3:] + 1) % V
    changed = denoiser.predict_next(later, layout, torch.ones_like(open_BL)).logits_NV.view(2, 6, V)
    same = denoiser.predict_next(before, layout, torch.ones_like(open_BL)).logits_NV.view(2, 6, V)
    assert torch.equal(changed[:, :3], same[:, :3]) and (changed[:, 3:] != same[:, 3:]).any(-1).all()


# --- the two ends -----------------------------------------------------------------------------------------------------


@BOTH
def test_x_says_nothing_at_infinity(conditioning):
    denoiser = trained_like(conditioning)
    _, x = noisy(denoiser, MIXED)
    x2 = x.clone()
    gen = torch.Generator().manual_seed(5)
    x2[MIXED.isinf()] = 1e30 * torch.randn(int(MIXED.isinf().sum()), E, generator=gen)
    assert torch.equal(logits(denoiser, x, MIXED, whole(2, 9)), logits(denoiser, x2, MIXED, whole(2, 9)))


@BOTH
def test_a_given_token_is_read_through_small_errors(conditioning):
    denoiser = trained_like(conditioning)
    ids, x = noisy(denoiser, MIXED)
    given = MIXED == 0
    x2 = x.clone()
    x2[given] += 0.05 * torch.randn(int(given.sum()), E, generator=torch.Generator().manual_seed(5))
    before = logits(denoiser, x, MIXED, whole(2, 9))
    assert torch.equal(before, logits(denoiser, x2, MIXED, whole(2, 9)))
    x2[0, 4] = denoiser.embedding((ids[0, 4] + 1) % V).detach()  # another token, on the other hand, is seen
    changed = logits(denoiser, x2, MIXED, whole(2, 9))
    assert (changed[0, [1, 2, 3, 5, 6, 7]] != before[0, [1, 2, 3, 5, 6, 7]]).any(-1).all()


def test_a_given_token_is_the_limit_of_small_noise():
    """sigma -> 0 and sigma = 0 are two branches of the code and one model."""
    denoiser = trained_like()
    _, x = noisy(denoiser, MIXED)
    almost, live = torch.where(MIXED == 0, 1e-3, MIXED), MIXED > 0
    exact, near = (logits(denoiser, x, sigma, whole(2, 9))[live] for sigma in (MIXED, almost))
    torch.testing.assert_close(exact, near, rtol=1e-3, atol=1e-3)


def test_no_evidence_is_the_limit_of_large_noise():
    denoiser = trained_like("film")
    _, x = noisy(denoiser, MIXED)
    almost = torch.where(MIXED.isinf(), 1e6, MIXED)
    exact, near = (logits(denoiser, x, sigma, whole(2, 9)) for sigma in (MIXED, almost))
    torch.testing.assert_close(exact, near, rtol=1e-3, atol=1e-3)


# --- conditioning -----------------------------------------------------------------------------------------------------


def test_self_conditioning_of_zero_is_none_and_of_something_is_used():
    denoiser = trained_like()
    _, x = noisy(denoiser, MIXED)
    plain = logits(denoiser, x, MIXED, whole(2, 9))
    torch.testing.assert_close(logits(denoiser, x, MIXED, whole(2, 9), torch.zeros_like(x)), plain)
    assert (logits(denoiser, x, MIXED, whole(2, 9), torch.ones_like(x)) - plain).abs().max() > 1e-2


def test_without_conditioning_sigma_enters_through_the_evidence_alone():
    """(x, sigma) and (4 x, 2 sigma) hold the same evidence x / sigma^2: one answer. Powers of two, so to the bit."""
    plain, film = trained_like("none"), trained_like("film")
    sigma = torch.tensor([[0, 0.7, 3.0, 1.0, 0, 1.5, 20.0, 4.0, 0]])
    _, x = noisy(plain, sigma)
    scaled = x * torch.where(sigma > 0, 4.0, 1.0)[..., None]
    assert torch.equal(logits(plain, x, sigma, whole(1, 9)), logits(plain, scaled, 2 * sigma, whole(1, 9)))
    one, two = logits(film, x, sigma, whole(1, 9)), logits(film, scaled, 2 * sigma, whole(1, 9))
    assert (one != two)[sigma > 0].any(-1).all()


# --- gradients --------------------------------------------------------------------------------------------------------


@BOTH
def test_gradients_are_finite_and_reach_every_parameter(conditioning):
    denoiser, layout = trained_like(conditioning).train(), whole(2, 9)
    ids, x = noisy(denoiser, MIXED)
    found = denoiser.predict(x, MIXED, layout, torch.ones_like(x))
    nn.functional.cross_entropy(found.logits_NV, ids[MIXED > 0]).backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_against_finite_differences():
    denoiser = trained_like("film")
    ids, x = noisy(denoiser, MIXED)

    def loss():
        found = denoiser.predict(x, MIXED, whole(2, 9))
        return nn.functional.cross_entropy(found.logits_NV, ids[MIXED > 0])

    loss().backward()
    for name, parameter in denoiser.named_parameters():
        if "self_condition" in name:
            continue
        gen = torch.Generator().manual_seed(len(name))
        along = torch.randn(parameter.shape, generator=gen)
        along /= along.norm()
        if parameter.grad.norm() < 1e-3:
            continue
        along = along + parameter.grad / parameter.grad.norm()  # so that the slope is not small
        step = 2e-2 / along.norm()
        with torch.no_grad():
            parameter.add_(step * along)
            up = loss()
            parameter.add_(-2 * step * along)
            down = loss()
            parameter.add_(step * along)
        numeric, analytic = float(up - down) / (2 * float(step)), float((parameter.grad * along).sum())
        assert numeric == pytest.approx(analytic, rel=0.05, abs=1e-4), name


# --- precision --------------------------------------------------------------------------------------------------------


@BOTH
def test_a_lowered_copy_answers_as_autocast_does(conditioning):
    denoiser = trained_like(conditioning)
    sigma_BL = torch.tensor([[0.0, 0.5, 1.0, 2.0, INF, 0.0]]).expand(3, -1)
    _, x_BLE = noisy(denoiser, sigma_BL)
    low = denoiser.lowered(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (d.predict(x_BLE, sigma_BL, whole(3, 6)).logits_NV for d in (denoiser, low))
    assert one.dtype == other.dtype == torch.float32
    torch.testing.assert_close(other, one, rtol=0.05, atol=0.05)
    matrices = [m.weight for m in low.modules() if isinstance(m, nn.Linear)]
    assert {w.dtype for w in (*matrices, low.token_in)} == {torch.bfloat16}
    assert {w.dtype for w in denoiser.parameters()} == {torch.float32}

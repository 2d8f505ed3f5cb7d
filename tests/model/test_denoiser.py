import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from scorelm.config.recipe import ModelConfig
from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.model.denoiser import Denoiser, Places, in_chunks, lowered, rows, score

V, E = 50, 16
INF = math.inf
BOTH = pytest.mark.parametrize("conditioning", ["none", "film"])


def fresh(conditioning="none", seed=0, vocab=V, dim=E):
    config = ModelConfig(
        dim=32, layers=2, heads=2, hidden=64, embedding_dim=dim, noise_conditioning=conditioning
    )  # fmt: skip
    torch.manual_seed(seed)
    return Denoiser(config, vocab)


def trained_like(conditioning="none", seed=0):
    denoiser = fresh(conditioning, seed)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


def whole(rows, length, padding=0):
    """Documents of `length` with <s> first, then padding."""
    place = torch.arange(length + padding).expand(rows, -1)
    real = (place < length).long()
    block = (place > 0).long() * real
    stream = torch.where((place == 0) & (real > 0), CLEAN, NOISY)
    return Layout(real, place * real, block, stream)


def noisy(denoiser, sigma_BL, seed=1):
    gen = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(4, V, sigma_BL.shape, generator=gen)
    e_BLE = denoiser.embedding(ids_BL).detach()
    level = torch.where(sigma_BL.isinf(), 0.0, sigma_BL)
    return ids_BL, e_BLE + level[..., None] * torch.randn(e_BLE.shape, generator=gen)


MIXED = torch.tensor([[0, 0.7, 3.0, INF, 0, 1.5, 20.0, INF, 0], [0, INF, INF, 2.0, 5.0, 0.4, 0.2, 1.0, 0]])


# --- what evidence and prior give -------------------------------------------------------------------------------------


@BOTH
def test_as_built_logits_are_evidence_and_prior_exactly(conditioning):
    denoiser = fresh(conditioning)
    nn.init.normal_(denoiser.prior)
    _, x = noisy(denoiser, MIXED)
    logits = denoiser(x, MIXED, whole(2, 9))
    table = denoiser.embedding.table()
    for b in range(2):
        for i in range(9):
            sigma = float(MIXED[b, i])
            if sigma > 0:
                tau = max(sigma, math.sqrt(E) / 12) ** -2
                expected = tau * (table.double() @ x[b, i].double()) + denoiser.prior.double()
                torch.testing.assert_close(logits[b, i].double(), expected, rtol=1e-5, atol=1e-4)
    at_infinity = logits[MIXED.isinf()]
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
    torch.testing.assert_close(denoiser(x, sigma, whole(3, 6)).softmax(-1).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sigma", [0.6, 1.5, 6.0])
def test_score_is_the_gradient_of_the_log_density(sigma):
    """Gaussian mixture over the table, density written out and differentiated in float64."""
    denoiser = fresh(dim=4)
    denoiser.set_prior(torch.arange(V))
    _, x = noisy(denoiser, torch.full((2, 5), sigma))
    logits = denoiser(x, sigma, whole(2, 5))
    x0 = denoiser.estimate(logits)
    point = x.double().requires_grad_()
    log_prior = denoiser.prior.detach().double().log_softmax(0)
    table = denoiser.embedding.table().detach().double()
    normal = torch.distributions.Normal(table, torch.full_like(table, sigma))
    density = (normal.log_prob(point[:, :, None]).sum(-1) + log_prior).logsumexp(-1)
    (expected,) = torch.autograd.grad(density.sum(), point)
    found = score(x, x0, torch.full((2, 5), sigma))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_score_keeps_positions_apart_and_is_exact_in_float64():
    gen = torch.Generator().manual_seed(0)
    x, x0 = (torch.randn(2, 3, 4, dtype=torch.float64, generator=gen) for _ in range(2))
    sigma = torch.tensor([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]], dtype=torch.float64)
    found = score(x, x0, sigma)
    for b in range(2):
        for i in range(3):
            torch.testing.assert_close(found[b, i], (x0[b, i] - x[b, i]) / float(sigma[b, i]) ** 2)


def test_estimate_is_the_posterior_mean():
    denoiser = trained_like()
    logits = 3 * torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    expected = (
        logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    ) @ denoiser.embedding.table().double()
    torch.testing.assert_close(denoiser.estimate(logits).double(), expected, rtol=1e-4, atol=1e-5)
    assert (denoiser.estimate(logits).norm(dim=-1) <= math.sqrt(E)).all()  # inside the sphere


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
    expected = context_free + denoiser.context(denoiser.trunk(soft, MIXED, layout))
    live = MIXED > 0
    torch.testing.assert_close(denoiser(x, MIXED, layout, cond)[live], expected[live], rtol=1e-4, atol=1e-4)


# --- shapes of sigma --------------------------------------------------------------------------------------------------


@BOTH
def test_scalar_and_column_levels_broadcast(conditioning):
    denoiser, layout = trained_like(conditioning), whole(2, 6)
    _, x = noisy(denoiser, torch.full((2, 6), 2.0))
    full = denoiser(x, torch.full((2, 6), 2.0), layout)
    for sigma in (2.0, 2, torch.tensor(2.0), torch.full((2, 1), 2.0)):
        assert torch.equal(denoiser(x, sigma, layout), full)
    by_row = denoiser(x, torch.tensor([[2.0], [5.0]]), layout)
    assert torch.equal(by_row[0], full[0]) and not torch.equal(by_row[1], full[1])


@BOTH
@pytest.mark.parametrize("sigma", [0.0, 2.0, INF])
def test_all_given_all_noisy_and_no_evidence_at_all(conditioning, sigma):
    denoiser = trained_like(conditioning)
    _, x = noisy(denoiser, torch.full((2, 6), sigma))
    logits = denoiser(x, sigma, whole(2, 6))
    assert logits.shape == (2, 6, V) and logits.dtype == torch.float32 and torch.isfinite(logits).all()


# --- the two ends -----------------------------------------------------------------------------------------------------


@BOTH
def test_x_says_nothing_at_infinity(conditioning):
    denoiser = trained_like(conditioning)
    _, x = noisy(denoiser, MIXED)
    x2 = x.clone()
    gen = torch.Generator().manual_seed(5)
    x2[MIXED.isinf()] = 1e30 * torch.randn(int(MIXED.isinf().sum()), E, generator=gen)
    assert torch.equal(denoiser(x, MIXED, whole(2, 9)), denoiser(x2, MIXED, whole(2, 9)))


@BOTH
def test_a_given_token_is_read_through_small_errors(conditioning):
    denoiser = trained_like(conditioning)
    ids, x = noisy(denoiser, MIXED)
    given = MIXED == 0
    x2 = x.clone()
    x2[given] += 0.05 * torch.randn(int(given.sum()), E, generator=torch.Generator().manual_seed(5))
    before, after = denoiser(x, MIXED, whole(2, 9)), denoiser(x2, MIXED, whole(2, 9))
    assert torch.equal(before[~given], after[~given])
    assert torch.equal(before[given].argmax(-1), ids[given]) and torch.equal(after[given].argmax(-1), ids[given])
    x2[0, 4] = denoiser.embedding((ids[0, 4] + 1) % V).detach()  # another token, on the other hand, is seen
    changed = denoiser(x2, MIXED, whole(2, 9))
    assert (changed[0, [1, 2, 3, 5, 6, 7]] != before[0, [1, 2, 3, 5, 6, 7]]).any(-1).all()


def test_a_given_token_is_the_limit_of_small_noise():
    """sigma -> 0 and sigma = 0 are two branches of the code and one model."""
    denoiser = trained_like()
    _, x = noisy(denoiser, MIXED)
    almost = torch.where(MIXED == 0, 1e-3, MIXED)
    live = MIXED > 0
    torch.testing.assert_close(
        denoiser(x, MIXED, whole(2, 9))[live], denoiser(x, almost, whole(2, 9))[live], rtol=1e-3, atol=1e-3
    )


def test_no_evidence_is_the_limit_of_large_noise():
    denoiser = trained_like("film")
    _, x = noisy(denoiser, MIXED)
    almost = torch.where(MIXED.isinf(), 1e6, MIXED)
    torch.testing.assert_close(
        denoiser(x, MIXED, whole(2, 9)), denoiser(x, almost, whole(2, 9)), rtol=1e-3, atol=1e-3
    )  # fmt: skip


# --- forward and live -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("self_conditioned", [False, True])
def test_live_is_forward_at_live_positions(conditioning, self_conditioned):
    denoiser, layout = trained_like(conditioning), whole(2, 7, padding=2)
    _, x = noisy(denoiser, MIXED)
    cond = torch.randn(2, 9, E, generator=torch.Generator().manual_seed(3)) if self_conditioned else None
    posterior = denoiser.live(x, MIXED, layout, cond)
    expected = (MIXED > 0) & (torch.arange(9) < 7)
    assert torch.equal(posterior.live_BL, expected)
    logits = denoiser(x, MIXED, layout, cond)
    assert torch.equal(logits[expected], posterior.logits_NV)
    prior_and_evidence = fresh(conditioning)
    prior_and_evidence.load_state_dict(denoiser.state_dict())
    nn.init.zeros_(prior_and_evidence.context.weight)
    assert torch.equal(prior_and_evidence.live(x, MIXED, layout).logits_NV, posterior.context_free_NV)


def test_self_conditioning_of_zero_is_none_and_of_something_is_used():
    denoiser = trained_like()
    _, x = noisy(denoiser, MIXED)
    plain = denoiser(x, MIXED, whole(2, 9))
    torch.testing.assert_close(denoiser(x, MIXED, whole(2, 9), torch.zeros_like(x)), plain)
    assert (denoiser(x, MIXED, whole(2, 9), torch.ones_like(x)) - plain)[MIXED > 0].abs().max() > 1e-2


# --- noise conditioning -----------------------------------------------------------------------------------------------


def test_without_conditioning_sigma_enters_through_the_evidence_alone():
    """(x, sigma) and (4 x, 2 sigma) hold the same evidence x / sigma^2: one answer. Powers of two, so to the bit."""
    plain, film = trained_like("none"), trained_like("film")
    sigma = torch.tensor([[0, 0.7, 3.0, 1.0, 0, 1.5, 20.0, 4.0, 0]])
    _, x = noisy(plain, sigma)
    scale = torch.where(sigma > 0, 4.0, 1.0)[..., None]
    assert torch.equal(plain(x, sigma, whole(1, 9)), plain(x * scale, 2 * sigma, whole(1, 9)))
    one, two = film(x, sigma, whole(1, 9)), film(x * scale, 2 * sigma, whole(1, 9))
    assert (one != two)[sigma > 0].any(-1).all()


def test_film_is_per_position():
    """A position's own level moves its own modulation: with attention cut off, no other position's logits change."""
    denoiser = trained_like("film")
    for block in denoiser.trunk.blocks:
        nn.init.zeros_(block.attention.out.weight)
    sigma = torch.tensor([[1.0, 2.0, 3.0, INF, 5.0]])
    other = torch.tensor([[1.0, 2.0, 9.0, INF, 5.0]])
    _, x = noisy(denoiser, sigma)
    x2 = x.clone()
    x2[0, 2] *= 9.0  # the same evidence
    one, two = denoiser(x, sigma, whole(1, 5))[0], denoiser(x2, other, whole(1, 5))[0]
    assert torch.equal(one[[0, 1, 3, 4]], two[[0, 1, 3, 4]])
    assert (one[2] - two[2]).abs().max() > 1e-4


def test_film_features_are_exact_at_both_ends():
    film = trained_like("film").trunk.film
    ends = film(torch.tensor([[0.0, INF]]))
    assert torch.isfinite(ends).all()
    k = torch.arange(film.FEATURES)
    expected = torch.stack([(-1.0) ** k, torch.ones(film.FEATURES)])  # cos(pi k), cos 0
    torch.testing.assert_close(ends[0], film.project(expected), rtol=1e-4, atol=1e-5)
    near = film(torch.tensor([[1e-6, 1e7]]))
    torch.testing.assert_close(near, ends, rtol=1e-3, atol=1e-3)


# --- gradients --------------------------------------------------------------------------------------------------------


@BOTH
def test_gradients_are_finite_and_reach_every_parameter(conditioning):
    denoiser, layout = trained_like(conditioning).train(), whole(2, 9)
    ids, x = noisy(denoiser, MIXED)
    logits = denoiser(x, MIXED, layout, torch.ones_like(x))
    nn.functional.cross_entropy(logits[MIXED > 0], ids[MIXED > 0]).backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_against_finite_differences():
    denoiser = trained_like("film")
    ids, x = noisy(denoiser, MIXED)

    def loss():
        logits = denoiser(x, MIXED, whole(2, 9))
        return nn.functional.cross_entropy(logits[MIXED > 0], ids[MIXED > 0])

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


@BOTH
def test_a_lowered_copy_answers_as_autocast_does(conditioning):
    denoiser = trained_like(conditioning)
    sigma_BL = torch.tensor([[0.0, 0.5, 1.0, 2.0, INF, 0.0]]).expand(3, -1)
    _, x_BLE = noisy(denoiser, sigma_BL)
    low = lowered(denoiser, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (d(x_BLE, sigma_BL, whole(3, 6)) for d in (denoiser, low))
    assert one.dtype == other.dtype == torch.float32
    torch.testing.assert_close(other, one, rtol=0.05, atol=0.05)
    matrices = [m.weight for m in low.modules() if isinstance(m, nn.Linear)]
    assert {w.dtype for w in (*matrices, low.token_in)} == {torch.bfloat16}
    assert {w.dtype for w in denoiser.parameters()} == {torch.float32}


def test_rows_of_a_matrix_and_their_gradient():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64, generator=gen).requires_grad_()
    place = torch.tensor([4, 0, 5])
    assert torch.equal(rows(x, place), x[place])
    assert torch.autograd.gradcheck(lambda t: rows(t, place), x)


def test_places_of_each_kind_and_the_order_that_puts_them_together():
    sigma = torch.tensor([[2.0, 0.0, INF], [INF, 1.0, INF]])
    layout = replace(whole(2, 3), segment_BL=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    places = Places.of(sigma, layout)
    assert [t.tolist() for t in places[:4]] == [[0, 4], [2, 3], [1, 5], [0, 2, 3, 4]]
    assert torch.cat(places[:3])[places.order_P].tolist() == list(range(6))


def test_chunks_are_the_whole_and_so_are_their_gradients(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    x, other = (torch.randn(11, 4, dtype=torch.float64, generator=gen).requires_grad_() for _ in range(2))
    weight = torch.randn(4, 6, dtype=torch.float64, generator=gen).requires_grad_()
    sizes = []

    def function(x_NE, other_NE):
        sizes.append(len(x_NE))
        return (x_NE @ weight).softmax(-1) * other_NE.sum(-1, keepdim=True)

    def value_and_gradients():
        value = in_chunks(function, 6, x, other)
        return value, *torch.autograd.grad(value.pow(2).sum(), (x, other, weight))

    expected = value_and_gradients()
    assert sizes == [11]
    monkeypatch.setattr("scorelm.model.denoiser.CHUNK", 4 * 6 + 5)
    found = value_and_gradients()
    assert sizes[1:4] == [4, 4, 3] and sorted(sizes[4:]) == [3, 4, 4]  # once more for the gradient
    for one, other_one in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other_one, rtol=1e-12, atol=1e-12)

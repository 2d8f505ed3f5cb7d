"""Noise draws, the cross-entropy and the optional terms, each against a closed form or an independent computation."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from scorelm.config.recipe import Mixture, ModelConfig, NoiseConfig, TrainingConfig
from scorelm.model.attention import CLEAN, NOISY, block_mask
from scorelm.model.denoiser import Denoiser, Places
from scorelm.noise.schedule import Gumbel, make_schedule
from scorelm.text.sentencepiece import BOS, EOS, PAD
from scorelm.training.draws import sent
from scorelm.objectives.score import Batch, add_noise, draw_noise, likelihood_term, score_loss, z_term
from scorelm.training.objective import OBJECTIVES

V, E = 50, 16
INF = math.inf
SCHEDULE = make_schedule("adaptive", E, V)
PLAIN = TrainingConfig()
NO_KIND = dict.fromkeys(Mixture.model_fields, 0.0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh(seed=0):
    torch.manual_seed(seed)
    return Denoiser(ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=E), V)


def trained_like(seed=0):
    denoiser = fresh(seed)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser


def pack(rows, seed=0, width=24):
    """Random documents <s> ... </s>, packed; every fifth is a window without its <s>, every seventh without </s>."""
    gen = rng(seed)
    ids, segment, position = (torch.full((rows, width), fill) for fill in (PAD, 0, 0))
    count = 0
    for row in range(rows):
        at, number = 0, 1
        while True:
            length = int(torch.randint(3, 11, (), generator=gen))
            if at + length > width:
                break
            tokens = torch.randint(4, V, (length,), generator=gen)
            tokens[0], tokens[-1] = BOS, EOS
            if count % 5 == 4:
                tokens[0] = 7
            if count % 7 == 6:
                tokens[-1] = 8
            ids[row, at : at + length], segment[row, at : at + length] = tokens, number
            position[row, at : at + length] = torch.arange(length)
            at, number, count = at + length, number + 1, count + 1
    return Batch(ids, segment, position)


def noise(**values):
    return NoiseConfig(**values)


# --- draw_noise -------------------------------------------------------------------------------------------------------


def halves(draw):
    length = draw.sigma_BS.shape[1] // 2
    return (draw.sigma_BS[:, :length], draw.sigma_BS[:, length:]), length


def test_two_streams_are_a_clean_and_a_noisy_copy():
    batch = pack(8)
    draw = draw_noise(batch, noise(streams=2), SCHEDULE, rng())
    (clean, noisy), length = halves(draw)
    assert length == batch.ids.shape[1]
    assert (clean == 0).all() and (noisy > 0).any()
    for half in (slice(None, length), slice(length, None)):
        assert torch.equal(draw.ids_BS[:, half], batch.ids)
        assert torch.equal(draw.layout.segment_BL[:, half], batch.segment)
        assert torch.equal(draw.layout.position_BL[:, half], batch.position)
    assert torch.equal(draw.layout.block_BL[:, :length], draw.layout.block_BL[:, length:])
    assert (draw.layout.stream_BL[:, :length] == CLEAN).all() and (draw.layout.stream_BL[:, length:] == NOISY).all()


def test_one_stream_is_whole_documents_with_a_clean_start():
    batch = pack(8)
    draw = draw_noise(batch, noise(streams=1), SCHEDULE, rng())
    starts = batch.ids == BOS
    assert draw.sigma_BS.shape == batch.ids.shape
    assert torch.equal(draw.layout.block_BL, torch.where(starts, 0, 1))
    assert torch.equal(draw.layout.stream_BL[batch.segment > 0] == CLEAN, starts[batch.segment > 0])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_live_positions(streams, seed):
    batch = pack(16, seed)
    draw = draw_noise(batch, noise(streams=streams), SCHEDULE, rng(seed))
    live = 0
    for sigma_row, segment_row in zip(draw.sigma_BS.tolist(), draw.layout.segment_BL.tolist(), strict=True):
        live += sum(sigma > 0 and segment > 0 for sigma, segment in zip(sigma_row, segment_row, strict=True))
    assert draw.live == live > 0
    assert (draw.sigma_BS >= 0).all() and not draw.sigma_BS.isnan().any()
    assert (draw.sigma_BS[draw.ids_BS == BOS] == 0).all()  # <s> is always given


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_of_each_size_against_a_loop(size):
    batch = pack(8)
    draw = draw_noise(batch, noise(block_sizes=(size,), mixture=Mixture(**NO_KIND | {"shared": 1.0})), SCHEDULE, rng())
    (_, sigma), length = halves(draw)
    block = draw.layout.block_BL[:, length:]
    for row in range(len(batch.ids)):
        for number in range(1, int(batch.segment[row].max()) + 1):
            where = (batch.segment[row] == number).nonzero().flatten().tolist()
            first = int(batch.ids[row, where[0]] == BOS)
            expected = [0] * first + [1 + k // size for k in range(len(where) - first)]
            assert block[row, where].tolist() == expected
            for one in set(expected) - {0}:
                levels = {float(sigma[row, w]) for w, b in zip(where, expected, strict=True) if b == one}
                assert len(levels) == 1 and levels != {0.0}  # one level, nothing given: spans are for whole documents


def test_sizes_are_drawn_per_document():
    draw = draw_noise(pack(300), noise(block_sizes=(1, 1, 1, 0)), SCHEDULE, rng())
    _, length = halves(draw)
    segment, block = draw.layout.segment_BL[:, length:], draw.layout.block_BL[:, length:]
    most = torch.stack([torch.where(segment == k, block, 0).amax(1) for k in (1, 2)], 1).flatten()
    whole = (most[most > 0] <= 1).double().mean()
    assert abs(float(whole) - 0.25) < 0.06


@pytest.mark.parametrize("streams", [1, 2])
def test_the_end_is_given_in_half_of_the_whole_documents(streams):
    kinds = Mixture(**NO_KIND | {"shared": 1.0})
    batch = pack(1500)
    draw = draw_noise(batch, noise(streams=streams, block_sizes=(0,), given=0.0, mixture=kinds), SCHEDULE, rng())
    sigma = draw.sigma_BS[:, -batch.ids.shape[1] :]
    ends = batch.ids == EOS
    share = (sigma[ends] == 0).double().mean()
    assert abs(float(share) - 0.5) < 5 * 0.5 / math.sqrt(int(ends.sum()))
    others = (batch.segment > 0) & ~ends & (batch.ids != BOS)
    assert (sigma[others] > 0).all()


def test_the_end_is_not_given_in_blocks():
    kinds = Mixture(**NO_KIND | {"shared": 1.0})
    batch = pack(200)
    draw = draw_noise(batch, noise(block_sizes=(1, 2, 8), given=1.0, mixture=kinds), SCHEDULE, rng())
    (_, sigma), _ = halves(draw)
    real = (batch.segment > 0) & (batch.ids != BOS)
    assert (sigma[real] > 0).all()


@pytest.mark.parametrize("given", [0.0, 0.4, 1.0])
def test_spans_are_given_in_a_share_of_the_whole_documents(given):
    kinds = Mixture(**NO_KIND | {"shared": 1.0})
    batch = pack(800)
    draw = draw_noise(batch, noise(streams=1, given=given, mixture=kinds), SCHEDULE, rng())
    inner = (batch.segment > 0) & (batch.ids != BOS) & (batch.ids != EOS)
    clean = (draw.sigma_BS == 0) & inner

    def chance(k, n):
        """That position k of n is given: half of the spans are shuffled, the others of uniform length, then place."""
        covering = [min(k, n - size) - max(0, k - size + 1) + 1 for size in range(n + 1)]
        return 0.25 + 0.5 * sum(c / (n - size + 1) for size, c in enumerate(covering) if size) / (n + 1)

    found, expected = float(clean.sum()), 0.0
    for row in range(len(batch.ids)):
        for number in range(1, int(batch.segment[row].max()) + 1):
            where = (batch.segment[row] == number).nonzero().flatten().tolist()
            expected += given * sum(chance(k, len(where)) for k, column in enumerate(where) if inner[row, column])
    assert found == pytest.approx(expected, rel=0.1, abs=1e-9)


def test_same_generator_same_draw():
    batch = pack(6)
    one, two, other = (draw_noise(batch, noise(), SCHEDULE, rng(seed)) for seed in (4, 4, 5))
    assert torch.equal(one.sigma_BS, two.sigma_BS) and torch.equal(one.layout.block_BL, two.layout.block_BL)
    assert not torch.equal(one.sigma_BS, other.sigma_BS)


def test_an_empty_batch_has_nothing_live():
    empty = Batch(torch.full((2, 6), PAD), torch.zeros(2, 6).long(), torch.zeros(2, 6).long())
    draw = draw_noise(empty, noise(), SCHEDULE, rng())
    assert draw.live == 0
    denoiser = trained_like()
    outcome = score_loss(
        denoiser,
        draw.with_noise(E, rng()),
        live=0,
        config=TrainingConfig(z_loss=1.0, likelihood_weight=1.0),
        schedule=SCHEDULE,
    )
    outcome.loss.backward()
    assert outcome.loss.item() == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in denoiser.parameters())


# --- add_noise --------------------------------------------------------------------------------------------------------


def test_add_noise_is_the_forward_process():
    e = torch.randn(400, 50, E, generator=rng(1))
    sigma = torch.tensor([0.0, 0.5, 3.0, 40.0, INF]).repeat(10).expand(400, 50)
    x = add_noise(e, sigma, torch.randn(e.shape, generator=rng(2)))
    assert torch.equal(x[sigma == 0], e[sigma == 0])
    assert (x[sigma.isinf()] == 0).all()
    for level in (0.5, 3.0, 40.0):
        eps = ((x - e)[sigma == level] / level).double().flatten()
        assert abs(float(eps.mean())) < 5 / math.sqrt(len(eps)) and float(eps.std()) == pytest.approx(1, abs=0.02)


# --- the loss ---------------------------------------------------------------------------------------------------------


def manual(denoiser, draw, seed, self_cond=None):
    """(x, logits, mask, targets): the forward process and the denoiser's contract, without score_loss."""
    e = denoiser.embedding(draw.ids_BS)
    x = add_noise(e, draw.sigma_BS, torch.randn(e.shape, generator=rng(seed)))
    logits = denoiser(x, draw.sigma_BS, draw.layout, self_cond)
    live = (draw.sigma_BS > 0) & (draw.layout.segment_BL > 0)
    return x, logits, live, draw.ids_BS[live]


@pytest.mark.parametrize("streams", [1, 2])
def test_cross_entropy_is_that_of_forward(streams):
    denoiser = trained_like()
    draw = draw_noise(pack(6), noise(streams=streams), SCHEDULE, rng(1))
    outcome = score_loss(denoiser, draw.with_noise(E, rng(2)), live=draw.live, schedule=SCHEDULE, config=PLAIN)
    _, logits, live, targets = manual(denoiser, draw, 2)
    log_p = logits[live].double() - logits[live].double().exp().sum(-1, keepdim=True).log()
    expected = -log_p[torch.arange(len(targets)), targets]
    torch.testing.assert_close(outcome.cross_entropy_N.double(), expected, rtol=1e-4, atol=1e-4)
    assert outcome.loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert torch.equal(outcome.sigma_N, draw.sigma_BS[live]) and torch.equal(outcome.shared_N, draw.shared_BS[live])
    assert torch.equal(outcome.correct_N, log_p.argmax(-1) == targets)
    assert not outcome.cross_entropy_N.requires_grad and outcome.loss.requires_grad


def test_the_target_of_a_noisy_position_does_not_leak():
    """At sigma inf x is 0 and the clean copy out of sight: another token there changes only its own loss."""
    denoiser = trained_like()
    kinds = Mixture(**NO_KIND | {"ordered": 1.0})
    batch = pack(4)
    draw = draw_noise(batch, noise(mixture=kinds, block_sizes=(1,)), SCHEDULE, rng(1))
    before = score_loss(denoiser, draw.with_noise(E, rng(2)), live=1, schedule=SCHEDULE, config=PLAIN).cross_entropy_N
    live = ((draw.sigma_BS > 0) & (draw.layout.segment_BL > 0)).nonzero()
    row, column = live[3].tolist()
    length = batch.ids.shape[1]
    ids = draw.ids_BS.clone()
    ids[row, column] = ids[row, column - length] = (ids[row, column] + 1 - 4) % (V - 4) + 4
    after = score_loss(
        denoiser, draw._replace(ids_BS=ids).with_noise(E, rng(2)), live=1, schedule=SCHEDULE, config=PLAIN
    ).cross_entropy_N
    same = draw.layout.segment_BL[row] == draw.layout.segment_BL[row, column]
    for k, (r, c) in enumerate(live.tolist()):
        later = r == row and same[c] and draw.layout.block_BL[r, c] > draw.layout.block_BL[row, column]
        if (r, c) == (row, column) or later:
            assert before[k] != after[k]
        else:
            assert before[k] == after[k]


def test_self_conditioning_feeds_the_first_estimate_back_without_gradient():
    denoiser = trained_like()
    draw = draw_noise(pack(4), noise(), SCHEDULE, rng(1))
    outcome = score_loss(
        denoiser, draw.with_noise(E, rng(2)), live=draw.live, schedule=SCHEDULE, config=PLAIN, self_conditioned=True
    )
    with torch.no_grad():
        _, logits, live, _ = manual(denoiser, draw, 2)
        x0 = logits.double().softmax(-1) @ denoiser.embedding.table().double()
    cond = torch.where(live[..., None], x0.float(), 0.0)
    _, second, _, targets = manual(denoiser, draw, 2, cond)
    expected = nn.functional.cross_entropy(second[live], targets)
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outcome.loss.item() != pytest.approx(
        score_loss(denoiser, draw.with_noise(E, rng(2)), live=draw.live, schedule=SCHEDULE, config=PLAIN).loss.item(),
        rel=1e-5,
    )
    outcome.loss.backward()
    found = {name: p.grad.clone() for name, p in denoiser.named_parameters()}
    denoiser.zero_grad()
    expected.backward()
    for name, parameter in denoiser.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def gradients(denoiser, draw, **how):
    denoiser.zero_grad()
    outcome = score_loss(denoiser, draw, live=draw.live, schedule=SCHEDULE, **{"config": PLAIN} | how)
    outcome.loss.backward()
    return outcome, [p.grad.clone() for p in denoiser.parameters()]


def assert_same(found, expected):
    """The loss and every gradient."""
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=0)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("streams", [1, 2])
def test_the_loss_in_chunks_of_the_vocabulary_is_the_loss(streams, monkeypatch):
    denoiser, config = trained_like(), TrainingConfig(z_loss=0.1, likelihood_weight=0.1)
    draw = draw_noise(pack(6), noise(streams=streams), SCHEDULE, rng(1)).with_noise(E, rng(2))
    expected = gradients(denoiser, draw, config=config, self_conditioned=True)
    monkeypatch.setattr("scorelm.model.denoiser.CHUNK", 10 * V)
    assert_same(gradients(denoiser, draw, config=config, self_conditioned=True), expected)


@pytest.mark.parametrize("streams", [1, 2])
def test_narrower_rows_hold_the_same_documents(streams):
    """Rows of 512 whose longest document takes 64 become rows of 64, or of 128 with two streams, with the same loss."""
    denoiser, batch = trained_like(), pack(3, width=512)
    draw = draw_noise(batch, noise(streams=streams), SCHEDULE, rng(1)).with_noise(E, rng(2))
    found = sent(draw, torch.device("cpu"))
    assert found.ids_BS.shape[1] == 64 and found.live == draw.live
    assert found.noisy == draw.noisy == len(found.places.noisy_U) and found.live == len(found.places.live_N)
    padding = found.layout.segment_BL == 0
    assert int((~padding).sum()) == int((draw.layout.segment_BL > 0).sum()) and padding.float().mean() < 0.2
    assert_same(gradients(denoiser, found, self_conditioned=True), gradients(denoiser, draw, self_conditioned=True))


@pytest.mark.parametrize("name", ["autoregressive", "masked"])
def test_the_peers_learn_the_same_in_narrower_rows(name):
    denoiser, objective = trained_like(), OBJECTIVES[name]
    draw = objective.draw(pack(3, width=512), noise(), SCHEDULE, rng(1)).with_noise(E, rng(2))
    found = sent(draw, torch.device("cpu"))
    assert found.ids_BS.shape[1] == 64
    losses = [objective.loss(denoiser, d, SCHEDULE, PLAIN, live=draw.live).loss.item() for d in (found, draw)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_stay_where_a_document_takes_more_than_half():
    draw = draw_noise(pack(4, width=24), noise(streams=1), SCHEDULE, rng(1)).with_noise(E, rng(2))
    assert torch.equal(sent(draw, torch.device("cpu")).ids_BS, draw.ids_BS)


@pytest.mark.parametrize("self_conditioned", [False, True])
def test_nothing_in_a_step_waits_for_the_device(self_conditioned):
    """On fake tensors, which have no values, reading one is an error: so no host waits for a GPU here."""
    with FakeTensorMode() as mode:
        denoiser = trained_like()
    draw = sent(draw_noise(pack(4), noise(), SCHEDULE, rng(1)).with_noise(E, rng(2)), torch.device("cpu"))
    places = Places(*map(mode.from_tensor, draw.places))
    draw = draw.map(mode.from_tensor)
    with mode:
        block_mask(draw.layout)
        outcome = score_loss(
            denoiser, draw._replace(places=places), SCHEDULE, PLAIN, live=100, self_conditioned=self_conditioned
        )
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        with pytest.raises(DynamicOutputShapeException):  # what the places are found before for
            score_loss(denoiser, draw, SCHEDULE, PLAIN, live=100)
    assert all(p.grad is not None for p in denoiser.parameters())


def test_terms_are_added_with_their_weights():
    denoiser = trained_like()
    draw = draw_noise(pack(4), noise(), SCHEDULE, rng(1))

    def loss(**weights):
        config = TrainingConfig(**weights)
        return score_loss(denoiser, draw.with_noise(E, rng(2)), live=draw.live, schedule=SCHEDULE, config=config)

    _, logits, live, _ = manual(denoiser, draw, 2)
    e, sigma = denoiser.embedding(draw.ids_BS)[live].double(), draw.sigma_BS[live].double()
    x0 = logits[live].double().softmax(-1) @ denoiser.embedding.table().double()
    u = SCHEDULE.u(sigma.clamp(max=SCHEDULE.sigma_max))
    h = 1e-6
    inner = u.clamp(h, 1 - h)
    slope = (SCHEDULE.sigma(inner + h) - SCHEDULE.sigma(inner - h)) / (2 * h)
    likelihood = torch.where(sigma.isinf(), 0.0, slope / sigma**3 * (e - x0).pow(2).sum(-1)).sum().detach() / draw.live
    plain = float(loss().loss.detach())
    assert float(likelihood) > 1e-3
    assert float(loss(likelihood_weight=0.5).loss.detach()) == pytest.approx(plain + 0.5 * float(likelihood), rel=1e-3)
    posterior = denoiser.live(manual(denoiser, draw, 2)[0], draw.sigma_BS, draw.layout)
    z = (posterior.logits_NV.logsumexp(-1) - posterior.context_free_NV.logsumexp(-1)).pow(2).sum().detach() / draw.live
    assert float(z) > 1e-3
    assert float(loss(z_loss=2.0).loss.detach()) == pytest.approx(plain + 2 * float(z), rel=1e-4)
    assert torch.equal(loss(z_loss=2.0, likelihood_weight=1.0).cross_entropy_N, loss().cross_entropy_N)


def test_accumulated_halves_are_one_batch():
    """Each half divided by the live positions of both: the gradient is that of the whole, whatever the shares."""
    denoiser = trained_like()
    draw = draw_noise(pack(6), noise(), SCHEDULE, rng(1))

    whole = draw.with_noise(E, rng(2))
    parts = [whole.map(lambda t: t[rows]) for rows in (slice(0, 2), slice(2, 6))]  # noqa: B023
    assert parts[0].live + parts[1].live == whole.live and parts[0].live != parts[1].live
    loss = score_loss(denoiser, whole, live=whole.live, schedule=SCHEDULE, config=PLAIN).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad()
    total = 0.0
    for part in parts:
        half = score_loss(denoiser, part, live=whole.live, schedule=SCHEDULE, config=PLAIN).loss
        half.backward()
        total += float(half.detach())
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(denoiser.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)


def test_gradients_are_finite_on_the_whole_mixture():
    denoiser = trained_like()
    kinds = Mixture(**dict.fromkeys(Mixture.model_fields, 1.0))
    draw = draw_noise(pack(24), noise(mixture=kinds), SCHEDULE, rng(1))
    config = TrainingConfig(likelihood_weight=1.0, z_loss=1.0)
    outcome = score_loss(
        denoiser, draw.with_noise(E, rng(2)), live=draw.live, schedule=SCHEDULE, config=config, self_conditioned=True
    )
    outcome.loss.backward()
    for name, parameter in denoiser.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_the_likelihood_term_is_finite_on_a_range_of_ones_own():
    """noise.sigma_min = 0.05 with the adaptive schedule: ramps reach u = 0, where the fitted curve underflows."""
    denoiser = trained_like()
    schedule = make_schedule("adaptive", E, V, sigma_min=0.02)
    kinds = Mixture(**NO_KIND | {"ramp": 1.0})
    draw = draw_noise(pack(24), noise(mixture=kinds), schedule, rng(1))
    config = TrainingConfig(likelihood_weight=1.0)
    outcome = score_loss(denoiser, draw.with_noise(E, rng(2)), live=draw.live, schedule=schedule, config=config)
    assert torch.isfinite(outcome.loss)


# --- the likelihood term ----------------------------------------------------------------------------------------------

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


# --- the z term -------------------------------------------------------------------------------------------------------


def test_z_term_is_zero_at_the_start_and_for_any_normalised_update():
    denoiser = fresh()
    draw = draw_noise(pack(4), noise(), SCHEDULE, rng(1))
    posterior = denoiser.live(manual(denoiser, draw, 2)[0], draw.sigma_BS, draw.layout)
    assert (z_term(posterior.logits_NV, posterior.context_free_NV) == 0).all()
    free = 3 * torch.randn(5, V, generator=rng(3), dtype=torch.float64)
    context = torch.randn(5, V, generator=rng(4), dtype=torch.float64)
    mean = (free.softmax(-1) * context.exp()).sum(-1).log()  # log of the update's partition function
    torch.testing.assert_close(z_term(free + context, free), mean**2)
    torch.testing.assert_close(z_term(free + context - mean[:, None], free), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(z_term(free + 3.0, free), torch.full((5,), 9.0, dtype=torch.float64))

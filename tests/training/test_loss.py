"""The cross-entropy and the optional terms, each against a closed form or an independent computation."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from scorelm.config.recipe import NoiseConfig, TrainingConfig
from scorelm.model.attention import block_mask
from scorelm.model.layout import Layout
from scorelm.noise.schedule import make_schedule
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch
from scorelm.training.step import find_places

from ..conftest import SPECIAL
from .batches import BOS, E, V, draw_noise, gradients, loss_of, noisy_draw, only, pack, predicted, rng, trained_like

INF = math.inf
STREAMS = pytest.mark.parametrize("streams", [1, 2])


def assert_same(found, expected):
    """The loss and every gradient."""
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=0)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


# --- cross-entropy ----------------------------------------------------------------------------------------------------


@STREAMS
def test_cross_entropy_is_that_of_the_prediction(streams):
    denoiser, draw = trained_like(), noisy_draw(pack(6), streams=streams)
    outcome = loss_of(denoiser, draw)
    seen, targets = predicted(denoiser, draw)
    log_p = seen.logits_NV.double() - seen.logits_NV.double().exp().sum(-1, keepdim=True).log()
    expected = -log_p[torch.arange(len(targets)), targets]
    torch.testing.assert_close(outcome.cross_entropy_N.double(), expected, rtol=1e-4, atol=1e-4)
    assert outcome.loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert torch.equal(outcome.sigma_N, draw.level_BS[draw.open_BS])
    assert torch.equal(outcome.shared_N, draw.shared_BS[draw.open_BS])
    assert torch.equal(outcome.correct_N, log_p.argmax(-1) == targets)
    assert not outcome.cross_entropy_N.requires_grad and outcome.loss.requires_grad


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 0)])
def test_a_clean_token_tells_the_one_that_comes_next_and_a_hidden_one_itself(sizes):
    """Document by document, from the clean tokens up to there and the prior, with nothing else in sight."""
    denoiser, batch = trained_like().requires_grad_(False), pack(4)
    draw = noisy_draw(batch, block_sizes=sizes, hidden=0.6)
    outcome, length, hidden, expected = loss_of(denoiser, draw, live=1), batch.ids.shape[1], 0, []
    found_BS = torch.zeros(draw.open_BS.shape).masked_scatter(draw.open_BS, outcome.cross_entropy_N)
    found = []
    for row in range(len(batch.ids)):
        for number in range(1, int(batch.segment[row].max()) + 1):
            at = (batch.segment[row] == number).nonzero().flatten()
            ids, block, blank = batch.ids[row, at], draw.layout.block_BL[row, at], draw.sigma_BS[row, at] > 0
            if 0 in sizes and block[-1] <= 2:  # whole, so that both copies are noisy
                continue
            soft_LD = denoiser.token_in[ids]
            soft_LD[blank] = denoiser.prior.softmax(0) @ denoiser.token_in
            for last in range(len(ids)):
                if last == len(ids) - 1 and not blank[last]:
                    continue
                layout = Layout.causal(torch.ones(1, last + 1).long(), torch.arange(last + 1)[None])
                h_D = denoiser.trunk(soft_LD[None, : last + 1], torch.zeros(1, last + 1), layout)[0, -1]
                logits_V = denoiser.context(h_D) + denoiser.prior
                expected.append(-float(logits_V.log_softmax(-1)[ids[last if blank[last] else last + 1]]))
                found.append(float(found_BS[row, at[last]]))
                hidden += int(blank[last])
    assert len(expected) > 15 and hidden > 1 and not draw.asks_next_BS[:, length:].any()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert outcome.loss.item() == pytest.approx(float(outcome.cross_entropy_N.sum()), rel=1e-5)


def test_the_cross_entropy_of_a_masked_model_is_weighted():
    denoiser, draw = trained_like(), noisy_draw(pack(6), objective="masked")
    outcome = loss_of(denoiser, draw, objective="masked")
    seen, targets = predicted(denoiser, draw)
    nats = nn.functional.cross_entropy(seen.logits_NV, targets, reduction="none")
    expected = (nats * draw.weight_BS[draw.open_BS]).sum() / draw.live
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_autoregressive_model_reads_what_stands_before():
    """Document by document, token by token, with only the tokens before in sight."""
    denoiser, draw = trained_like(), noisy_draw(pack(3), objective="autoregressive")
    outcome, expected = loss_of(denoiser, draw, objective="autoregressive"), []
    for row in range(3):
        for number in range(1, int(draw.layout.segment_BL[row].max()) + 1):
            ids = draw.ids_BS[row, draw.layout.segment_BL[row] == number]
            before, place = torch.cat([torch.tensor([BOS]), ids[:-1]]), torch.arange(len(ids))
            for end in range(1, len(ids) + 1):
                if ids[end - 1] == BOS:
                    continue
                layout = type(draw.layout).causal(torch.ones(1, end).long(), place[None, :end])
                seen = denoiser.predict_next(before[None, :end], layout, place[None, :end] == end - 1)
                expected.append(-float(seen.logits_NV.detach().log_softmax(-1)[0, ids[end - 1]]))
    assert outcome.cross_entropy_N.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert outcome.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_the_target_of_a_noisy_position_does_not_leak():
    """At sigma inf x is 0 and the clean copy out of sight: another token there changes its own loss and later ones."""
    denoiser, batch = trained_like(), pack(4)
    draw = noisy_draw(batch, mixture=only("ordered"), block_sizes=(1,), hidden=0.5)
    before = loss_of(denoiser, draw, live=1).cross_entropy_N
    live = draw.open_BS.nonzero()
    length = batch.ids.shape[1]
    row, column = (draw.open_BS[:, length:] & (draw.sigma_BS[:, :length] == 0)).nonzero()[3].tolist()
    column += length
    ids = draw.ids_BS.clone()
    ids[row, column] = ids[row, column - length] = (ids[row, column] + 1 - 4) % (V - 4) + 4
    after = loss_of(denoiser, draw._replace(ids_BS=ids), live=1).cross_entropy_N
    same = draw.layout.segment_BL[row] == draw.layout.segment_BL[row, column]
    for k, (r, c) in enumerate(live.tolist()):
        told = c + int(draw.asks_next_BS[r, c])
        itself = r == row and (told - column) % length == 0
        later = r == row and same[told] and draw.layout.position_BL[r, told] > draw.layout.position_BL[row, column]
        assert bool(before[k] != after[k]) == (itself or bool(later))


def test_self_conditioning_feeds_the_first_estimate_back_without_gradient():
    denoiser, draw = trained_like(), noisy_draw(pack(4))
    outcome, found = gradients(denoiser, draw, self_conditioned=True)
    with torch.no_grad():
        seen, _ = predicted(denoiser, draw)
        x0 = seen.logits_NV.double().softmax(-1) @ denoiser.embedding.table().double()
        x0[draw.asks_next_BS[draw.open_BS]] = 0  # of a token that stands elsewhere
    denoiser.zero_grad()
    second, targets = predicted(denoiser, draw, seen.spread(x0.float()))
    expected = nn.functional.cross_entropy(second.logits_NV, targets)
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outcome.loss.item() != pytest.approx(loss_of(denoiser, draw).loss.item(), rel=1e-5)
    expected.backward()
    for gradient, parameter in zip(found, denoiser.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["masked", "autoregressive"])
def test_a_peer_feeds_nothing_back(objective):
    assert not OBJECTIVES[objective].self_conditions and OBJECTIVES["score"].self_conditions


# --- the same loss in other ways --------------------------------------------------------------------------------------


@STREAMS
def test_the_loss_in_chunks_of_the_vocabulary_is_the_loss(streams, monkeypatch):
    denoiser, config = trained_like(), TrainingConfig(z_loss=0.1, likelihood_weight=0.1)
    draw = noisy_draw(pack(6), streams=streams)
    expected = gradients(denoiser, draw, config, self_conditioned=True)
    monkeypatch.setattr("scorelm.model.prediction.CHUNK", 10 * V)
    assert_same(gradients(denoiser, draw, config, self_conditioned=True), expected)


@pytest.mark.parametrize("film", ["none", "film"])
@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "in chunks"])
@pytest.mark.parametrize("self_conditioned", [False, True])
@pytest.mark.parametrize(("objective", "streams"), [("score", 1), ("score", 2), ("masked", 1), ("autoregressive", 1)])
def test_fixed_places_give_the_loss_and_gradients_of_exact_ones(
    objective, streams, self_conditioned, chunks, film, monkeypatch
):
    """Where every position is computed, those that are not open have no say in anything."""
    if chunks:
        monkeypatch.setattr("scorelm.model.prediction.CHUNK", 10 * V)
    denoiser = trained_like(noise_conditioning=film)
    config = TrainingConfig(z_loss=0.1, likelihood_weight=0.1)
    draw = noisy_draw(pack(6), objective=objective, streams=streams, hidden=0.4)
    how = {"config": config, "objective": objective, "self_conditioned": self_conditioned}
    exact, expected = gradients(denoiser, find_places(draw, fixed=False), **how)
    fixed, found = gradients(denoiser, find_places(draw, fixed=True), **how)
    torch.testing.assert_close(fixed.loss, exact.loss, rtol=1e-6, atol=1e-7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    assert len(fixed.sigma_N) == streams * 6 * 24 and len(exact.sigma_N) == draw.live
    for one, other in zip(fixed[2:], exact[2:], strict=True):
        torch.testing.assert_close(one[fixed.open_N], other[exact.open_N], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulated_halves_are_one_batch(objective):
    """Each half divided by the open positions of both: the gradient is that of the whole, whatever the shares."""
    denoiser, whole = trained_like(), noisy_draw(pack(6), objective=objective)
    parts = [whole.take(rows) for rows in (slice(0, 2), slice(2, 6))]
    assert parts[0].live + parts[1].live == whole.live and parts[0].live != parts[1].live
    outcome, expected = gradients(denoiser, whole, objective=objective)
    denoiser.zero_grad()
    total = 0.0
    for part in parts:
        half = loss_of(denoiser, part, objective=objective, live=whole.live).loss
        half.backward()
        total += float(half.detach())
    assert total == pytest.approx(float(outcome.loss.detach()), rel=1e-5)
    found = [p.grad for p in denoiser.parameters() if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_in_a_step_waits_for_the_device(objective):
    """On fake tensors, which have no values, reading one is an error: so no host waits for a GPU here."""
    learned, schedule = OBJECTIVES[objective], make_schedule("log", E, V)
    with FakeTensorMode() as mode:
        denoiser = trained_like()
    batch = Batch(*map(mode.from_tensor, pack(4)))
    with mode:
        drawn = draw_noise(batch, objective=objective, schedule=schedule).with_noise(E, rng())
        block_mask(drawn.layout)
        draw = find_places(drawn, fixed=True)
        how = {"objective": objective, "schedule": schedule, "self_conditioned": learned.self_conditions}
        outcome = loss_of(denoiser, draw, live=100, **how)
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        with pytest.raises(DynamicOutputShapeException):  # what fixed places are for
            find_places(drawn, fixed=False)
    assert all(p.grad is not None for p in denoiser.parameters()) or objective == "autoregressive"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_drawn_is_where_its_batch_is(objective):
    """On PyTorch's device of tensors without values, as on a GPU: nothing is made on the CPU by default."""
    meta, schedule = torch.device("meta"), make_schedule("log", E, V)
    batch = Batch(*(t.to(meta) for t in pack(4)))
    learned, config = OBJECTIVES[objective], NoiseConfig()
    drawn = learned.draw(batch, config, schedule.on(meta), SPECIAL, learned.random(batch, config, None))
    draw = find_places(drawn.with_noise(E, None), fixed=True)
    tensors = (draw.ids_BS, draw.sigma_BS, draw.shared_BS, draw.eps_BSE, *draw.layout.marks, *draw.places[:-1])
    assert {t.device for t in tensors} == {meta}


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, False], ids=["asked for", "as in training"])
def test_gradients_are_the_same_bits_however_two_threads_share_the_work(flag, two_threads):
    """Thousands of given tokens share few rows of a table, whose gradients no order that threads decide may sum."""
    batch = pack(32, width=60)
    batch = batch._replace(ids=torch.where(batch.ids > 12, 4 + batch.ids % 8, batch.ids))
    denoiser, draw = trained_like(layers=1), find_places(noisy_draw(batch), fixed=False)
    torch.use_deterministic_algorithms(flag)
    try:
        found = [gradients(denoiser, draw, self_conditioned=True)[1] for _ in range(3 if flag else 8)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, found[0], strict=True))

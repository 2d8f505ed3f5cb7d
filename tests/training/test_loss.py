"""The cross-entropy and the optional terms, each against a closed form or an independent computation."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from scorelm.config.recipe import TrainingConfig
from scorelm.model.attention import block_mask
from scorelm.model.denoiser import Places
from scorelm.objectives import OBJECTIVES
from scorelm.training.step import to_device

from .batches import BOS, V, gradients, loss_of, noisy_draw, only, pack, predicted, trained_like

INF = math.inf
CPU = torch.device("cpu")
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
    assert torch.equal(outcome.sigma_N, draw.sigma_BS[draw.open_BS])
    assert torch.equal(outcome.shared_N, draw.shared_BS[draw.open_BS])
    assert torch.equal(outcome.correct_N, log_p.argmax(-1) == targets)
    assert not outcome.cross_entropy_N.requires_grad and outcome.loss.requires_grad


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
    """At sigma inf x is 0 and the clean copy out of sight: another token there changes only its own loss."""
    denoiser, batch = trained_like(), pack(4)
    draw = noisy_draw(batch, mixture=only("ordered"), block_sizes=(1,))
    before = loss_of(denoiser, draw, live=1).cross_entropy_N
    live = draw.open_BS.nonzero()
    row, column = live[3].tolist()
    length = batch.ids.shape[1]
    ids = draw.ids_BS.clone()
    ids[row, column] = ids[row, column - length] = (ids[row, column] + 1 - 4) % (V - 4) + 4
    after = loss_of(denoiser, draw._replace(ids_BS=ids), live=1).cross_entropy_N
    same = draw.layout.segment_BL[row] == draw.layout.segment_BL[row, column]
    for k, (r, c) in enumerate(live.tolist()):
        later = r == row and same[c] and draw.layout.block_BL[r, c] > draw.layout.block_BL[row, column]
        assert bool(before[k] != after[k]) == ((r, c) == (row, column) or bool(later))


def test_self_conditioning_feeds_the_first_estimate_back_without_gradient():
    denoiser, draw = trained_like(), noisy_draw(pack(4))
    outcome, found = gradients(denoiser, draw, self_conditioned=True)
    with torch.no_grad():
        seen, _ = predicted(denoiser, draw)
        x0 = seen.logits_NV.double().softmax(-1) @ denoiser.embedding.table().double()
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


@STREAMS
def test_narrower_rows_hold_the_same_documents(streams):
    """Rows of 512 whose longest document takes 64 become rows of 64, or of 128 with two streams, with the same loss."""
    denoiser, batch = trained_like(), pack(3, width=512)
    draw = noisy_draw(batch, streams=streams)
    found = to_device(draw, CPU)
    assert found.ids_BS.shape[1] == 64 and found.live == draw.live
    assert found.noisy == draw.noisy == len(found.places.noisy_U) and found.live == len(found.places.open_N)
    padding = found.layout.segment_BL == 0
    assert int((~padding).sum()) == int((draw.layout.segment_BL > 0).sum()) and padding.float().mean() < 0.2
    assert_same(gradients(denoiser, found, self_conditioned=True), gradients(denoiser, draw, self_conditioned=True))


@pytest.mark.parametrize("objective", ["autoregressive", "masked"])
def test_the_peers_learn_the_same_in_narrower_rows(objective):
    denoiser, draw = trained_like(), noisy_draw(pack(3, width=512), objective=objective)
    found = to_device(draw, CPU)
    assert found.ids_BS.shape[1] == 64
    losses = [loss_of(denoiser, d, objective=objective, live=draw.live).loss.item() for d in (found, draw)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_stay_where_a_document_takes_more_than_half():
    draw = noisy_draw(pack(4, width=24), streams=1)
    assert torch.equal(to_device(draw, CPU).ids_BS, draw.ids_BS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulated_halves_are_one_batch(objective):
    """Each half divided by the open positions of both: the gradient is that of the whole, whatever the shares."""
    denoiser, whole = trained_like(), noisy_draw(pack(6), objective=objective)
    parts = [whole.map(lambda t: t[rows]) for rows in (slice(0, 2), slice(2, 6))]  # noqa: B023
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


@pytest.mark.parametrize("self_conditioned", [False, True])
def test_nothing_in_a_step_waits_for_the_device(self_conditioned):
    """On fake tensors, which have no values, reading one is an error: so no host waits for a GPU here."""
    with FakeTensorMode() as mode:
        denoiser = trained_like()
    draw = to_device(noisy_draw(pack(4)), CPU)
    places = Places(*map(mode.from_tensor, draw.places))
    draw = draw.map(mode.from_tensor)
    with mode:
        block_mask(draw.layout)
        outcome = loss_of(denoiser, draw._replace(places=places), live=100, self_conditioned=self_conditioned)
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        with pytest.raises(DynamicOutputShapeException):  # what the places are found before for
            loss_of(denoiser, draw, live=100)
    assert all(p.grad is not None for p in denoiser.parameters())


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, False], ids=["asked for", "as in training"])
def test_gradients_are_the_same_bits_however_two_threads_share_the_work(flag, two_threads):
    """Thousands of given tokens share few rows of a table, whose gradients no order that threads decide may sum."""
    batch = pack(32, width=60)
    batch = batch._replace(ids=torch.where(batch.ids > 12, 4 + batch.ids % 8, batch.ids))
    denoiser, draw = trained_like(layers=1), to_device(noisy_draw(batch), CPU)
    torch.use_deterministic_algorithms(flag)
    try:
        found = [gradients(denoiser, draw, self_conditioned=True)[1] for _ in range(3 if flag else 8)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, found[0], strict=True))

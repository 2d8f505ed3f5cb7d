"""A prediction: what follows from its logits, against float64, and its parts against the whole."""

import math

import pytest
import torch

from scorelm.model.layout import Layout
from scorelm.model.prediction import Prediction, in_chunks

from .denoisers import E, V, noisy, trained_like, whole

OPEN = torch.tensor([[False, True, True, False, True], [True, False, True, True, False]])
TABLE = math.sqrt(E) * torch.nn.functional.normalize(
    torch.randn(V, E, generator=torch.Generator().manual_seed(1)), dim=-1
)


def some(scale=3.0):
    logits_NV = scale * torch.randn(int(OPEN.sum()), V, generator=torch.Generator().manual_seed(0))
    return Prediction.of(logits_NV, OPEN, TABLE)


@pytest.mark.parametrize("scale", [0.0, 3.0, 300.0])
def test_what_follows_from_the_logits(scale):
    seen = some(scale)
    p_NV = seen.logits_NV.double().softmax(-1)
    torch.testing.assert_close(seen.probability_NV.double(), p_NV, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.x0_NE.double(), p_NV @ TABLE.double(), rtol=1e-4, atol=1e-5)
    assert (seen.x0_NE.norm(dim=-1) <= math.sqrt(E) + 1e-4).all()  # inside the sphere
    torch.testing.assert_close(seen.entropy_N.double(), torch.special.entr(p_NV).sum(-1), rtol=1e-4, atol=1e-4)
    assert (seen.entropy_N >= 0).all()
    torch.testing.assert_close(seen.top_probability_N.double(), p_NV.amax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(seen.ids_N, seen.logits_NV.argmax(-1))


def test_what_is_ruled_out_has_no_probability_and_no_entropy():
    logits_NV = some().logits_NV.clone()
    logits_NV[:, 5:] = -torch.inf
    seen = Prediction.of(logits_NV, OPEN, TABLE)
    p_NV = logits_NV[:, :5].double().softmax(-1)
    assert (seen.probability_NV[:, 5:] == 0).all()
    torch.testing.assert_close(seen.entropy_N.double(), torch.special.entr(p_NV).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.x0_NE.double(), p_NV @ TABLE[:5].double(), rtol=1e-4, atol=1e-5)
    logits_NV[:, 1:] = -torch.inf  # one token is left
    sure = Prediction.of(logits_NV, OPEN, TABLE)
    assert (sure.entropy_N == 0).all() and (sure.top_probability_N == 1).all() and (sure.ids_N == 0).all()


def test_values_stand_where_their_positions_are():
    seen = some()
    assert torch.equal(seen.spread(seen.logits_NV)[OPEN], seen.logits_NV)
    assert (seen.spread(seen.logits_NV)[~OPEN] == 0).all()
    assert seen.spread(seen.ids_N).dtype == torch.long and seen.spread(seen.ids_N).shape == OPEN.shape
    assert (seen.spread(seen.entropy_N, fill=torch.inf)[~OPEN] == torch.inf).all()
    some_BL = OPEN & (torch.arange(5) > 1)
    assert torch.equal(seen.at(some_BL), seen.spread(seen.logits_NV)[some_BL])


def test_nothing_of_the_vocabulary_is_computed_before_it_is_asked_for():
    asked = []

    def read_out(rows_ND):
        asked.append(len(rows_ND))
        return rows_ND, rows_ND

    seen = Prediction(OPEN, TABLE, read_out, (torch.zeros(6, V),))
    assert seen.hidden_ND.shape == (6, V) and not asked
    assert seen.entropy_N.tolist() == pytest.approx([math.log(V)] * 6) and seen.ids_N.tolist() == [0] * 6
    assert asked == [6]  # once


@pytest.mark.parametrize("chunk", [1, 3 * V, 10**9])
def test_a_prediction_in_chunks_is_the_whole(chunk, monkeypatch):
    monkeypatch.setattr("scorelm.model.prediction.CHUNK", chunk)
    denoiser, layout = trained_like(), whole(2, 9)
    sigma = torch.tensor([[0, 0.7, 3.0, torch.inf, 0, 1.5, 20.0, torch.inf, 0]]).repeat(2, 1)
    ids, x = noisy(denoiser, sigma)
    ids_N = ids[sigma > 0]

    def function(seen, ids_N):
        nats_N = -seen.logits_NV.log_softmax(-1).gather(1, ids_N[:, None])
        return torch.cat([nats_N, seen.x0_NE, seen.context_free_NV], 1)

    found = denoiser.predict(x, sigma, layout).in_chunks(function, ids_N)
    expected = function(denoiser.predict(x, sigma, layout), ids_N)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found.square().sum(), list(denoiser.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), list(denoiser.parameters()), allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


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
    monkeypatch.setattr("scorelm.model.prediction.CHUNK", 4 * 6 + 5)
    found = value_and_gradients()
    assert sizes[1:4] == [4, 4, 3] and sorted(sizes[4:]) == [3, 4, 4]  # once more for the gradient
    for one, other_one in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other_one, rtol=1e-12, atol=1e-12)


def test_the_mean_embedding_is_of_the_posterior_in_the_precision_around(make_lm):
    """Asked for first of all under autocast, x0 is in fp32 and its posterior as the layers compute it."""
    denoiser = make_lm().denoiser
    position_BL = torch.arange(6)[None]
    layout = Layout.one_stream(torch.ones_like(position_BL), position_BL, (position_BL > 0).long())
    sigma_BL = torch.tensor([[0.0, 1.0, torch.inf, 2.0, 0.5, 0.0]])
    x_BLE = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        x0_NE = denoiser.predict(x_BLE, sigma_BL, layout).x0_NE
        logits_NV = denoiser.predict(x_BLE, sigma_BL, layout).logits_NV
    assert x0_NE.dtype == torch.float32
    torch.testing.assert_close(x0_NE, logits_NV.softmax(-1) @ denoiser.embedding.table())
    torch.testing.assert_close(x0_NE, denoiser.predict(x_BLE, sigma_BL, layout).x0_NE, rtol=0.1, atol=0.5)

"""Bounds and exact orders against closed forms, and against enumerable laws with their exact posterior."""

import math
from functools import cache

import pytest
import torch
from torch import nn

from scorelm.config.recipe import ModelConfig
from scorelm.evaluation.likelihood import Noisy, bound, left_to_right, random_order, right_to_left
from scorelm.evaluation.rows import batches
from scorelm.model.denoiser import Denoiser
from scorelm.model.layout import Layout
from scorelm.model.prediction import Prediction
from scorelm.noise.schedule import Gumbel, Log, Power
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.evaluator import Network
from scorelm.sampling.paths import make_path

from ..conftest import SPECIAL
from .exact import F64, REAL, SCHEDULE, Exact, excess, make_law, one_batch, rows_of, total

pytestmark = pytest.mark.usefixtures("no_grad")
PRIOR = 4 * math.log1p(40**-2)
"""Nats that a position's prior costs with embeddings of size 8; evidence at sigma_max is worth almost as much."""
SCORE = OBJECTIVES["score"]


def bounded(denoiser, batch, path, draws=16, seed=2, schedule=SCHEDULE):
    return bound(Network(denoiser, SPECIAL), schedule, batch, make_path(path), draws, seed, 1)


# --- closed form ------------------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """The exact posterior of tokens that are independent: Bayes' rule for each, written out."""

    tells_next_token = False

    def __init__(self, embedding, log_V):
        super().__init__()
        self.embedding, self.log_V = embedding, log_V

    def predict(self, x_BLE, sigma_BL, layout, self_cond_BLE=None, ids_BL=None, table_VE=None, places=None, asked=None):
        open_BL, table_VE = sigma_BL > 0, self.embedding.table()
        logits_NV = torch.addmm(self.log_V, x_BLE[open_BL] / sigma_BL[open_BL][:, None] ** 2, table_VE.T)
        return Prediction.of(logits_NV, open_BL, table_VE)


@cache
def zipf(count=12_800, length=32, vocab=200):
    """Tokens whose frequencies are those of Zipf's law, in rows; their law; a denoiser that knows it and no more."""
    p_V = torch.arange(1, vocab + 1, dtype=F64).pow(-1)
    p_V /= p_V.sum()
    ids_N = torch.searchsorted(p_V.cumsum(0), (torch.arange(count, dtype=F64) + 0.5) / count)
    ids_N = REAL + ids_N[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    denoiser = Denoiser(ModelConfig(dim=8, layers=1, heads=1, hidden=8, embedding_dim=16), REAL + vocab)
    denoiser.prior.data = torch.cat([torch.full((REAL,), -torch.inf), p_V.log().float()])
    return ids_N.view(-1, length).tolist(), p_V, denoiser


def zipf_nats(denoiser, path, draws, rows):
    """Nats per token of the bound, and of its prior term."""
    schedule, nats, prior = Gumbel(0.3, 60.0, mu=0.14, beta=0.55), 0.0, 0.0
    for batch in batches(rows, torch.device("cpu"), SPECIAL, 3200):
        priced = bounded(denoiser, batch, path, draws, 0, schedule)
        nats, prior = nats + float(total(priced).sum()), prior + float(priced.terms["prior"].sum())
    count = sum(map(len, rows))
    return nats / count, prior / count


@pytest.mark.thorough
def test_independent_tokens_cost_what_the_theory_says():
    """DESIGN's check: V = 200, E = 16, sigma from 0.3 to 60: 4.154 nats where the entropy is 4.149.

    With 128 draws a row the standard error is 0.004, by the spread over seeds.
    """
    rows, p_V, denoiser = zipf()
    entropy = -float(p_V @ p_V.log())
    assert entropy == pytest.approx(4.149, abs=5e-4)
    found, prior = zipf_nats(Alone(denoiser.embedding, denoiser.prior), "uniform", 128, rows)
    assert found == pytest.approx(4.154, abs=0.005)
    assert prior == pytest.approx(8 * math.log(1 + 60**-2), rel=1e-6)


@pytest.mark.parametrize(
    ("path", "tolerance"), [("uniform", 0.04), pytest.param("ramp:0.5", 0.06, marks=pytest.mark.thorough)]
)
def test_an_untrained_denoiser_is_the_exact_posterior_of_a_lone_token(path, tolerance):
    """With 10 draws a row; the standard error is a quarter of the tolerance."""
    rows, p_V, denoiser = zipf()
    assert zipf_nats(denoiser, path, 10, rows)[0] == pytest.approx(4.151, abs=tolerance)
    batch, _ = one_batch(rows[:20])
    sigma_BL = torch.logspace(-0.4, 1.8, 32).expand(20, 32)  # above sqrt(E) / 12, the floor of the evidence
    sigma_BL = torch.where(torch.arange(32) == 31, torch.inf, sigma_BL)
    eps_BLE = batch.noise(16, 0, 0)
    exact = Alone(denoiser.embedding, denoiser.prior)
    found_NV, expected_NV = (
        Noisy(Network(one, SPECIAL), batch, 0, passes, True).at(sigma_BL, eps_BLE).logits_NV
        for one, passes in ((denoiser, 2), (exact, 1))
    )
    torch.testing.assert_close(found_NV.softmax(-1), expected_NV.softmax(-1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found_NV[31].softmax(-1)[REAL:].double(), p_V, rtol=1e-5, atol=1e-7)


@pytest.mark.thorough
def test_the_integrand_is_the_mean_square_error_of_the_posterior():
    """Minimum mean square error at given levels by a simulation of its own, in float64."""
    rows, p_V, denoiser = zipf()
    batch, _ = one_batch(rows)
    schedule = Log(0.3, 60.0)
    u_N, value_N = bounded(denoiser, batch, "uniform", 8, 0, schedule).integrand
    table_VE = denoiser.embedding.table().double()[REAL:]
    gen = torch.Generator().manual_seed(5)
    for sigma in (0.9, 1.6, 3.0, 10.0):
        near_N = ((u_N - schedule.u(torch.tensor(sigma, dtype=F64))).abs() < 0.01).nonzero()[:, 0]
        found = value_N[near_N].mean()
        ids_N = torch.multinomial(p_V, 20_000, replacement=True, generator=gen)
        x_NE = table_VE[ids_N] + sigma * torch.randn(20_000, 16, dtype=F64, generator=gen)
        log_NV = p_V.log() - torch.cdist(x_NE, table_VE) ** 2 / (2 * sigma**2)
        error = (table_VE[ids_N] - log_NV.softmax(-1) @ table_VE).square().sum(-1)
        expected = error.mean() * sigma**-3 * sigma * math.log(200)
        noise = float(value_N[near_N].std()) / len(near_N) ** 0.5 + float(expected) / 100
        assert abs(float(found - expected)) < 4 * noise + 0.01, sigma


# --- an enumerable law ------------------------------------------------------------------------------------------------


@cache
def markov(lengths=(4, 4)):
    law = make_law(lengths=lengths)
    return law, Exact(law)


def test_the_exact_posterior_is_bayes_rule():
    """The fixture itself, against sums that are written out for two tokens."""
    law = make_law(tokens=3, lengths=(2, 2))
    exact = Exact(law, dim=4)
    batch, _ = one_batch([law.texts[5]])
    sigma_BL = torch.tensor([[0.0, 0.8, 1.3, 0.0]])
    x_BLE = exact.embedding(batch.ids_BL) + sigma_BL[..., None] * batch.noise(4, 3, 0)
    place_BL = batch.position_BL
    seen = exact.predict(x_BLE, sigma_BL, Layout.one_stream(batch.real_BL, place_BL, (place_BL > 0).long()))
    assert seen.open_BL.tolist() == [[False, True, True, False]]
    table_VE = exact.embedding.table().double()
    for k, place in enumerate((1, 2)):
        p_V = torch.zeros(law.vocab, dtype=F64)
        for m, text in enumerate(law.texts):
            square_L = (x_BLE[0].double() - table_VE[text]).square().sum(-1)
            far = square_L[1] / (2 * 0.8**2) + square_L[2] / (2 * 1.3**2)
            p_V[text[place]] += law.p_M[m] * (-far).exp()
        torch.testing.assert_close(seen.probability_NV[k].double(), p_V / p_V.sum(), atol=1e-5, rtol=1e-5)


@cache
def drawn(lengths=(3, 3), count=1000):
    """A law, its exact posterior, and a batch of texts of the law with the text that each line is."""
    law, exact = markov(lengths)
    rows, which_N = rows_of(law, count)
    batch, line_B = one_batch(rows)
    return law, exact, batch, which_N[line_B]


@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        ("ramp:0.25", SCHEDULE),
        *(
            pytest.param(path, schedule, marks=pytest.mark.thorough)
            for path, schedule in (
                ("ramp:1", SCHEDULE), ("uniform", Power(0.3, 40.0, rho=4.0)), ("uniform", Log(0.3, 40.0)),
            )
        ),
    ],
)  # fmt: skip
def test_with_the_exact_posterior_the_bound_is_the_entropy_on_every_path_and_schedule(path, schedule):
    """A line integral of a gradient: the path does not matter, nor how its levels are spread.

    The standard error is below 0.06, so that a bias of 0.3 nats a text is seen nearly always.
    """
    law, exact, batch, text_B = drawn()
    more, error = excess(bounded(exact, batch, path, schedule=schedule), law.closed_nats_M[text_B])
    assert error < 0.06
    assert -4 * error < more < 4 * error + 3 * PRIOR
    apart = sum(law.mean([law.conditional(m, i, []) for m in range(64)]) for i in (1, 2, 3))
    assert apart - law.mean(law.closed_nats_M) > 1.5  # what a posterior without context would cost more


@pytest.mark.parametrize(
    ("path", "lengths"),
    [("blocks:1", (1, 3)), *(pytest.param(f"blocks:{n}", (3, 3), marks=pytest.mark.thorough) for n in (1, 2))],
)
def test_with_the_exact_posterior_blocks_cost_the_entropy(path, lengths):
    """A noisy block sees clean earlier blocks; in blocks of one, ``</s>`` is priced, so that the length is."""
    law, exact, batch, text_B = drawn(lengths)
    more, error = excess(bounded(exact, batch, path), law.nats_M[text_B])
    assert error < 0.06
    assert -4 * error < more < 4 * error + 4 * PRIOR


@pytest.mark.thorough
def test_the_bound_is_tight_for_every_text_and_not_only_on_average():
    law, exact = markov((3, 3))
    chosen = [0, 6, 27, 63]
    batch, line_B = one_batch([law.texts[m] for m in chosen for _ in range(250)])
    priced = bounded(exact, batch, "ramp:0.5", seed=3)
    nats = [float(law.nats_M[m]) for m in chosen]
    assert max(nats) - min(nats) > 2
    for k, text_nats in enumerate(nats):
        total_N = total(priced)[line_B // 250 == k]
        error = float(total_N.std()) / 250**0.5
        assert error < 0.25
        assert abs(float(total_N.mean()) - text_nats) < 4 * error


@pytest.mark.thorough
def test_the_exact_posterior_of_another_law_costs_the_cross_entropy():
    """Every text at -log q, so that the mean is the entropy and the divergence, along a path and in every order."""
    law, _, batch, text_B = drawn()
    other = make_law(lengths=(3, 3), strength=0.5, seed=4)
    assert other.texts == law.texts
    divergence = law.mean(other.nats_M - law.nats_M)
    assert divergence > 0.5
    wrong = Exact(other)
    more, error = excess(bounded(wrong, batch, "ramp:1"), law.nats_M[text_B])
    assert error < 0.09 and abs(more - divergence) < 4 * error
    network = Network(wrong, SPECIAL)
    for priced in (left_to_right(SCORE, network, batch), right_to_left(network, batch, 1)):
        torch.testing.assert_close(total(priced), other.nats_M[text_B], rtol=1e-5, atol=1e-5)


def test_a_posterior_that_is_no_laws_costs_more_than_the_entropy():
    """Tempered logits: the price left to right is the divergence of what is then drawn, by enumeration."""
    law = make_law(lengths=(3, 3))
    batch, text_B = one_batch(law.texts)
    tempered = Exact(law, sharpness=0.7)
    expected_M = torch.zeros(64, dtype=F64)
    for m, text in enumerate(law.texts):
        for place in range(1, 4):
            q_V = law.after(text[:place]) ** 0.7
            expected_M[m] -= (q_V[text[place]] / q_V.sum()).log()
    found = left_to_right(SCORE, Network(tempered, SPECIAL), batch)
    torch.testing.assert_close(total(found), expected_M[text_B], rtol=1e-5, atol=1e-5)
    assert law.mean(expected_M - law.nats_M) > 0.03


@pytest.mark.thorough
def test_its_bound_is_above_the_entropy_too():
    """By the same noise for both, 600 texts: the difference is 4 standard errors and more."""
    law, exact, batch, _ = drawn((3, 3), 600)
    right, wrong = (total(bounded(d, batch, "uniform", seed=0)) for d in (exact, Exact(law, sharpness=0.7)))
    more = wrong - right
    assert float(more.mean()) > 0.03 + 4 * float(more.std()) / len(more) ** 0.5


@pytest.mark.parametrize("lengths", [(4, 4), (1, 4)])
def test_orders_are_exact_text_by_text(lengths):
    """Left to right with the end, right to left given the length; each text's chance, so that they add up to 1."""
    law, exact = markov(lengths)
    batch, line_B = one_batch(law.texts)
    network = Network(exact, SPECIAL)
    found = total(left_to_right(SCORE, network, batch))
    torch.testing.assert_close(found, law.nats_M[line_B], rtol=1e-5, atol=1e-5)
    assert float((-found).exp().sum()) == pytest.approx(1, abs=1e-5)
    found = total(right_to_left(network, batch, 1))
    torch.testing.assert_close(found, law.closed_nats_M[line_B], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draws", [1, pytest.param(3, marks=pytest.mark.thorough), 7])
def test_random_order_is_unbiased_whatever_the_number_of_draws(draws):
    """Of 800 texts; a bias of 0.4 nats a text would be seen nearly always, with 7 draws of 0.15."""
    law, exact, batch, text_B = drawn((1, 4), 800)
    more, error = excess(random_order(Network(exact, SPECIAL), batch, draws, 0, 1), law.closed_nats_M[text_B])
    assert error < 0.1
    assert abs(more) < 4 * error

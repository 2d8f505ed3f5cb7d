"""What texts cost: closed forms, enumerable laws with their exact posterior, and every formula again by hand."""

import math
from functools import cache
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from torch import nn

from scorelm.objectives.autoregressive import AutoregressiveSampler, hidden, next_token, previous
from scorelm.objectives.masked import draw_masks
from scorelm.config.recipe import ModelConfig, NoiseConfig, TrainingConfig
from scorelm.evaluation.likelihood import (
    Noisy,
    autoregressive,
    bound,
    left_to_right,
    random_order,
    right_to_left,
    whole,
)
from scorelm.evaluation.price import price
from scorelm.evaluation.rows import batches, cut, length_nats
from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.model.denoiser import Denoiser, Posterior
from scorelm.lm import ScoreLM
from scorelm.sampling.paths import make_path
from scorelm.noise.schedule import Gumbel, Log, Power
from scorelm.sampling.generate import generate
from scorelm.sampling.options import make_options
from scorelm.text.sentencepiece import BOS, EOS, PAD, UNK, Tokenizer
from scorelm.objectives.score import Batch as Packed
from scorelm.objectives.score import score_loss

from .exact import F64, REAL, Exact, excess, make_law, one_batch, rows_of, total

SCHEDULE = Gumbel(0.3, 40.0, mu=0.2, beta=0.8)
PRIOR = 4 * math.log1p(40**-2)
"""Nats that a position's prior costs with embeddings of size 8; evidence at sigma_max is worth almost as much."""


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# --- closed form ------------------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """The exact posterior of tokens that are independent: Bayes' rule for each, written out."""

    def __init__(self, embedding, log_V):
        super().__init__()
        self.embedding, self.log_V, self.table_VE = embedding, log_V, embedding.table()

    def live(self, x_BLE, sigma_BL, layout, self_cond_BLE=None, ids_BL=None, table_VE=None):
        live_BL = sigma_BL > 0
        logits_NV = torch.addmm(self.log_V, x_BLE[live_BL] / sigma_BL[live_BL][:, None] ** 2, self.table_VE.T)
        return Posterior(logits_NV, logits_NV, live_BL)

    def estimate(self, logits_NV):
        return logits_NV.softmax(-1) @ self.table_VE


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
    for batch in batches(rows, torch.device("cpu"), 3200):
        priced = bound(denoiser, schedule, batch, make_path(path), draws=draws, seed=0, passes=1)
        nats, prior = nats + float(total(priced).sum()), prior + float(priced.terms["prior"].sum())
    count = sum(map(len, rows))
    return nats / count, prior / count


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


@pytest.mark.parametrize(("path", "tolerance"), [("uniform", 0.04), ("ramp:0.5", 0.06)])
def test_an_untrained_denoiser_is_the_exact_posterior_of_a_lone_token(path, tolerance):
    rows, p_V, denoiser = zipf()
    assert zipf_nats(denoiser, path, 10, rows)[0] == pytest.approx(4.151, abs=tolerance)
    batch, _ = one_batch(rows[:20])
    sigma_BL = torch.logspace(-0.4, 1.8, 32).expand(20, 32)  # above sqrt(E) / 12, the floor of the evidence
    sigma_BL = torch.where(torch.arange(32) == 31, torch.inf, sigma_BL)
    eps_BLE = batch.noise(16, 0, 0)
    found_NV, _ = Noisy(denoiser, batch, whole(batch), 2, True).at(sigma_BL, eps_BLE)
    expected_NV, _ = Noisy(Alone(denoiser.embedding, denoiser.prior), batch, whole(batch), 1, True).at(
        sigma_BL, eps_BLE
    )
    torch.testing.assert_close(found_NV.softmax(-1), expected_NV.softmax(-1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found_NV[31].softmax(-1)[REAL:].double(), p_V, rtol=1e-5, atol=1e-7)


def test_the_integrand_is_the_mean_square_error_of_the_posterior():
    """Minimum mean square error at given levels by a simulation of its own, in float64."""
    rows, p_V, denoiser = zipf()
    batch, _ = one_batch(rows)
    schedule = Log(0.3, 60.0)
    priced = bound(denoiser, schedule, batch, make_path("uniform"), draws=8, seed=0, passes=1)
    u_N, value_N = priced.integrand
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
    logits_NV, _, live_BL = exact.live(x_BLE, sigma_BL, whole(batch))
    assert live_BL.tolist() == [[False, True, True, False]]
    table_VE = exact.embedding.table().double()
    for k, place in enumerate((1, 2)):
        p_V = torch.zeros(law.vocab, dtype=F64)
        for m, text in enumerate(law.texts):
            square_L = (x_BLE[0].double() - table_VE[text]).square().sum(-1)
            far = square_L[1] / (2 * 0.8**2) + square_L[2] / (2 * 1.3**2)
            p_V[text[place]] += law.p_M[m] * (-far).exp()
        torch.testing.assert_close(logits_NV[k].softmax(-1).double(), p_V / p_V.sum(), atol=1e-5, rtol=1e-5)


@cache
def drawn(lengths=(3, 3), count=1500):
    """A law, its exact posterior, and a batch of texts of the law with the text that each line is."""
    law, exact = markov(lengths)
    rows, which_N = rows_of(law, count)
    batch, line_B = one_batch(rows)
    return law, exact, batch, which_N[line_B]


@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        ("uniform", SCHEDULE), ("uniform", Log(0.3, 40.0)), ("uniform", Power(0.3, 40.0, rho=4.0)),
        ("ramp:0.25", SCHEDULE), ("ramp:1", SCHEDULE),
    ],
)  # fmt: skip
def test_with_the_exact_posterior_the_bound_is_the_entropy_on_every_path_and_schedule(path, schedule):
    """A line integral of a gradient: the path does not matter, nor how its levels are spread."""
    law, exact, batch, text_B = drawn()
    priced = bound(exact, schedule, batch, make_path(path), draws=16, seed=2, passes=1)
    more, error = excess(priced, law.closed_nats_M[text_B])
    assert error < 0.05
    assert -4 * error < more < 4 * error + 3 * PRIOR
    apart = sum(law.mean([law.conditional(m, i, []) for m in range(64)]) for i in (1, 2, 3))
    assert apart - law.mean(law.closed_nats_M) > 1.5  # what a posterior without context would cost more


@pytest.mark.parametrize(("path", "lengths"), [("blocks:2", (3, 3)), ("blocks:1", (3, 3)), ("blocks:1", (1, 3))])
def test_with_the_exact_posterior_blocks_cost_the_entropy(path, lengths):
    """A noisy block sees clean earlier blocks; in blocks of one, ``</s>`` is priced, so that the length is."""
    law, exact, batch, text_B = drawn(lengths)
    priced = bound(exact, SCHEDULE, batch, make_path(path), draws=16, seed=2, passes=1)
    more, error = excess(priced, law.nats_M[text_B])
    assert error < 0.05
    assert -4 * error < more < 4 * error + 4 * PRIOR


def test_the_bound_is_tight_for_every_text_and_not_only_on_average():
    law, exact = markov((3, 3))
    chosen = [0, 6, 27, 63]
    batch, line_B = one_batch([law.texts[m] for m in chosen for _ in range(250)])
    priced = bound(exact, SCHEDULE, batch, make_path("ramp:0.5"), draws=16, seed=3, passes=1)
    nats = [float(law.nats_M[m]) for m in chosen]
    assert max(nats) - min(nats) > 2
    for k, text_nats in enumerate(nats):
        total_N = total(priced)[line_B // 250 == k]
        error = float(total_N.std()) / 250**0.5
        assert error < 0.25
        assert abs(float(total_N.mean()) - text_nats) < 4 * error


def test_the_exact_posterior_of_another_law_costs_the_cross_entropy():
    """Every text at -log q, so that the mean is the entropy and the divergence, along every path and in every order."""
    law, _, batch, text_B = drawn()
    other = make_law(lengths=(3, 3), strength=0.5, seed=4)
    assert other.texts == law.texts
    divergence = law.mean(other.nats_M - law.nats_M)
    assert divergence > 0.5
    wrong = Exact(other)
    for path in ("uniform", "ramp:1"):
        priced = bound(wrong, SCHEDULE, batch, make_path(path), draws=16, seed=2, passes=1)
        more, error = excess(priced, law.nats_M[text_B])
        assert error < 0.08
        assert abs(more - divergence) < 4 * error
    for priced in (left_to_right(wrong, batch), right_to_left(wrong, batch, 1)):
        torch.testing.assert_close(total(priced), other.nats_M[text_B], rtol=1e-5, atol=1e-5)


def test_a_posterior_that_is_no_laws_costs_more_than_the_entropy():
    """Tempered logits: the price left to right is the divergence of what is then drawn, by enumeration."""
    law, exact, batch, text_B = drawn()
    tempered = Exact(law, sharpness=0.7)
    expected_M = torch.zeros(64, dtype=F64)
    for m in range(64):
        for place in range(1, 4):
            p_V = torch.zeros(law.vocab, dtype=F64)
            for n, text in enumerate(law.texts):
                if text[:place] == law.texts[m][:place]:
                    p_V[text[place]] += law.p_M[n]
            q_V = (p_V / p_V.sum()) ** 0.7
            expected_M[m] -= (q_V[law.texts[m][place]] / q_V.sum()).log()
    torch.testing.assert_close(total(left_to_right(tempered, batch)), expected_M[text_B], rtol=1e-5, atol=1e-5)
    assert law.mean(expected_M - law.nats_M) > 0.03
    right, wrong = (total(bound(d, SCHEDULE, batch, make_path("uniform"), 16, 0, 1)) for d in (exact, tempered))
    more = wrong - right  # the same noise
    assert float(more.mean()) > 0.03 + 4 * float(more.std()) / len(more) ** 0.5


@pytest.mark.parametrize("lengths", [(4, 4), (1, 4)])
def test_orders_are_exact_text_by_text(lengths):
    """Left to right with the end, right to left given the length."""
    law, exact = markov(lengths)
    batch, line_B = one_batch(law.texts)
    torch.testing.assert_close(total(left_to_right(exact, batch)), law.nats_M[line_B], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total(right_to_left(exact, batch, 1)), law.closed_nats_M[line_B], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draws", [1, 3, 7])
def test_random_order_is_unbiased_whatever_the_number_of_draws(draws):
    law, exact, batch, text_B = drawn((1, 4))
    more, error = excess(random_order(exact, batch, draws, 0, 1), law.closed_nats_M[text_B])
    assert error < 0.06
    assert abs(more) < 4 * error


# --- a network, by hand -----------------------------------------------------------------------------------------------

LINES = [
    "in the beginning god created the heaven and the earth",
    "and the earth was without form and void",
    "and god said let there be light and there was light",
    "he called the light day and the darkness night 12",
] * 5
TEXTS = ["god said", "let there be light", "void", "and the earth was without form and void", "day 2", "", "light"]


@cache
def tokenizer():
    return Tokenizer.train(LINES, 60, byte_fallback=False)


@cache
def make_lm(objective="score"):
    """A small model with nothing at zero, for rows of up to 20 tokens."""
    torch.manual_seed(0)
    config = ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=8)
    lm = ScoreLM(config, tokenizer(), Log(0.5, 20.0), [0, 0, *range(1, 20)], objective=objective)
    for parameter in lm.denoiser.parameters():
        nn.init.normal_(parameter, std=0.25)
    nn.init.normal_(lm.denoiser.context.weight, std=0.4)
    nn.init.normal_(lm.denoiser.embedding.weight)
    return lm.eval()


@cache
def some_rows():
    """Rows of several lengths; the last two are one text that was cut, so that ``<s>`` or ``</s>`` is missing."""
    rows = cut([TEXTS[0], TEXTS[4], TEXTS[3]], tokenizer(), 20).ids
    assert len(rows) == 4 and rows[3][0] != BOS and rows[2][-1] != EOS
    return rows


def evaluate(lm, ids, sigma, eps_LE=None, block=None, stream=None, passes=1, closed=True, raw=False):
    """Logits [L, V] of one row alone: every pass written out; unless `raw`, without what is never written."""
    sigma_1L = torch.tensor([sigma], dtype=torch.float32)
    table_VE = lm.denoiser.embedding.table()
    x_1LE = table_VE[torch.tensor([ids])].clone()
    for i, level in enumerate(sigma):
        if math.isinf(level):
            x_1LE[0, i] = 0
        elif level:
            x_1LE[0, i] += level * eps_LE[i]
    start = [i == 0 and ids[0] == BOS for i in range(len(ids))]
    block = block or [int(not s) for s in start]
    stream = stream or [CLEAN if s else NOISY for s in start]
    layout = Layout(*(torch.tensor([t]) for t in ([1] * len(ids), list(range(len(ids))), block, stream)))
    self_cond_1LE = None
    for _ in range(passes):
        logits_1LV = lm.denoiser(x_1LE, sigma_1L, layout, self_cond_1LE)
        self_cond_1LE = torch.where(sigma_1L[..., None] > 0, logits_1LV.softmax(-1) @ table_VE, 0.0)
    logits_LV = logits_1LV[0].double()
    if raw:
        return logits_LV
    logits_LV[:, [BOS, PAD]] = -math.inf
    if closed and EOS in ids:
        logits_LV[:, EOS] = -math.inf
    return logits_LV


def cross_entropy(logits_V, token):
    return float(logits_V.logsumexp(-1) - logits_V[token])


def free_places(ids, closed):
    """All but ``<s>`` at the front and, where the length is known, ``</s>``."""
    return [i for i, t in enumerate(ids) if not (i == 0 and t == BOS) and not (closed and t == EOS)]


def bound_by_hand(lm, ids, index, eps, path, draws, seed):
    """The bound of a row, one block at a time: its clean past, then the block, nothing else. In float64."""
    size, slope = path.block, path.slope
    low, high, r = lm.schedule.sigma_min, lm.schedule.sigma_max, lm.denoiser.embedding.table().double()
    free = free_places(ids, size != 1)
    first = int(ids[0] == BOS)
    body = list(range(first, len(ids)))
    blocks = [body[k : k + size] for k in range(0, len(body), size)] if size else [body]
    start = np.random.default_rng(seed).random()
    terms = dict.fromkeys(("reconstruction", "diffusion", "prior"), 0.0)
    for number, block in enumerate(blocks, 1):
        opened = [i for i in block if i in free]
        seen = ids[: block[-1] + 1]
        number_of = [0] * first + [1 + (i - first) // (size or len(body)) for i in range(first, len(seen))]
        streams = [NOISY if k == number else CLEAN for k in number_of]
        for draw in range(draws + 1):
            offset = (start + 0.6180339887498949 * index + 0.7548776662466927 * number) % 1
            u = {}
            for i in opened:
                place = free.index(i) / max(1, len(free) - 1)
                u[i] = min(1, max(0, (draw + offset) / draws * (1 + slope) - slope * (1 - place)))
                u[i] = u[i] if draw < draws else 0.0
            level = {i: math.inf if u[i] >= 1 else low * (high / low) ** u[i] for i in opened}
            sigma = [level.get(i, 0.0) for i in range(len(seen))]
            logits_LV = evaluate(lm, seen, sigma, eps[draw], number_of, streams, passes=2, closed=False)
            if size != 1 and EOS in ids:
                logits_LV[:, EOS] = -math.inf
            for i in opened:
                if draw == draws:
                    terms["reconstruction"] += cross_entropy(logits_LV[i], ids[i])
                    terms["prior"] += 8 / 2 * math.log(1 + high**-2)
                elif 0 < u[i] < 1:
                    error = float((r[ids[i]] - logits_LV[i].softmax(-1) @ r).square().sum())
                    weight = level[i] ** -3 * level[i] * math.log(high / low)
                    terms["diffusion"] += weight * error * (1 + slope) / draws
    return terms


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "blocks:1", "blocks:3"])
def test_the_bound_of_a_network_is_its_formula(path):
    """Two streams against one block after the other, two passes, padding, and rows without ``<s>`` or ``</s>``."""
    lm, rows, draws = make_lm(), some_rows(), 3
    batch, _ = one_batch(rows)
    chosen = make_path(path)
    priced = bound(lm.denoiser, lm.schedule, batch, chosen, draws, seed=11, passes=2)
    noise = [batch.noise(8, 11, draw) for draw in range(draws + 1)]
    for line, index in enumerate(batch.index):
        eps = [eps_BLE[line] for eps_BLE in noise]
        terms = bound_by_hand(lm, rows[index], index, eps, chosen, draws, 11)
        for name, value in terms.items():
            assert float(priced.terms[name][line]) == pytest.approx(value, rel=2e-4), (name, index)
    assert priced.evaluations.tolist() == [2 * (draws + 1)] * 4


def test_noise_is_standard_normal_and_new_in_every_draw_and_row():
    batch, _ = one_batch([[5] * 40 for _ in range(50)])
    eps_DN = torch.stack([batch.noise(8, 0, draw).flatten() for draw in range(4)])
    assert abs(float(eps_DN.mean())) < 0.01
    torch.testing.assert_close(torch.cov(eps_DN), torch.eye(4), atol=0.04, rtol=0)
    row_BN = batch.noise(8, 0, 0).flatten(1)
    assert float((torch.corrcoef(row_BN) - torch.eye(50)).abs().max()) < 0.25
    assert not torch.equal(batch.noise(8, 0, 0), batch.noise(8, 1, 0))


def left_to_right_by_hand(lm, ids, place):
    """-log p of one token after a clean prefix in blocks of one."""
    seen = ids[: place + 1]
    first = int(ids[0] == BOS)
    block = [i + 1 - first for i in range(len(seen))]
    logits_LV = evaluate(lm, seen, [0.0] * place + [math.inf], None, block, [CLEAN] * place + [NOISY], closed=False)
    return cross_entropy(logits_LV[place], ids[place])


def test_left_to_right_is_every_prefix_alone():
    lm, rows = make_lm(), some_rows()
    batch, _ = one_batch(rows)
    priced = left_to_right(lm.denoiser, batch)
    for line, index in enumerate(batch.index):
        expected = sum(left_to_right_by_hand(lm, rows[index], i) for i in free_places(rows[index], closed=False))
        assert float(total(priced)[line]) == pytest.approx(expected, rel=1e-5)
    assert priced.evaluations.tolist() == [1] * 4


def test_right_to_left_is_every_suffix_alone():
    lm, rows = make_lm(), some_rows()
    batch, _ = one_batch(rows)
    priced = right_to_left(lm.denoiser, batch, 2)
    for line, index in enumerate(batch.index):
        ids, expected = rows[index], 0.0
        free = free_places(ids, closed=True)
        for i in free:
            sigma = [math.inf if j in free and j <= i else 0.0 for j in range(len(ids))]
            expected += cross_entropy(evaluate(lm, ids, sigma, passes=2)[i], ids[i])
        assert float(total(priced)[line]) == pytest.approx(expected, rel=1e-5)
        assert priced.evaluations[line] == 2 * len(free)


@cache
def given_some(objective, row, given, passes):
    """Cross-entropies of a row's other places (a dict) when the places `given` and its ends are known."""
    ids, lm = list(row), make_lm(objective)
    sigma = [0.0 if i in given or t in (BOS, EOS) else math.inf for i, t in enumerate(ids)]
    logits_LV = evaluate(lm, ids, sigma, passes=passes)
    return {i: cross_entropy(logits_LV[i], ids[i]) for i in range(len(ids)) if sigma[i]}


def any_order_nats(objective, row, passes, free=(1, 2, 3)):
    """The mean NLL over every order of the free places, one order after the other."""
    costs = []
    for order in permutations(free):
        known = frozenset(set(range(len(row))) - set(free))
        for place in order:
            costs.append(given_some(objective, row, known, passes)[place])
            known |= {place}
    return sum(costs) / math.factorial(len(free))


@pytest.mark.parametrize("draws", [1, 3, 5])
def test_random_order_is_the_mean_over_all_orders(draws):
    """A network's orders disagree, so the weights matter: three tokens, six orders."""
    row = (BOS, 12, 30, 17, EOS)
    each = [
        sum(given_some("score", row, frozenset({0, 4, *order[:k]}), 2)[order[k]] for k in range(3))
        for order in permutations((1, 2, 3))
    ]
    assert np.std(each) > 0.05
    lm = make_lm()
    batch, _ = one_batch([list(row)] * 2000)
    total_B = total(random_order(lm.denoiser, batch, draws, 0, 2))
    error = float(total_B.std()) / 2000**0.5
    assert abs(float(total_B.mean()) - any_order_nats("score", row, 2)) < 4 * error
    assert error < 0.06


def test_a_pass_is_fed_the_estimate_of_the_one_before():
    """Three passes, positions of every kind; fed back it matters."""
    lm, ids = make_lm(), some_rows()[0]
    batch, _ = one_batch([ids])
    sigma = [0.0] + [(0.0, 0.7, 2.0, math.inf)[i % 4] for i in range(len(ids) - 1)]
    eps_BLE = batch.noise(8, 0, 0)
    results = []
    for passes in (1, 2, 3):
        logits_NV, ids_N = Noisy(lm.denoiser, batch, whole(batch), passes, True).at(torch.tensor([sigma]), eps_BLE)
        expected_LV = evaluate(lm, ids, sigma, eps_BLE[0], passes=passes)
        where = [i for i, s in enumerate(sigma) if s]
        torch.testing.assert_close(logits_NV.double(), expected_LV[where], rtol=1e-4, atol=1e-4)
        assert ids_N.tolist() == [ids[i] for i in where]
        results.append(logits_NV[:, UNK:])
    assert float((results[0] - results[1]).abs().max()) > 0.01 < float((results[1] - results[2]).abs().max())


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_the_texts_and_nothing_else():
    rows = cut(TEXTS, tokenizer(), 20)
    for number, text in enumerate(TEXTS):
        joined = [t for row, owner in zip(rows.ids, rows.text, strict=True) if owner == number for t in row]
        assert joined == [BOS, *tokenizer().encode(text), EOS]
        assert rows.tokens[number] == len(joined)
    assert max(map(len, rows.ids)) == 20 and rows.characters == [len(text) for text in TEXTS]


@pytest.mark.parametrize("positions", [1, 30, 64, 4096])
def test_batches_hold_every_row_once_with_padding_behind(positions):
    rows = cut(TEXTS, tokenizer(), 20).ids
    seen = []
    for batch in batches(rows, torch.device("cpu"), positions):
        assert batch.ids_BL.numel() <= positions or len(batch.index) == 1
        for line, index in enumerate(batch.index):
            length = len(rows[index])
            assert batch.ids_BL[line].tolist() == rows[index] + [PAD] * (batch.ids_BL.shape[1] - length)
            assert batch.real_BL[line].tolist() == [1] * length + [0] * (batch.ids_BL.shape[1] - length)
            assert batch.position_BL[line].tolist() == list(range(batch.ids_BL.shape[1]))
        seen += batch.index
    assert sorted(seen) == list(range(len(rows)))


def test_lengths_are_a_distribution():
    lengths = [0, 0, 3, 0, 5, 1]
    nats = length_nats(lengths, [[5] * n for n in range(1, 6)])
    assert float((-nats).exp().sum()) == pytest.approx(1)
    assert nats[2] == pytest.approx(-math.log(0.5 / (9 + 2.5))) and nats[3] == pytest.approx(-math.log(5.5 / 11.5))


# --- price ------------------------------------------------------------------------------------------------------------

WAYS = [
    ("uniform", None), ("ramp:0.5", None), ("blocks:1", None), ("blocks:3", None), ("ordered", None), ("reverse", None),
    ("random", None), ("uniform", 3), ("blocks:3", 9), ("shuffled", 4), ("confidence", 4), ("entropy", 4),
    ("surest", 4), ("bounded", 8),
]  # fmt: skip


@pytest.mark.parametrize(("path", "steps"), WAYS)
def test_a_price_does_not_depend_on_the_size_of_the_batches(path, steps):
    lm = make_lm()
    small, large, alone = (price(lm, TEXTS, path, steps=steps, draws=2, positions=n) for n in (64, 4096, 1))
    exact = path in ("ordered", "reverse")
    for other in (small, alone):
        torch.testing.assert_close(other.by_text, large.by_text, rtol=1e-5 if exact else 2e-4, atol=1e-5)
    assert small.nats_per_token == pytest.approx(large.nats_per_token, rel=1e-4)
    assert small.nfe == large.nfe and small.tokens == large.tokens
    assert math.isfinite(large.nats_per_token) and (large.by_text > -20).all()


EXACT = [("score", "ordered"), ("score", "reverse"), ("autoregressive", "ordered")]


@pytest.mark.parametrize(("objective", "path"), EXACT)
def test_an_exact_price_does_not_depend_on_the_order_of_the_texts(objective, path):
    lm = make_lm(objective)
    forward, backward = price(lm, TEXTS, path), price(lm, TEXTS[::-1], path)
    torch.testing.assert_close(forward.by_text, backward.by_text.flip(0), rtol=1e-5, atol=1e-5)
    alone = [float(price(lm, [text], path).by_text) for text in TEXTS]
    torch.testing.assert_close(forward.by_text, torch.tensor(alone, dtype=F64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("path", "steps"), WAYS)
def test_the_figures_follow_from_the_nats_of_each_text(path, steps):
    """Everything but the nats themselves, again by hand; texts that are cut count whole."""
    lm = make_lm()
    found = price(lm, TEXTS, path, steps=steps, draws=2)
    tokens = np.array([len(tokenizer().encode(text)) + 2 for text in TEXTS])
    nats = found.by_text.numpy()
    mean = nats.sum() / tokens.sum()
    assert tokens.max() > 20
    assert found.tokens == tokens.sum() and found.nats_per_token == pytest.approx(mean)
    assert found.bits_per_char == pytest.approx(nats.sum() / math.log(2) / sum(map(len, TEXTS)))
    error = math.sqrt(sum((n - mean * t) ** 2 for n, t in zip(nats, tokens, strict=True))) / tokens.sum()
    assert found.stderr_nats_per_token == pytest.approx(error)
    assert sum(found.terms.values()) == pytest.approx(mean)
    assert ("length" in found.terms) == (path not in ("ordered", "blocks:1"))
    if "length" in found.terms:
        # Lengths 1 to 20 with counts 0, 1, ..., 19 and a half each; a text of more than 20 tokens is several rows.
        rows = [min(20, t - start) for t in tokens for start in range(0, t, 20)]
        expected = sum(-math.log((n - 1 + 0.5) / (190 + 10)) for n in rows)
        assert found.terms["length"] == pytest.approx(expected / tokens.sum())


def test_a_price_is_the_sum_of_what_its_rows_cost():
    """Through the methods themselves: nothing is lost or swapped on the way."""
    lm = make_lm()
    rows = cut(TEXTS, tokenizer(), 20)
    batch, _ = one_batch(rows.ids)
    by_row_N = torch.zeros(len(rows.ids), dtype=F64)
    by_row_N[batch.index] = total(bound(lm.denoiser, lm.schedule, batch, make_path("uniform"), 4, 7, 2))
    by_row_N += length_nats(lm.lengths, rows.ids)
    expected = [sum(float(by_row_N[i]) for i, t in enumerate(rows.text) if t == k) for k in range(len(TEXTS))]
    found = price(lm, TEXTS, draws=4, seed=7)
    assert found.path == "uniform" and not found.exact
    assert found.nfe == pytest.approx(2 * (4 + 1) * len(rows.ids) / len(TEXTS))
    torch.testing.assert_close(found.by_text, torch.tensor(expected, dtype=F64), rtol=1e-4, atol=1e-4)
    assert price(lm, TEXTS, draws=4, seed=8).nats_per_token != found.nats_per_token


def test_the_curve_adds_up_to_the_diffusion_term():
    """Nats per token and unit of log sigma, over log sigma; with a log schedule the bins are of equal width."""
    lm = make_lm()
    found = price(lm, TEXTS, draws=24)
    sigma, density = found.integrand
    width = math.log(20.0 / 0.5) / len(sigma)
    assert float((sigma.log() - sigma[0].log()).max()) == pytest.approx(width * (len(sigma) - 1))
    assert float(density.sum()) * width == pytest.approx(found.terms["diffusion"])


@pytest.mark.parametrize(
    ("objective", "texts", "options", "reason"),
    [
        ("score", [], {}, "no text"),
        ("score", TEXTS, {"path": "ordered", "steps": 4}, "no steps"),
        ("score", TEXTS, {"path": "reverse", "steps": 4}, "no steps"),
        ("score", TEXTS, {"path": "random", "steps": 4}, "no steps"),
        ("score", TEXTS, {"path": "sideways"}, "sideways"),
        ("score", TEXTS, {"path": "ramp:-1"}, "-1"),
        ("score", TEXTS, {"path": "blocks:0"}, "0"),
        ("score", TEXTS, {"path": "remask", "steps": 4}, "no price"),
        ("score", TEXTS, {"draws": 0}, "draws"),
        ("score", TEXTS, {"path": "uniform", "steps": 0}, "steps"),
        ("autoregressive", TEXTS, {"path": "uniform"}, "left to right"),
        ("autoregressive", TEXTS, {"path": "ordered", "steps": 2}, "no steps"),
        ("masked", TEXTS, {"path": "uniform"}, "random"),
        ("masked", TEXTS, {"path": "ordered"}, "random"),
        ("masked", TEXTS, {"path": "confidence"}, "random"),
    ],
)
def test_what_cannot_be_priced_is_refused_in_one_line(objective, texts, options, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        price(make_lm(objective), texts, **options)
    assert "\n" not in str(caught.value)


# --- peers ------------------------------------------------------------------------------------------------------------


def next_logits(lm, ids):
    """Logits of the token after `ids`, by the trunk on that prefix alone: no padding, no cache."""
    read = [BOS, *ids]
    layout = Layout.causal(torch.ones(1, len(read), dtype=torch.long), torch.arange(len(read))[None])
    h_1LD = lm.denoiser.trunk(lm.denoiser.token_in[torch.tensor([read])], torch.zeros(1, len(read)), layout)
    return (lm.denoiser.context.weight.double() @ h_1LD[0, -1].double()) + lm.denoiser.prior.double()


def test_an_autoregressive_price_is_every_prefix_alone():
    lm = make_lm("autoregressive")
    found = price(lm, TEXTS)
    assert found.path == "ordered" and found.exact and found.nfe >= 1
    rows = cut(TEXTS, tokenizer(), 20)
    expected_T = torch.zeros(len(TEXTS), dtype=F64)
    for ids, owner in zip(rows.ids, rows.text, strict=True):
        for i in free_places(ids, closed=False):
            expected_T[owner] += cross_entropy(next_logits(lm, ids[:i]), ids[i])
    torch.testing.assert_close(found.by_text, expected_T, rtol=1e-5, atol=1e-5)
    batch, _ = one_batch(rows.ids)
    by_row_N = total(autoregressive(lm.denoiser, batch))
    assert float(by_row_N.sum()) == pytest.approx(float(expected_T.sum()), rel=1e-5)


def test_an_autoregressive_model_is_a_distribution_over_prefixes():
    """Chances of all pairs of tokens add up to 1, by what `autoregressive` says of each."""
    lm = make_lm("autoregressive")
    rows = [[BOS, a, b] for a in range(3, 60) for b in range(3, 60)]
    batch, _ = one_batch(rows)
    all_pairs = float((-total(autoregressive(lm.denoiser, batch))).exp().sum())
    first_V = next_logits(lm, [BOS]).softmax(-1)
    expected = sum(float(first_V[a]) * float(next_logits(lm, [BOS, a]).softmax(-1)[3:].sum()) for a in range(3, 60))
    assert all_pairs == pytest.approx(expected, rel=1e-4)


class Watched(AutoregressiveSampler):
    """Keeps the logits of every evaluation."""

    def once_cached(self, x_BLE, sigma_BL, reach_BL, x0_BLE):
        logits_NV = super().once_cached(x_BLE, sigma_BL, reach_BL, x0_BLE)
        open_BL = reach_BL & (sigma_BL > 0)
        for (row, place), logits_V in zip(open_BL.nonzero().tolist(), logits_NV, strict=True):
            LOGITS[row, place] = logits_V.clone()
        return logits_NV


LOGITS: dict = {}


def written_by_hand(lm, template, seed):
    """A row drawn token by token, every prefix evaluated afresh; ids and the logits that each was drawn from."""
    gen = torch.Generator().manual_seed(seed)
    ids, seen = [], {}
    for place, token in enumerate(template):
        if token is None:
            logits_V = next_logits(lm, ids).clone()
            logits_V[[BOS, PAD, UNK]] = -torch.inf
            if template[-1] == EOS:
                logits_V[EOS] = -torch.inf
            seen[place] = logits_V
            u = float(torch.rand(1, dtype=F64, generator=gen))
            token = int((logits_V.softmax(-1).cumsum(0) <= u).sum())
        ids.append(token)
        if token == EOS:
            break
    return ids, seen


def test_an_autoregressive_sampler_draws_what_an_uncached_loop_draws():
    """Rows with and without a prompt, of known length and open; each at its own pace."""
    lm = make_lm("autoregressive")
    prompt = tokenizer().encode("and god")
    templates = [
        [BOS, *[None] * 12], [BOS, *prompt, *[None] * 9], [BOS, *[None] * 7, EOS], [BOS, *prompt, None, None, EOS],
        [BOS, *[None] * 18],
    ]  # fmt: skip
    seeds = [5, 6, 7, 8, 9]
    LOGITS.clear()
    *_, record = generate(lm.denoiser, lm.schedule, templates, seeds, make_options("blocks:1", steps=64), Watched)
    ends = 0
    for row, (template, seed) in enumerate(zip(templates, seeds, strict=True)):
        ids, logits = written_by_hand(lm, template, seed)
        assert record.ids_BL[row, : len(ids)].tolist() == ids
        assert int(record.length_B[row]) == len(ids) and int(record.nfe_B[row]) == len(logits)
        ends += len(ids) < len(template)
        for place, logits_V in logits.items():
            torch.testing.assert_close(LOGITS[row, place].double(), logits_V, rtol=1e-4, atol=1e-4)
        free = [ids[place] for place in logits]
        assert all(0 <= t < tokenizer().vocab_size and t not in (BOS, PAD, UNK) for t in free)
        tokenizer().decode(ids)
    assert len(LOGITS) == sum(len(written_by_hand(lm, t, s)[1]) for t, s in zip(templates, seeds, strict=True))


def test_the_text_of_an_autoregressive_sample_is_that_of_its_ids():
    lm = make_lm("autoregressive")
    for sample in lm.generate(["and god", ""], n=3, seed=3):
        assert sample.ids[0] == BOS and len(sample.ids) <= lm.max_length
        assert sample.text == tokenizer().decode(sample.ids).strip()
        prompt = tokenizer().encode("and god") if sample.seed < 6 else []
        template = [BOS, *prompt, *[None] * lm.max_length][: lm.max_length]
        assert sample.ids == written_by_hand(lm, template, sample.seed)[0]


def packed(row, count):
    """`count` copies of a document, two in each packed row."""
    ids = torch.tensor([list(row) * 2] * (count // 2))
    segment = torch.tensor([[1] * len(row) + [2] * len(row)] * (count // 2))
    return Packed(ids, segment, torch.arange(len(row)).repeat(2).expand_as(ids))


def test_masks_never_hide_the_start_and_hide_all_else_equally_often():
    row = (BOS, 12, 30, 17, EOS)
    rng = torch.Generator().manual_seed(0)
    draw = draw_masks(packed(row, 20_000), NoiseConfig(), Log(0.5, 20.0), rng)
    hidden_NL = (draw.sigma_BS == torch.inf).view(-1, 5)
    assert set(draw.sigma_BS.unique().tolist()) == {0.0, math.inf}
    assert not hidden_NL[:, 0].any()
    expected_L = torch.tensor([0.5, 0.5, 0.5, 0.25], dtype=F64)  # </s> is known half of the time
    torch.testing.assert_close(hidden_NL[:, 1:].double().mean(0), expected_L, atol=0.015, rtol=0)
    share = torch.bincount(hidden_NL[:, 1:4].sum(1), minlength=4).double() / 20_000
    torch.testing.assert_close(share, torch.full((4,), 0.25, dtype=F64), atol=0.015, rtol=0)  # t uniform: all counts
    assert ((draw.weight_BS > 0) == (draw.sigma_BS > 0)).all()


def test_the_loss_of_a_masked_model_is_the_mean_over_all_orders():
    """Weighted cross-entropies are unbiased: every mask of three tokens, with ``</s>`` known half of the time."""
    lm, row, count = make_lm("masked"), (BOS, 12, 30, 17, EOS), 12_000
    closed, opened = any_order_nats("masked", row, 1), 0.0
    costs = {}

    def open_costs(given):
        if given not in costs:
            sigma = [0.0 if i == 0 or i in given else math.inf for i in range(5)]
            logits_LV = evaluate(lm, list(row), sigma, raw=True)
            costs[given] = {i: cross_entropy(logits_LV[i], row[i]) for i in range(1, 5) if sigma[i]}
        return costs[given]

    for shown in range(4):  # n / m times the mean cost of those that are hidden, over all masks of a size
        masks = list(combinations(range(1, 5), shown))
        opened += sum(sum(open_costs(mask).values()) / (4 - shown) for mask in masks) / len(masks)
    expected = (closed + opened) / (3 + 4)
    losses = []
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        draw = draw_masks(packed(row, count), NoiseConfig(), lm.schedule, rng).with_noise(lm.config.embedding_dim, rng)
        config = TrainingConfig(likelihood_weight=0.0, z_loss=0.0)
        losses.append(float(score_loss(lm.denoiser, draw, lm.schedule, config, live=draw.live).loss))
    error = np.std(losses, ddof=1) / 6**0.5
    assert np.mean(losses) == pytest.approx(expected, abs=4 * error + 0.002 * expected)
    assert error < 0.04
    unweighted = (closed / 3 + opened / 4) / 2
    assert abs(unweighted - expected) / expected < 0.2  # the same scale: nats per token that is not given


def test_a_masked_models_price_is_its_mean_over_all_orders():
    """With one draw for each count of given tokens, and the length's own price beside it."""
    lm = make_lm("masked")
    text = next(t for t in ("da", "go", "he", "or", "be", "12") if len(tokenizer().encode(t)) in (2, 3))
    row = tuple(tokenizer().encode_document(text))
    places = tuple(range(1, len(row) - 1))
    found = price(lm, [text] * 1500, draws=len(places))
    assert found.path == "random"
    expected = any_order_nats("masked", row, 1, places) - math.log((len(row) - 1 + 0.5) / 200)
    error = float(found.by_text.std()) / 1500**0.5
    assert abs(float(found.by_text.mean()) - expected) < 4 * error + 1e-4
    assert error < 0.05


def test_previous_tokens_and_hidden_states_are_documents_own():
    """Two packed documents: nothing of the first reaches the second, whose own ``<s>`` is before its first token."""
    lm = make_lm("autoregressive")
    ids = torch.tensor([[BOS, 12, 13, EOS, BOS, 20, 21, 22]])
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    assert previous(ids, position).tolist() == [[BOS, BOS, 12, 13, BOS, BOS, 20, 21]]
    layout = Layout.causal(torch.tensor([[1] * 4 + [2] * 4]), position)
    logits_LV = next_token(lm.denoiser, hidden(lm.denoiser, previous(ids, position), layout)[0])
    for place, ids_before in ((3, [BOS, 12, 13]), (5, [BOS]), (7, [BOS, 20, 21])):
        torch.testing.assert_close(logits_LV[place].double(), next_logits(lm, ids_before), rtol=1e-4, atol=1e-4)

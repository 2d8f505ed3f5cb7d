"""What texts cost a network: every formula again by hand, one row and one pass at a time."""

import math
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch

from scorelm.evaluation.likelihood import Noisy, bound, left_to_right, random_order, right_to_left
from scorelm.evaluation.walk import walk
from scorelm.model.layout import CLEAN, NOISY, Layout
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.paths import make_path

from .exact import BOS, EOS, REAL, fast, one_batch, total
from .networks import (
    cross_entropy,
    evaluate,
    free_places,
    make_model,
    network,
    next_logits,
    some_rows,
    writable,
)

pytestmark = pytest.mark.usefixtures("no_grad")
SCORE, AUTOREGRESSIVE = OBJECTIVES["score"], OBJECTIVES["autoregressive"]

# --- bounds and orders ------------------------------------------------------------------------------------------------


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
    for turn, block in enumerate(blocks, 1):
        number = 1 + block[0]
        opened = [i for i in block if i in free]
        seen = ids[: block[-1] + 1]
        number_of = [0] * first + [number if i in block else 1 + i for i in range(first, len(seen))]
        streams = [NOISY if i in block else CLEAN for i in range(len(seen))]
        for draw in range(draws + 1):
            offset = (start + 0.6180339887498949 * index + 0.7548776662466927 * turn) % 1
            u = {}
            for i in opened:
                place = free.index(i) / max(1, len(free) - 1)
                u[i] = min(1, max(0, (draw + offset) / draws * (1 + slope) - slope * (1 - place)))
                u[i] = u[i] if draw < draws else 0.0
            level = {i: math.inf if u[i] >= 1 else low * (high / low) ** u[i] for i in opened}
            sigma = [level.get(i, 0.0) for i in range(len(seen))]
            logits_LV = evaluate(lm, seen, sigma, eps[draw], number_of, streams, passes=2, closed=size != 1)
            for i in opened:
                if draw == draws:
                    terms["reconstruction"] += cross_entropy(logits_LV[i], ids[i])
                    terms["prior"] += 8 / 2 * math.log(1 + high**-2)
                elif 0 < u[i] < 1:
                    error = float((r[ids[i]] - logits_LV[i].softmax(-1) @ r).square().sum())
                    weight = level[i] ** -3 * level[i] * math.log(high / low)
                    terms["diffusion"] += weight * error * (1 + slope) / draws
    return terms


@pytest.mark.parametrize("path", fast("ramp:0.5", "blocks:3", of=["uniform", "ramp:0.5", "blocks:1", "blocks:3"]))
def test_the_bound_of_a_network_is_its_formula(path):
    """Two streams against one block after the other, two passes, padding, and rows without ``<s>`` or ``</s>``."""
    lm, rows, draws = make_model(), some_rows(), 3
    batch, _ = one_batch(rows)
    chosen = make_path(path)
    priced = bound(network(), lm.schedule, batch, chosen, draws, seed=11, passes=2)
    noise = [batch.noise(8, 11, draw) for draw in range(draws + 1)]
    for line, index in enumerate(batch.index):
        eps = [eps_BLE[line] for eps_BLE in noise]
        terms = bound_by_hand(lm, rows[index], index, eps, chosen, draws, 11)
        for name, value in terms.items():
            assert float(priced.terms[name][line]) == pytest.approx(value, rel=2e-4), (name, index)
    assert priced.evaluations.tolist() == [2 * (draws + 1)] * 4


def test_left_to_right_is_every_prefix_alone():
    """Of a model whose given tokens have not learned to tell the next one."""
    lm, rows = make_model(), some_rows()
    batch, _ = one_batch(rows)
    priced = left_to_right(SCORE, network(), batch)
    for line, index in enumerate(batch.index):
        ids, expected = rows[index], 0.0
        first = int(ids[0] == BOS)
        for place in free_places(ids, closed=False):
            seen, streams = ids[: place + 1], [CLEAN] * place + [NOISY]
            block = [i + 1 - first for i in range(len(seen))]
            logits_LV = evaluate(lm, seen, [0.0] * place + [math.inf], None, block, streams, closed=False)
            expected += cross_entropy(logits_LV[place], ids[place])
        assert float(total(priced)[line]) == pytest.approx(expected, rel=1e-5)
    assert priced.evaluations.tolist() == [1] * 4


def told(lm, before):
    """Logits of the token after `before`, as the last of these tells it; of a first one, as a noisy position does."""
    if not before:
        return evaluate(lm, [5], [math.inf], None, [1], [NOISY], closed=False)[0]
    one, denoiser = torch.ones(1, len(before)).long(), lm.denoiser
    layout = Layout.causal(one, one.cumsum(1) - 1)
    h_LD = denoiser.backbone(denoiser.token_in[torch.tensor([before])], torch.zeros(1, len(before)), layout)[0]
    return writable((denoiser.context(h_LD[-1]) + denoiser.prior).double())


def test_left_to_right_the_token_before_tells_the_next(settings_of):
    """In one pass over a batch, rows without ``<s>`` among them, and token by token through the cache."""
    lm, rows = make_model(tells_next_token=True), some_rows()
    batch, _ = one_batch(rows)
    priced = left_to_right(SCORE, lm.loop().network, batch)
    walked = walk(lm.loop(), batch, settings_of(path="blocks:1", steps=1, temperature=1.0), 0)
    for line, index in enumerate(batch.index):
        ids = rows[index]
        expected = sum(cross_entropy(told(lm, ids[:i]), ids[i]) for i in free_places(ids, closed=False))
        assert float(total(priced)[line]) == pytest.approx(expected, rel=1e-5)
        assert float(total(walked)[line]) == pytest.approx(expected, rel=1e-5)
    assert priced.evaluations.tolist() == [1] * 4


def test_right_to_left_is_every_suffix_alone():
    lm, rows = make_model(), some_rows()
    batch, _ = one_batch(rows)
    priced = right_to_left(network(), batch, 2)
    for line, index in enumerate(batch.index):
        ids, expected = rows[index], 0.0
        free = free_places(ids, closed=True)
        for i in free:
            sigma = [math.inf if j in free and j <= i else 0.0 for j in range(len(ids))]
            expected += cross_entropy(evaluate(lm, ids, sigma, passes=2)[i], ids[i])
        assert float(total(priced)[line]) == pytest.approx(expected, rel=1e-5)
        assert priced.evaluations[line] == 2 * len(free)


@cache
def given_some(row, given):
    """Cross-entropies of a row's other places (a dict) when the places `given` and its ends are known."""
    ids, lm = list(row), make_model()
    sigma = [0.0 if i in given or t in (BOS, EOS) else math.inf for i, t in enumerate(ids)]
    logits_LV = evaluate(lm, ids, sigma, passes=2)
    return {i: cross_entropy(logits_LV[i], ids[i]) for i in range(len(ids)) if sigma[i]}


@pytest.mark.parametrize("draws", fast(1, of=[1, 3, 5]))
def test_random_order_is_the_mean_over_all_orders(draws):
    """A network's orders disagree, so the weights matter: three tokens, six orders; 2,000 rows are 0.09 nats sharp."""
    row = (BOS, 12, 30, 17, EOS)
    each = [
        sum(given_some(row, frozenset({0, 4, *order[:k]}))[order[k]] for k in range(3))
        for order in permutations((1, 2, 3))
    ]
    assert np.std(each) > 0.05
    batch, _ = one_batch([list(row)] * 2000)
    total_B = total(random_order(network(), batch, draws, 0, 2))
    error = float(total_B.std()) / 2000**0.5
    assert abs(float(total_B.mean()) - np.mean(each)) < 4 * error
    assert error < 0.09


def test_a_pass_is_fed_the_estimate_of_the_one_before():
    """Three passes, positions of every kind; fed back it matters."""
    lm, ids = make_model(), some_rows()[0]
    batch, _ = one_batch([ids])
    sigma = [0.0] + [(0.0, 0.7, 2.0, math.inf)[i % 4] for i in range(len(ids) - 1)]
    eps_BLE = batch.noise(8, 0, 0)
    results = []
    for passes in (1, 2, 3):
        seen = Noisy(network(), batch, 0, passes, True).at(torch.tensor([sigma]), eps_BLE)
        expected_LV = evaluate(lm, ids, sigma, eps_BLE[0], passes=passes)
        where = [i for i, s in enumerate(sigma) if s]
        torch.testing.assert_close(seen.logits_NV.double(), expected_LV[where], rtol=1e-4, atol=1e-4)
        assert seen.open_BL.nonzero()[:, 1].tolist() == where
        results.append(seen.logits_NV[:, REAL:])
    assert float((results[0] - results[1]).abs().max()) > 0.01 < float((results[1] - results[2]).abs().max())


# --- steps of a path --------------------------------------------------------------------------------------------------


class Shown:
    """A denoiser that keeps what it is asked."""

    tells_next_token = False

    def __init__(self, inner):
        self.inner, self.embedding, self.backbone, self.seen = inner, inner.embedding, inner.backbone, []

    def predict(self, x_BLE, sigma_BL, *others):
        self.seen.append((x_BLE[0].clone(), sigma_BL[0].clone()))
        return self.inner.predict(x_BLE, sigma_BL, *others)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_of_a_network_by_hand(loop_of, settings_of, steps):
    """Rows of several lengths; the estimate of a step is fed to the next; where rows end is known."""
    lm, rows = make_model(), some_rows()
    table_VE = lm.denoiser.embedding.table()
    for index, ids in enumerate(rows):
        shown = Shown(lm.denoiser)
        batch, _ = one_batch([ids])
        priced = walk(loop_of(shown, lm.schedule), batch, settings_of(path="uniform", steps=steps), 5)
        free, states = free_places(ids, closed=True), shown.seen
        assert len(states) == steps
        nats, self_cond_1LE = 0.0, None
        for k, (x_LE, sigma_L) in enumerate(states):
            log_LV = step_by_hand(lm, ids, x_LE, sigma_L, self_cond_1LE)
            self_cond_1LE = torch.zeros(1, len(ids), 8)
            self_cond_1LE[0, free] = log_LV[free].exp().float() @ table_VE
            for i in free:
                if k == steps - 1:
                    nats -= float(log_LV[i, ids[i]])
                    continue
                (next_LE, next_L) = states[k + 1]
                gain_E = next_LE[i].double() / next_L[i].double() ** 2
                if k:
                    gain_E = gain_E - x_LE[i].double() / sigma_L[i].double() ** 2
                each_V = (table_VE.double() - table_VE[ids[i]].double()) @ gain_E
                nats -= float((log_LV[i] + each_V).logsumexp(0))
        assert float(total(priced)) == pytest.approx(nats, rel=1e-4), index


def step_by_hand(lm, ids, x_LE, sigma_L, self_cond_1LE):
    """Log-probabilities [L, V] of a row in a state, by the network's own reading of it."""
    noise = torch.zeros_like(x_LE)
    known = lm.denoiser.embedding.table()[torch.tensor(ids)]
    inside = (sigma_L > 0) & sigma_L.isfinite()
    noise[inside] = (x_LE - known)[inside] / sigma_L[inside][:, None]
    logits_LV = evaluate_with(lm, ids, sigma_L.tolist(), noise, self_cond_1LE)
    return logits_LV.log_softmax(-1)


def evaluate_with(lm, ids, sigma, eps_LE, self_cond_1LE):
    """`evaluate` with an estimate that is fed to its one pass."""
    whole = lm.denoiser.predict

    def fed(x_BLE, sigma_BL, layout, self_cond_BLE=None):
        return whole(x_BLE, sigma_BL, layout, self_cond_1LE)

    lm.denoiser.predict = fed
    try:
        return evaluate(lm, ids, sigma, eps_LE)
    finally:
        del lm.denoiser.predict


def test_token_by_token_of_a_network_by_hand(settings_of):
    """Through the cache of keys and values, in a batch of rows that go at their own pace; ``</s>`` may be written."""
    batch, _ = one_batch(some_rows())
    priced = walk(make_model().loop(), batch, settings_of(path="blocks:1", steps=1), 0)
    torch.testing.assert_close(total(priced), total(left_to_right(SCORE, network(), batch)), rtol=1e-4, atol=1e-4)


PATHS = ["uniform", "ramp:0.5", "blocks:1", "blocks:2", "shuffled", "confidence", "entropy", "surest", "bounded:0.5"]


@pytest.mark.parametrize("path", PATHS)
def test_a_row_costs_the_same_whatever_its_neighbours(settings_of, path):
    """Random numbers belong to the row's number; paths that write whole tokens in an order of their own have none."""
    lm, rows = make_model(), some_rows()
    batch, line_B = one_batch(rows)
    settings = settings_of(path=path, steps=5)
    together = total(walk(lm.loop(), batch, settings, 1))
    first = line_B.tolist().index(0)
    alone, _ = one_batch(rows[:1])
    found = total(walk(lm.loop(), alone, settings, 1))
    assert float(found) == pytest.approx(float(together[first]), rel=1e-4)
    other = total(walk(lm.loop(), alone, settings, 2))
    assert (float(other) == pytest.approx(float(found), rel=1e-6)) == (path in ("blocks:1", "surest", "bounded:0.5"))


# --- an autoregressive network ----------------------------------------------------------------------------------------


def test_an_autoregressive_price_is_every_prefix_alone():
    lm, rows = make_model("autoregressive"), some_rows()
    batch, _ = one_batch(rows)
    priced = left_to_right(AUTOREGRESSIVE, network("autoregressive"), batch)
    for line, index in enumerate(batch.index):
        ids = rows[index]
        free = free_places(ids, closed=False)
        expected = sum(cross_entropy(writable(next_logits(lm, ids[:i])), ids[i]) for i in free)
        assert float(total(priced)[line]) == pytest.approx(expected, rel=1e-5)


def test_documents_in_one_row_are_their_own():
    """Two packed documents: nothing of the first reaches the second, whose own ``<s>`` is before its first token."""
    lm = make_model("autoregressive")
    ids = torch.tensor([[BOS, 12, 13, EOS, BOS, 20, 21, 22]])
    position, segment = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), torch.tensor([[1] * 4 + [2] * 4])
    open_BL = torch.ones(1, 8, dtype=torch.bool)
    seen = AUTOREGRESSIVE.next_tokens(lm.denoiser, ids, segment, position, open_BL, lm.tokenizer.special)
    for place, ids_before in ((3, [BOS, 12, 13]), (5, [BOS]), (7, [BOS, 20, 21])):
        torch.testing.assert_close(seen.logits_NV[place].double(), next_logits(lm, ids_before), rtol=1e-4, atol=1e-4)

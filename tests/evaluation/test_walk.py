"""The price of a finite number of steps: an enumerable law with its exact posterior, and every step again by hand."""

import math
from functools import cache
from itertools import combinations, pairwise, permutations

import pytest
import torch
from torch import nn

from scorelm.config.recipe import ModelConfig
from scorelm.evaluation.likelihood import bound
from scorelm.evaluation.rows import cut
from scorelm.evaluation.walk import walk
from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.lm import ScoreLM
from scorelm.sampling.paths import make_path
from scorelm.noise.schedule import Gumbel, Log
from scorelm.sampling.generate import generate
from scorelm.sampling.options import make_options
from scorelm.text.sentencepiece import BOS, EOS, PAD, Tokenizer

from .exact import F64, REAL, Exact, Seen, excess, make_law, one_batch, rows_of, total

SCHEDULE = Gumbel(0.3, 40.0, mu=0.2, beta=0.8)
PATHS = ["uniform", "ramp:0.5", "blocks:1", "blocks:2", "shuffled", "confidence", "entropy", "surest", "bounded:0.5"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@cache
def drawn(lengths=(3, 3), count=600):
    """A law, its exact posterior, and a batch of texts of the law with the text that each line is."""
    law = make_law(lengths=lengths)
    rows, which_N = rows_of(law, count)
    batch, line_B = one_batch(rows)
    return law, Exact(law), batch, which_N[line_B]


@cache
def every_text(lengths=(3, 3)):
    """A law, its exact posterior, and a batch of all of its texts with the text that each line is."""
    law = make_law(lengths=lengths)
    return law, Exact(law), *one_batch(law.texts)


def cost(denoiser, batch, path, steps, seed=0, schedule=SCHEDULE):
    return walk(denoiser, schedule, batch, make_options(path, steps=steps), seed)


# --- what is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("path", PATHS)
def test_a_lone_token_costs_its_nll_on_every_trajectory(path, steps):
    """By Bayes' rule along the trajectory, whatever the noise was: not only on average."""
    law, exact, batch, line_B = every_text((1, 1))
    for seed in (0, 1):
        found_B = total(cost(exact, batch, path, steps, seed))
        torch.testing.assert_close(found_B, law.nats_M[line_B], rtol=2e-5, atol=2e-4)
    found_B = total(cost(exact, batch, path, steps, 0, Log(0.5, 8.0)))  # nor on the levels
    torch.testing.assert_close(found_B, law.nats_M[line_B], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("lengths", [(3, 3), (1, 4)])
def test_token_by_token_costs_the_nll_of_every_text(lengths, steps):
    """In blocks of one each token is alone; ``</s>`` is among them, so that the length is priced."""
    law, exact, batch, line_B = every_text(lengths)
    priced = cost(exact, batch, "blocks:1", steps)
    torch.testing.assert_close(total(priced), law.nats_M[line_B], rtol=2e-5, atol=5e-4)
    tokens_B = law.length_M[line_B] - 1  # all but <s>
    assert priced.evaluations.tolist() == tokens_B.clamp(min=steps).tolist()


@pytest.mark.parametrize("steps", [4, 11])
@pytest.mark.parametrize("path", ["shuffled", "surest", "bounded:0"])
def test_one_token_a_step_costs_the_nll_given_the_length_in_any_order(path, steps):
    """Even in an order that the posterior chooses on the way."""
    law, exact, batch, line_B = every_text((1, 4))
    priced = cost(exact, batch, path, steps)
    torch.testing.assert_close(total(priced), law.closed_nats_M[line_B], rtol=2e-5, atol=2e-5)
    assert priced.evaluations.tolist() == (law.length_M[line_B] - 2).tolist()


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "shuffled", "confidence", "entropy", "surest", "bounded:0.5"])
def test_one_step_costs_the_marginals(path):
    law, exact, batch, line_B = every_text((1, 3))
    expected_M = torch.tensor(
        [sum(law.conditional(m, i, []) for i in range(1, len(text) - 1)) for m, text in enumerate(law.texts)]
    )
    found_B = total(cost(exact, batch, path, 1))
    torch.testing.assert_close(found_B, expected_M[line_B].double(), rtol=1e-5, atol=1e-5)


def test_half_of_the_tokens_a_step_costs_the_mean_over_all_halves():
    law, exact = every_text((4, 4))[:2]
    m = 57
    splits = []
    for first in combinations(range(1, 5), 2):
        later = [i for i in range(1, 5) if i not in first]
        splits.append(sum(law.conditional(m, i, []) for i in first) + sum(law.conditional(m, i, first) for i in later))
    batch, _ = one_batch([law.texts[m]] * 600)
    found_B = total(cost(exact, batch, "shuffled", 2))
    expected = torch.tensor(splits, dtype=F64)
    far_BS = (found_B[:, None] - expected).abs()
    assert float(far_BS.amin(1).max()) < 1e-4  # every row is one of them
    counts = torch.bincount(far_BS.argmin(1), minlength=6)
    assert float(expected.std()) > 0.1 and int(counts.min()) > 60  # of 100 expected


def test_blocks_in_a_step_each_cost_their_marginals_after_clean_blocks():
    """A block sees the clean blocks before it and what is given in itself, and ``</s>`` is never written.

    The cache of finished blocks gets its due: the posterior knows them by their keys alone.
    """
    law, exact, batch, line_B = every_text((1, 4))
    found_B = total(cost(exact, batch, "blocks:2", 1))
    for line, m in list(enumerate(line_B.tolist()))[::4]:
        text, expected = law.texts[m], 0.0
        for start in range(1, len(text), 2):
            block = [i for i in (start, start + 1) if i < len(text)]
            free = [i for i in block if text[i] != EOS]
            p_IV = torch.zeros(len(text), law.vocab, dtype=F64)
            for other, p in zip(law.at_MP.tolist(), law.p_M.tolist(), strict=True):
                past = other[:start] == text[:start] and all(other[i] != PAD for i in block)
                if past and all(other[i] == EOS for i in block if i not in free):
                    for i in free:
                        p_IV[i, other[i]] += p
            p_IV[:, EOS] = 0
            expected -= sum(float((p_IV[i, text[i]] / p_IV[i].sum()).log()) for i in free)
        assert float(found_B[line]) == pytest.approx(expected, rel=1e-5)


# --- what is a bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "blocks:2", "confidence", "entropy"])
def test_more_steps_cost_less_down_to_the_entropy(path):
    """Strongly dependent tokens: nothing below the entropy, a fall with the steps, and next to nothing left at many."""
    law, exact, batch, text_B = drawn()
    found = [excess(cost(exact, batch, path, steps, seed=3), law.nats_M[text_B]) for steps in (2, 4, 8, 64)]
    assert found[0][0] > 0.4
    for (before, error), (after, other) in pairwise(found):
        assert before - after > 4 * math.hypot(error, other) or after < 0.1
    assert found[1][0] > 0.1
    for more, error in found:
        assert more > -4 * error
    more, error = found[-1]
    assert error < 0.02 and more < 4 * error + 0.05


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "blocks:2", "confidence", "entropy"])
def test_another_laws_posterior_costs_its_cross_entropy(path):
    """At many steps; a changed transition, so the divergence is what it costs more."""
    law, _, batch, text_B = drawn()
    other = make_law(lengths=(3, 3), strength=0.5, seed=4)
    divergence = law.mean(other.nats_M - law.nats_M)
    assert divergence > 0.5
    more, error = excess(cost(Exact(other), batch, path, 48), law.nats_M[text_B])
    assert error < 0.05
    assert divergence - 4 * error < more < divergence + 4 * error + 0.05


@pytest.mark.parametrize("path", [*PATHS[:-1], "bounded:0"])
def test_a_tempered_posterior_costs_more(path):
    """Left to right, its price is known: the divergence that tempering at 0.7 makes, token by token.

    Above a bound of 0, a posterior that is less sure is worth more steps, which may cost less.
    """
    law, exact, batch, text_B = drawn()
    tempered = Exact(law, sharpness=0.7)
    if path == "blocks:1":  # in a step each
        expected_M = torch.zeros(64, dtype=F64)
        for m in range(64):
            for place in range(1, 4):
                p_V = torch.zeros(law.vocab, dtype=F64)
                for n, text in enumerate(law.texts):
                    if text[:place] == law.texts[m][:place]:
                        p_V[text[place]] += law.p_M[n]
                q_V = (p_V / p_V.sum()) ** 0.7
                expected_M[m] -= (q_V[law.texts[m][place]] / q_V.sum()).log()
        found_B = total(cost(tempered, batch, path, 1))
        torch.testing.assert_close(found_B, expected_M[text_B], rtol=1e-5, atol=1e-5)
        assert law.mean(expected_M - law.nats_M) > 0.03
    steps = 3 if path in ("shuffled", "surest", "bounded:0") else 24
    wrong_B, right_B = (total(cost(d, batch, path, steps)) for d in (tempered, exact))
    more_B = wrong_B - right_B
    assert float(more_B.mean()) > 0.02 + 2 * float(more_B.std()) / len(more_B) ** 0.5


def test_a_tempered_posterior_in_random_order_costs_the_mean_over_orders():
    law, _, batch, text_B = drawn((3, 3), 3000)
    expected_M = torch.zeros(64, dtype=F64)
    for m in range(64):
        for order in permutations((1, 2, 3)):
            for k, place in enumerate(order):
                known = order[:k]
                p_V = torch.zeros(law.vocab, dtype=F64)
                for n, text in enumerate(law.texts):
                    if all(text[i] == law.texts[m][i] for i in known):
                        p_V[text[place]] += law.p_M[n]
                q_V = (p_V / p_V.sum()) ** 0.7
                expected_M[m] -= (q_V[law.texts[m][place]] / q_V.sum()).log() / 6
    more, error = excess(cost(Exact(law, sharpness=0.7), batch, "shuffled", 3), expected_M[text_B])
    assert abs(more) < 4 * error and error < 0.01


@pytest.mark.parametrize("path", ["uniform", "confidence"])
def test_the_price_bounds_what_the_sampler_draws(path):
    """Two steps over two dependent tokens: the law of 5,000 samples, and the price of the texts of the true law."""
    law = make_law(tokens=3, lengths=(2, 2))
    exact, options, drawn_M = Exact(law), make_options(path, steps=2), torch.zeros(9, dtype=F64)
    for first in range(0, 5000, 1000):
        seeds = list(range(first, first + 1000))
        *_, record = generate(exact, SCHEDULE, [[BOS, None, None, EOS]] * 1000, seeds, options)
        which_N = (record.ids_BL[:, 1] - REAL) * 3 + record.ids_BL[:, 2] - REAL
        drawn_M += torch.bincount(which_N, minlength=9) / 5000
    cross_entropy = law.mean(-drawn_M.log())
    assert cross_entropy > law.mean(law.nats_M) + 0.1  # two steps are too few
    batch, _ = one_batch(rows_of(law, 1500)[0])
    price, error = excess(cost(exact, batch, path, 2), 0.0)
    assert cross_entropy + 0.05 < price - 2 * error
    assert price + 4 * error < excess(cost(exact, batch, path, 1), 0.0)[0]


# --- steps by hand ----------------------------------------------------------------------------------------------------


def bayes(law, table_VE, text, x_LE, sigma_L):
    """log p(token | evidence) of every free position by the law's texts of that length, [L, V] in float64."""
    log_M = torch.full((len(law.texts),), -torch.inf, dtype=F64)
    for m, other in enumerate(law.texts):
        if len(other) != len(text):
            continue
        log_M[m] = law.p_M[m].log()
        for i in range(1, len(text) - 1):
            if sigma_L[i] == 0 and other[i] != text[i]:
                log_M[m] = -torch.inf
            elif 0 < sigma_L[i] < math.inf:
                log_M[m] -= (x_LE[i] - table_VE[other[i]]).square().sum() / (2 * sigma_L[i] ** 2)
    p_LV = torch.zeros(len(text), law.vocab, dtype=F64)
    for other, p in zip(law.texts, log_M.softmax(0), strict=True):
        if len(other) == len(text):
            p_LV[range(len(text)), other] += p
    return p_LV.log()


def log_normal(y_E, mean_E, variance):
    """Log-density of a normal distribution with the same variance everywhere."""
    return -0.5 * float(((y_E - mean_E).square() / variance + math.log(2 * math.pi * variance)).sum())


def by_hand(law, table_VE, text, states):
    """Sum of log q(y' | y, e) / p(y' | y) over steps and positions, densities written out, and of -log p(e | y)."""
    moved = finished = 0.0
    states = [*states, (torch.zeros(len(text), 8), torch.zeros(len(text)))]
    for (x_LE, sigma_L), (next_LE, next_L) in pairwise(states):
        x_LE, sigma_L, next_LE, next_L = x_LE.double(), sigma_L.double(), next_LE.double(), next_L.double()
        log_LV = bayes(law, table_VE, text, x_LE, sigma_L)
        for i in range(1, len(text) - 1):
            if next_L[i] == sigma_L[i]:
                continue
            if next_L[i] == 0:
                finished -= float(log_LV[i, text[i]])
                continue
            more = next_L[i] ** -2 - sigma_L[i] ** -2
            gain_E = next_LE[i] / next_L[i] ** 2
            if sigma_L[i].isfinite():
                gain_E = gain_E - x_LE[i] / sigma_L[i] ** 2
            each = [log_normal(gain_E, more * table_VE[v], more) for v in range(law.vocab)]
            moved += each[text[i]] - float((log_LV[i] + torch.tensor(each, dtype=F64)).logsumexp(0))
    return moved, finished


@pytest.mark.parametrize(
    ("path", "steps", "evaluations"),
    [
        ("uniform", 2, 2),
        ("uniform", 5, 5),
        ("ramp:0.5", 4, 4),
        ("shuffled", 2, 2),
        ("confidence", 5, None),
        ("entropy", 5, 5),
    ],
)
def test_the_cost_of_a_trajectory_is_its_density_ratio(path, steps, evaluations):
    """The states that the model was shown, and the two densities of every step between them, in float64."""
    law, exact = every_text((4, 4))[:2]
    table_VE = exact.embedding.table().double()
    for m in (3, 200):
        batch, _ = one_batch([law.texts[m]])
        exact.seen.clear()
        priced = cost(exact, batch, path, steps, seed=m)
        assert len(exact.seen) == (evaluations or len(exact.seen)) == int(priced.evaluations[0])
        states = [(one.x_BLE[0], one.sigma_BL[0]) for one in exact.seen]
        assert states[0][1].tolist() == [0.0, *[math.inf] * 4, 0.0]
        moved, finished = by_hand(law, table_VE, law.texts[m], states)
        assert float(priced.terms["diffusion"][0]) == pytest.approx(moved, rel=1e-4, abs=1e-4)
        assert float(priced.terms["reconstruction"][0]) == pytest.approx(finished, rel=1e-4, abs=1e-4)
        assert path == "shuffled" or abs(moved) > 0.05


def test_the_states_are_those_of_the_forward_process():
    """Increments of evidence are normal with mean dtau e and variance dtau, each apart from those before it."""
    law = make_law(lengths=(1, 1))
    exact = Exact(law)
    text = law.texts[2]
    batch, _ = one_batch([text] * 4000)
    cost(exact, batch, "uniform", 4)
    e_E = exact.embedding.table()[text[1]].double()
    y_BE, tau, normal = torch.zeros(4000, 8, dtype=F64), 0.0, []
    for k, one in enumerate(exact.seen[1:], 1):
        sigma = float(one.sigma_BL[0, 1])
        assert sigma == pytest.approx(float(SCHEDULE.sigma(torch.tensor(1 - k / 4, dtype=F64))))
        new_BE, new = one.x_BLE[:, 1].double() / sigma**2, sigma**-2
        normal.append((new_BE - y_BE - (new - tau) * e_E) / math.sqrt(new - tau))
        y_BE, tau = new_BE, new
    normal_BN = torch.cat(normal, 1)
    assert len(exact.seen) == 4
    assert float(normal_BN.mean(0).abs().max()) < 4.5 / 4000**0.5
    assert float((normal_BN.T.cov() - torch.eye(24)).abs().max()) < 0.1


# --- a network --------------------------------------------------------------------------------------------------------

LINES = ["in the beginning god created the heaven and the earth", "and god said let there be light 12"] * 5


@cache
def make_lm():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(LINES, 50, byte_fallback=False)
    config = ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=8)
    lm = ScoreLM(config, tokenizer, Log(0.5, 20.0), [0, 0, *range(1, 12)])
    for parameter in lm.denoiser.parameters():
        nn.init.normal_(parameter, std=0.25)
    nn.init.normal_(lm.denoiser.context.weight, std=0.4)
    nn.init.normal_(lm.denoiser.embedding.weight)
    lm.denoiser.prior[EOS] = 3.0  # so that ruling it out is worth something
    lm.denoiser.prior[BOS] = 3.0
    return lm.eval()


@cache
def some_rows():
    """A text in several rows, so that some have no ``<s>`` or ``</s>``, and a short one."""
    rows = cut(["god said let there be light", "12"], make_lm().tokenizer, 12).ids
    assert any(row[0] != BOS for row in rows) and any(row[-1] != EOS for row in rows)
    return rows


class Shown(nn.Module):
    """A denoiser that keeps what it is asked."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.embedding, self.size, self.seen = inner, inner.embedding, inner.size, []

    def live(self, x_BLE, sigma_BL, layout, self_cond_BLE=None, ids_BL=None, table_VE=None):
        answer = self.inner.live(x_BLE, sigma_BL, layout, self_cond_BLE, ids_BL, table_VE)
        self.seen.append(Seen(x_BLE.clone(), sigma_BL.clone(), answer.live_BL, answer.logits_NV.clone()))
        return answer


def network(ids, x_LE, sigma_L, self_cond_LE=None, block=None, stream=None):
    """Log-probabilities [L, V] of one row alone, without what is never written in it."""
    start = [i == 0 and t == BOS for i, t in enumerate(ids)]
    block = block or [int(not s) for s in start]
    stream = stream or [CLEAN if s else NOISY for s in start]
    layout = Layout(*(torch.tensor([t]) for t in ([1] * len(ids), list(range(len(ids))), block, stream)))
    self_cond = None if self_cond_LE is None else self_cond_LE[None]
    logits_LV = make_lm().denoiser(x_LE[None], sigma_L[None], layout, self_cond)[0].double()
    logits_LV[:, [BOS, PAD]] = -torch.inf
    return logits_LV


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_of_a_network_by_hand(steps):
    """Rows of several lengths in one batch; the estimate of a step is fed to the next; ``</s>`` at the end is known."""
    lm, rows = make_lm(), some_rows()
    table_VE = lm.denoiser.embedding.table()
    for index, ids in enumerate(rows):
        shown = Shown(lm.denoiser)
        batch, _ = one_batch([ids])
        priced = cost(shown, batch, "uniform", steps, 5, lm.schedule)
        given = torch.tensor([(i == 0 and t == BOS) or t == EOS for i, t in enumerate(ids)])
        states = [(one.x_BLE[0], one.sigma_BL[0]) for one in shown.seen]
        assert len(states) == steps
        nats, self_cond_LE = 0.0, None
        for k, (x_LE, sigma_L) in enumerate(states):
            logits_LV = network(ids, x_LE, sigma_L, self_cond_LE)
            if EOS in ids:
                logits_LV[:, EOS] = -torch.inf
            log_LV = logits_LV.log_softmax(-1)
            self_cond_LE = torch.where(given[:, None], 0.0, log_LV.exp().float() @ table_VE)
            for i in (~given).nonzero()[:, 0].tolist():
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


def test_token_by_token_of_a_network_by_hand():
    """Through the cache of keys and values, in a batch of rows that go at their own pace; ``</s>`` may be written."""
    lm, rows = make_lm(), some_rows()
    table_VE = lm.denoiser.embedding.table()
    batch, line_B = one_batch(rows)
    priced = cost(lm.denoiser, batch, "blocks:1", 1, 0, lm.schedule)
    for line, index in enumerate(line_B.tolist()):
        ids, nats = rows[index], 0.0
        first = int(ids[0] == BOS)
        for place in range(first, len(ids)):
            x_LE = table_VE[torch.tensor(ids[: place + 1])].clone()
            x_LE[place] = 0
            sigma_L = torch.tensor([0.0] * place + [math.inf])
            block = [i + 1 - first for i in range(place + 1)]
            logits_LV = network(ids[: place + 1], x_LE, sigma_L, None, block, [CLEAN] * place + [NOISY])
            nats -= float(logits_LV[place].log_softmax(-1)[ids[place]])
        assert float(total(priced)[line]) == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_costs_the_same_whatever_its_neighbours(path):
    """Random numbers belong to the row's number; paths that write whole tokens in an order of their own have none."""
    lm, rows = make_lm(), some_rows()
    batch, line_B = one_batch(rows)
    together = total(cost(lm.denoiser, batch, path, 9, 1, lm.schedule))
    first = line_B.tolist().index(0)
    alone, _ = one_batch(rows[:1])
    found = total(cost(lm.denoiser, alone, path, 9, 1, lm.schedule))
    assert float(found) == pytest.approx(float(together[first]), rel=1e-4)
    other = total(cost(lm.denoiser, alone, path, 9, 2, lm.schedule))
    assert (float(other) == pytest.approx(float(found), rel=1e-6)) == (path in ("blocks:1", "surest", "bounded:0.5"))


def test_in_blocks_the_end_of_a_text_whose_length_is_known_is_not_paid_for_twice():
    """Texts of 1 to 4 tokens: earlier blocks do not see ``</s>``, and the bound still is the limit of the walk."""
    law, exact, batch, text = drawn((1, 4), 1500)
    nats_N = law.closed_nats_M[text]
    limit, walked = (
        excess(priced, nats_N)
        for priced in (
            bound(exact, SCHEDULE, batch, make_path("blocks:2"), 16, 0, 1),
            cost(exact, batch, "blocks:2", 96),
        )
    )
    assert abs(limit[0]) < 4 * limit[1] + 0.01 and abs(walked[0]) < 4 * walked[1] + 0.05

"""The price of a trajectory: every step again by hand, densities written out, and the states that it goes through."""

import math
from itertools import pairwise

import pytest
import torch

from .exact import F64, SCHEDULE, Exact, make_law, one_batch

pytestmark = pytest.mark.usefixtures("no_grad")


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
    [("uniform", 2, 2), ("ramp:0.5", 4, 4), ("shuffled", 2, 2), ("confidence", 5, None), ("entropy", 5, 5)],
)
def test_the_cost_of_a_trajectory_is_its_density_ratio(cost, path, steps, evaluations):
    """The states that the model was shown, and the two densities of every step between them, in float64."""
    law = make_law(tokens=3, lengths=(4, 4))
    exact = Exact(law)
    table_VE = exact.embedding.table().double()
    for m in (3, 70):
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


def test_the_states_are_those_of_the_forward_process(cost):
    """Increments of evidence are normal with mean dtau e and variance dtau, each apart from those before it."""
    law = make_law(lengths=(1, 1))
    exact = Exact(law)
    text = law.texts[2]
    batch, _ = one_batch([text] * 2000)
    cost(exact, batch, "uniform", 4)
    e_E = exact.embedding.table()[text[1]].double()
    y_BE, tau, normal = torch.zeros(2000, 8, dtype=F64), 0.0, []
    for k, one in enumerate(exact.seen[1:], 1):
        sigma = float(one.sigma_BL[0, 1])
        assert sigma == pytest.approx(float(SCHEDULE.sigma(torch.tensor(1 - k / 4, dtype=F64))))
        new_BE, new = one.x_BLE[:, 1].double() / sigma**2, sigma**-2
        normal.append((new_BE - y_BE - (new - tau) * e_E) / math.sqrt(new - tau))
        y_BE, tau = new_BE, new
    normal_BN = torch.cat(normal, 1)
    assert len(exact.seen) == 4
    assert float(normal_BN.mean(0).abs().max()) < 4.5 / 2000**0.5
    assert float((normal_BN.T.cov() - torch.eye(24)).abs().max()) < 5 * math.sqrt(2 / 2000)

"""The price of a finite number of steps: an enumerable law with its exact posterior, and every step again by hand."""

import math
from functools import cache
from itertools import combinations, pairwise, permutations

import pytest
import torch

from scorelm.evaluation.likelihood import bound
from scorelm.noise.schedule import Log
from scorelm.sampling.evaluator import Network
from scorelm.sampling.loop import generate
from scorelm.sampling.paths import make_path

from ..conftest import SPECIAL
from .exact import BOS, EOS, F64, PAD, REAL, SCHEDULE, Exact, excess, fast, make_law, one_batch, rows_of, total

pytestmark = pytest.mark.usefixtures("no_grad")
PATHS = ["uniform", "ramp:0.5", "blocks:1", "blocks:2", "shuffled", "confidence", "entropy", "surest", "bounded:0.5"]


@cache
def drawn(lengths=(3, 3), count=400):
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


# --- what is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", fast(1, 3, of=[1, 3, 20]))
@pytest.mark.parametrize("path", PATHS)
def test_a_lone_token_costs_its_nll_on_every_trajectory(cost, path, steps):
    """By Bayes' rule along the trajectory, whatever the noise was: not only on average."""
    law, exact, batch, line_B = every_text((1, 1))
    for seed in (0, 1):
        found_B = total(cost(exact, batch, path, steps, seed))
        torch.testing.assert_close(found_B, law.nats_M[line_B], rtol=2e-5, atol=2e-4)
    found_B = total(cost(exact, batch, path, steps, 0, Log(0.5, 8.0)))  # nor on the levels
    torch.testing.assert_close(found_B, law.nats_M[line_B], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("tells_next_token", [False, True])
@pytest.mark.parametrize(("lengths", "steps"), [((1, 4), 1), ((1, 4), 10), ((3, 3), 3)])
def test_token_by_token_costs_the_nll_of_every_text(cost, lengths, steps, tells_next_token):
    """In blocks of one each token is alone; ``</s>`` is among them, so that the length is priced."""
    law, _, batch, line_B = every_text(lengths)
    exact = Exact(law, tells_next_token=tells_next_token)
    priced = cost(exact, batch, "blocks:1", steps)
    blank = any((seen.sigma_BL.isinf() & seen.open_BL).any() for seen in exact.seen)
    assert (
        blank != tells_next_token
    )  # a position without evidence is read in the one case, and the one before in the other
    torch.testing.assert_close(total(priced), law.nats_M[line_B], rtol=2e-5, atol=5e-4)
    tokens_B = law.length_M[line_B] - 1  # all but <s>
    assert priced.evaluations.tolist() == tokens_B.clamp(min=steps).tolist()


@pytest.mark.parametrize("steps", [4, 11])
@pytest.mark.parametrize("path", ["shuffled", "surest", "bounded:0"])
def test_one_token_a_step_costs_the_nll_given_the_length_in_any_order(cost, path, steps):
    """Even in an order that the posterior chooses on the way."""
    law, exact, batch, line_B = every_text((1, 4))
    priced = cost(exact, batch, path, steps)
    torch.testing.assert_close(total(priced), law.closed_nats_M[line_B], rtol=2e-5, atol=2e-5)
    assert priced.evaluations.tolist() == (law.length_M[line_B] - 2).tolist()


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "shuffled", "confidence", "entropy", "surest", "bounded:0.5"])
def test_one_step_costs_the_marginals(cost, path):
    law, exact, batch, line_B = every_text((1, 3))
    expected_M = torch.tensor(
        [sum(law.conditional(m, i, []) for i in range(1, len(text) - 1)) for m, text in enumerate(law.texts)]
    )
    found_B = total(cost(exact, batch, path, 1))
    torch.testing.assert_close(found_B, expected_M[line_B].double(), rtol=1e-5, atol=1e-5)


def test_half_of_the_tokens_a_step_costs_the_mean_over_all_halves(cost):
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


def test_blocks_in_a_step_each_cost_their_marginals_after_clean_blocks(cost):
    """A block sees the clean blocks before it and what is given in itself, and ``</s>`` is never written.

    The cache of finished blocks gets its due: the posterior knows them by their keys only.
    """
    law, exact, batch, line_B = every_text((1, 4))
    found_B = total(cost(exact, batch, "blocks:2", 1))
    for line, m in list(enumerate(line_B.tolist()))[::8]:
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

SOFT = ["uniform", "ramp:0.5", "blocks:2", "confidence", "entropy"]


@pytest.mark.parametrize("path", fast("uniform", of=SOFT))
def test_more_steps_cost_less_down_to_the_entropy(cost, path):
    """Strongly dependent tokens: nothing below the entropy, a fall with the steps, and next to nothing left at many.

    The standard error is 0.04 in a few steps and 0.02 in many, of a fall by 0.3 or more.
    """
    law, exact, batch, text_B = drawn()
    found = [excess(cost(exact, batch, path, steps, seed=3), law.nats_M[text_B]) for steps in (2, 8, 48)]
    assert found[0][0] > 0.4
    for (before, error), (after, other) in pairwise(found):
        assert before - after > 4 * math.hypot(error, other) or after < 0.1
    assert found[1][0] > 0.1
    for more, error in found:
        assert more > -4 * error
    more, error = found[-1]
    assert error < 0.03 and more < 4 * error + 0.05


@pytest.mark.thorough
@pytest.mark.parametrize("path", ["ramp:0.5", "blocks:2", "entropy"])
def test_another_laws_posterior_costs_its_cross_entropy(cost, path):
    """At many steps; a changed transition, so the divergence is what it costs more."""
    law, _, batch, text_B = drawn()
    other = make_law(lengths=(3, 3), strength=0.5, seed=4)
    divergence = law.mean(other.nats_M - law.nats_M)
    assert divergence > 0.5
    more, error = excess(cost(Exact(other), batch, path, 48), law.nats_M[text_B])
    assert error < 0.06
    assert divergence - 4 * error < more < divergence + 4 * error + 0.05


@pytest.mark.parametrize("path", fast("surest", of=["uniform", "blocks:2", "entropy", "surest", "bounded:0"]))
def test_a_tempered_posterior_costs_more(cost, path):
    """Text by text, by the same noise.

    Above a bound of 0, a posterior that is less sure is worth more steps, which may cost less.
    """
    law, exact, batch, _ = drawn()
    steps = 3 if path in ("surest", "bounded:0") else 24
    wrong_B, right_B = (total(cost(d, batch, path, steps)) for d in (Exact(law, sharpness=0.7), exact))
    more_B = wrong_B - right_B
    assert float(more_B.mean()) > 0.02 + 2 * float(more_B.std()) / len(more_B) ** 0.5


@pytest.mark.parametrize("tells_next_token", [False, True])
def test_left_to_right_its_price_is_the_divergence_that_tempering_makes(cost, tells_next_token):
    """Token by token, in a step each."""
    law, _, batch, text_B = every_text()
    expected_M = torch.zeros(64, dtype=F64)
    for m, text in enumerate(law.texts):
        for place in range(1, 4):
            q_V = law.after(text[:place]) ** 0.7
            expected_M[m] -= (q_V[text[place]] / q_V.sum()).log()
    found_B = total(cost(Exact(law, sharpness=0.7, tells_next_token=tells_next_token), batch, "blocks:1", 1))
    torch.testing.assert_close(found_B, expected_M[text_B], rtol=1e-5, atol=1e-5)
    assert law.mean(expected_M - law.nats_M) > 0.03


def test_a_tempered_posterior_in_random_order_costs_the_mean_over_orders(cost):
    """Every row costs what one of the six orders costs, and all six come: 64 texts, 10 rows of each."""
    law = every_text()[0]
    expected_MO = torch.zeros(64, 6, dtype=F64)
    for m in range(64):
        for k, order in enumerate(permutations((1, 2, 3))):
            for at, place in enumerate(order):
                p_V = torch.zeros(law.vocab, dtype=F64)
                for n, text in enumerate(law.texts):
                    if all(text[i] == law.texts[m][i] for i in order[:at]):
                        p_V[text[place]] += law.p_M[n]
                q_V = (p_V / p_V.sum()) ** 0.7
                expected_MO[m, k] -= (q_V[law.texts[m][place]] / q_V.sum()).log()
    batch, line_B = one_batch(law.texts * 10)
    found_B = total(cost(Exact(law, sharpness=0.7), batch, "shuffled", 3))
    far_BO = (found_B[:, None] - expected_MO[line_B % 64]).abs()
    assert float(far_BO.amin(1).max()) < 1e-4
    assert torch.bincount(far_BO.argmin(1), minlength=6).min() > 0
    difference = found_B - expected_MO.mean(1)[line_B % 64]
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 640**0.5


@pytest.mark.thorough
@pytest.mark.parametrize("path", ["uniform", "confidence"])
def test_the_price_bounds_what_the_sampler_draws(loop_of, settings_of, cost, path):
    """Two steps over two dependent tokens: the law of 4,000 samples, and the price of the texts of the true law."""
    law = make_law(tokens=3, lengths=(2, 2))
    exact, drawn_M = Exact(law), torch.zeros(9, dtype=F64)
    for first in range(0, 4000, 250):
        *_, record = generate(
            loop_of(exact, SCHEDULE), [[BOS, None, None, EOS]] * 250, range(first, first + 250),
            settings_of(path=path, steps=2),
        )  # fmt: skip
        which_N = (record.ids_BL[:, 1] - REAL) * 3 + record.ids_BL[:, 2] - REAL
        drawn_M += torch.bincount(which_N, minlength=9) / 4000
    cross_entropy = law.mean(-drawn_M.log())
    assert cross_entropy > law.mean(law.nats_M) + 0.1  # two steps are too few
    batch, _ = one_batch(rows_of(law, 800)[0])
    price, error = excess(cost(exact, batch, path, 2), 0.0)
    assert cross_entropy + 0.05 < price - 2 * error
    assert price + 4 * error < excess(cost(exact, batch, path, 1), 0.0)[0]


@pytest.mark.thorough
def test_in_blocks_the_end_of_a_text_whose_length_is_known_is_not_paid_for_twice(cost):
    """Texts of 1 to 4 tokens: earlier blocks do not see ``</s>``, and the bound still is the limit of the walk.

    Paid for twice, the end would cost log 4 more, of which 500 texts see a tenth.
    """
    law, exact, batch, text = drawn((1, 4), 500)
    nats_N, network = law.closed_nats_M[text], Network(exact, SPECIAL)
    limit = excess(bound(network, SCHEDULE, batch, make_path("blocks:2"), 16, 0, 1), nats_N)
    walked = excess(cost(exact, batch, "blocks:2", 64), nats_N)
    assert limit[1] < 0.1 and walked[1] < 0.03
    assert abs(limit[0]) < 4 * limit[1] + 0.01 and abs(walked[0]) < 4 * walked[1] + 0.07

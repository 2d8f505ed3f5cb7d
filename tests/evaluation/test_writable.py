"""A price is over what can be written: the chances of all that can be add up to one."""

import pytest
import torch

from scorelm.evaluation.likelihood import bound, left_to_right, random_order, right_to_left
from scorelm.evaluation.rows import length_nats
from scorelm.evaluation.walk import walk
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.paths import make_path

from .exact import BOS, EOS, PAD, REAL, UNK, fast, one_batch, total
from .networks import VOCAB, make_model, network, some_rows

pytestmark = pytest.mark.usefixtures("no_grad")
SCORE, AUTOREGRESSIVE = OBJECTIVES["score"], OBJECTIVES["autoregressive"]


def every_text(closed):
    """All texts of two tokens that can be written; where the length is not known, what ends sooner or goes on too."""
    words = range(REAL, VOCAB)
    if closed:
        return [[BOS, a, b, EOS] for a in words for b in words]
    return [[BOS, EOS], *([BOS, a, b] for a in words for b in (EOS, *words))]


def test_left_to_right_the_chances_of_all_that_can_be_written_add_up_to_one():
    """``<unk>``, ``<pad>`` and ``<s>`` are never written, however likely the network finds them."""
    batch, _ = one_batch(every_text(closed=False))
    for objective in (SCORE, AUTOREGRESSIVE):
        found = total(left_to_right(objective, network(objective.name), batch))
        assert float((-found).exp().sum()) == pytest.approx(1, abs=1e-4)


ORDERS = [("reverse", 0), ("surest", 2), ("bounded:0", 2), ("bounded", 2)]


@pytest.mark.parametrize(("path", "steps"), fast(*ORDERS[::2], of=ORDERS))
def test_given_the_length_they_add_up_to_one(settings_of, path, steps):
    """Right to left, and in an order that the network chooses, one by one or several at once: exact, and no bound."""
    rows, sums = every_text(closed=True), 0.0
    loop = make_model().loop()
    for first in range(0, len(rows), 400):
        batch, _ = one_batch(rows[first : first + 400])
        if path == "reverse":
            priced = right_to_left(network(), batch, 1)
        else:
            priced = walk(loop, batch, settings_of(path=path, steps=steps), 0)
        sums += float((-total(priced)).exp().sum())
    assert sums == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("path", "steps"), fast(*ORDERS[::2], of=ORDERS))
def test_with_the_length_all_that_a_row_can_be_adds_up_to_one(settings_of, path, steps):
    """Rows of up to three tokens that begin with ``<s>``: they end, or are full and go on in the next row.

    A row that goes on has no ``</s>``, and whether a full row does is paid for. ``<s>`` alone is no row.
    """
    words, lengths = range(REAL, VOCAB), [0, 0, 4, 7]
    rows, sums = [[BOS, EOS], *([BOS, a, EOS] for a in words), *([BOS, a, b] for a in words for b in words)], 0.0
    loop = make_model().loop()
    for first in range(0, len(rows), 400):
        batch, line_B = one_batch(rows[first : first + 400])
        if path == "reverse":
            priced = right_to_left(network(), batch, 1)
        else:
            priced = walk(loop, batch, settings_of(path=path, steps=steps), 0)
        nats_B = total(priced) + length_nats(lengths, rows[first : first + 400])[line_B]
        sums += float((-nats_B).exp().sum())
    assert sums + 0.5 / (11 + 1.5) == pytest.approx(1, abs=1e-4)


def test_a_bound_rules_out_what_is_never_written():
    """At the last level and on the way: that a network prefers what is never written changes no price."""
    lm, rows = make_model(), some_rows()
    batch, _ = one_batch(rows)

    def prices():
        return [
            total(bound(network(), lm.schedule, batch, make_path("uniform"), 2, 0, 1)),
            total(random_order(network(), batch, 2, 0, 1)),
        ]

    before = prices()
    lm.denoiser.context.weight[[BOS, PAD, UNK]] += 5.0
    try:
        after = prices()
    finally:
        lm.denoiser.context.weight[[BOS, PAD, UNK]] -= 5.0
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

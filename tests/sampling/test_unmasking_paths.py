"""Paths of masked diffusion: MaskGIT's order, entropy-bounded unmasking and remasking, row by row by their definitions.

Also what a budget of nats does to the paths on information.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.noise.schedule import Log

from .walks import INF, World
from .walks import walk as walk_on

SCHEDULE = Log(0.1, 20.0)


def walk(text, free_BL, steps, entropy_BL=None, confidence_BL=None, nats=None, fall=1.0):
    """All levels of a path over positions whose entropies are multiplied by `fall` in every step."""
    world = World(
        None if entropy_BL is None else lambda sigma_BL, look: entropy_BL * fall**look,
        confidence=None if confidence_BL is None else lambda sigma_BL, look: confidence_BL,
    )
    return walk_on(text, free_BL, steps, SCHEDULE, world, nats)


free_rows = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4).map(torch.tensor)
numbers = st.integers(0, 2**31).map(lambda seed: torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=40, deadline=None)
@given(free_rows.filter(torch.any), numbers, st.integers(1, 9))
def test_surest_finishes_equally_many_a_step_in_the_order_of_confidence(free_BL, confidence_BL, steps):
    confidence_BL = confidence_BL[: len(free_BL)]
    levels = walk("surest", free_BL, steps, confidence_BL=confidence_BL)
    assert len(levels) == min(steps, int(free_BL.sum(1).max()))
    for k, sigma_BL in enumerate(levels, 1):
        for row, free in enumerate(free_BL):
            order = sorted(free.nonzero().squeeze(1).tolist(), key=lambda i: -float(confidence_BL[row, i]))
            own = max(1, min(steps, len(order)))
            left = len(order) * max(0, own - k) // own
            assert (sigma_BL[row] == INF).nonzero().squeeze(1).tolist() == sorted(order[len(order) - left :])


@settings(max_examples=40, deadline=None)
@given(free_rows, numbers, st.floats(0, 4), st.integers(1, 9))
def test_bounded_finishes_the_largest_prefix_within_gamma(free_BL, entropy_BL, gamma, steps):
    entropy_BL = entropy_BL[: len(free_BL)].double() * 2
    open_rows = [set(free.nonzero().squeeze(1).tolist()) for free in free_BL]
    levels = walk(f"bounded:{gamma!r}", free_BL, steps, entropy_BL=entropy_BL)
    for count, sigma_BL in enumerate(levels, 1):
        for row, still_open in enumerate(open_rows):
            order = sorted(still_open, key=lambda i: float(entropy_BL[row, i]))
            cost = [float(entropy_BL[row, order[:n]].sum() - entropy_BL[row, order[:n]].max()) for n in
                    range(1, len(order) + 1)]  # fmt: skip
            size = len(order) if count == steps else sum(c <= gamma + 1e-12 for c in cost)
            assert len(order) == 0 or size >= 1
            still_open -= set(order[:size])
            assert set((sigma_BL[row] > 0).nonzero().squeeze(1).tolist()) == still_open
    assert not any(open_rows) and len(levels) <= steps


@settings(max_examples=40, deadline=None)
@given(free_rows, numbers, st.integers(1, 9))
def test_bounded_without_a_number_spreads_the_entropy_that_is_left_over_the_steps_that_are_left(free_BL, h_BL, steps):
    h_BL = h_BL[: len(free_BL)].double() * 2
    open_rows = [set(free.nonzero().squeeze(1).tolist()) for free in free_BL]
    levels = walk("bounded", free_BL, steps, entropy_BL=h_BL)
    assert len(levels) <= steps
    for left, sigma_BL in zip(range(steps, 0, -1), levels, strict=False):
        for row, still_open in enumerate(open_rows):
            order = sorted(still_open, key=lambda i: float(h_BL[row, i]))
            budget = sum(float(h_BL[row, i]) for i in order) / left
            size = sum(sum(float(h_BL[row, i]) for i in order[:n]) <= budget + 1e-12 for n in range(len(order)))
            still_open -= set(order[: len(order) if left == 1 else size])
            assert set((sigma_BL[row] > 0).nonzero().squeeze(1).tolist()) == still_open
    assert not any(open_rows)


@settings(max_examples=40, deadline=None)
@given(free_rows, st.floats(0, 0.99), st.integers(1, 9))
def test_remasking_keeps_the_number_of_open_positions_and_takes_back_its_share(free_BL, share, steps):
    before_BL, taken = torch.where(free_BL, INF, 0.0), 0
    count_B = free_BL.sum(1)
    for k, sigma_BL in enumerate(walk(f"remask:{share!r}", free_BL, steps), 1):
        assert torch.equal((sigma_BL == INF).sum(1), count_B * (steps - k) // steps)
        back_BL = (sigma_BL > before_BL) & free_BL
        done_B = ((before_BL == 0) & free_BL).sum(1)
        assert (back_BL.sum(1) <= share * done_B).all()
        taken += int(back_BL.sum())
        before_BL = sigma_BL
    assert (before_BL == 0).all()
    assert share > 0 or not taken


def test_remasking_does_take_back():
    levels = walk("remask:0.5", torch.ones(2, 40, dtype=torch.bool), 10)
    assert sum(int((b > a).sum()) for a, b in pairwise(levels)) > 20


@pytest.mark.parametrize("path", ["confidence:0", "entropy"])
def test_a_budget_of_nats_sets_the_number_of_steps(path):
    """Entropies that fall by a tenth in each step, from 60 nats: with ever larger budgets, ever fewer steps."""
    free_BL, entropy_BL = torch.ones(1, 20, dtype=torch.bool), torch.full((1, 20), 3.0)
    counts = [len(walk(path, free_BL, 1000, entropy_BL, nats=nats, fall=0.9)) for nats in (1.0, 4.0, 16.0)]
    # an equal share of b nats finishes positions when 60 * 0.9^k <= b
    expected = [next(k for k in range(1000) if 60 * 0.9**k <= nats) + 1 for nats in (1.0, 4.0, 16.0)]
    assert counts == expected
    assert len(walk(path, free_BL, 3, entropy_BL, nats=1.0, fall=0.9)) == 3

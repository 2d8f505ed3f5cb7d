import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.config.recipe import Mixture
from scorelm.noise.levels import Uniform, draw_levels, free_place, ramp, runs
from scorelm.noise.schedule import make_schedule

INF = math.inf
SCHEDULE = make_schedule("linear", 16, 50, 1.0, 9.0)
KINDS = list(Mixture.model_fields)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(like, seed=0):
    return Uniform(torch.rand(6, *like.shape, dtype=torch.float64, generator=rng(seed)))


def only(kind):
    return Mixture(**{name: float(name == kind) for name in KINDS})


def rows_of(length, count):
    """One document, and one block, in each row."""
    return runs(torch.ones(count, length, dtype=torch.long))


def cut(length, size, count):
    """Documents of one row each, in blocks of `size`: (document, block, block numbers)."""
    block = (torch.arange(length) // size).expand(count, length)
    document = torch.ones(count, length, dtype=torch.long)
    return runs(document), runs(document, block), block


def levels(kind, document, block, seed=0, schedule=SCHEDULE):
    drawn = draw_levels(document, block, schedule, only(kind), uniform(block.first_BL, seed))
    assert drawn.sigma_BL.dtype == torch.float32 and drawn.sigma_BL.shape == block.first_BL.shape
    assert drawn.shared_BL.dtype == torch.bool and bool(drawn.shared_BL.all()) == (kind == "shared")
    assert bool(drawn.shared_BL.any()) == (kind == "shared")
    return drawn.sigma_BL


def kolmogorov(u):
    """Largest distance between the empirical law of u and the uniform one (star discrepancy)."""
    u = u.double().sort().values
    n = len(u)
    k = torch.arange(n, dtype=torch.float64)
    return float(torch.maximum(((k + 1) / n - u).max(), (u - k / n).max()))


def test_every_kind_is_a_pattern_of_its_own():
    """One that `draw_levels` left out would be drawn as another."""
    document, block, _ = cut(12, 6, 40)
    drawn = [levels(kind, document, block) for kind in KINDS]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_more_random_numbers_than_there_are_is_an_error_that_says_where_they_are_counted():
    numbers = Uniform(torch.rand(1, 2, 3, dtype=torch.float64))
    numbers.table()
    with pytest.raises(RuntimeError, match="`tables`"):
        numbers.table()


# --- draw_levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_draw(kind):
    document, block, _ = cut(12, 4, 6)
    assert torch.equal(levels(kind, document, block, seed=5), levels(kind, document, block, seed=5))
    assert not torch.equal(levels(kind, document, block, seed=5), levels(kind, document, block, seed=6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["log", "adaptive"])
def test_levels_are_in_range(kind, name):
    document, block, _ = cut(12, 4, 200)
    schedule = make_schedule(name, 32, 2048)
    sigma = levels(kind, document, block, schedule=schedule)
    finite = sigma[(sigma > 0) & (sigma < INF)]
    assert not sigma.isnan().any() and (sigma >= 0).all()
    assert (finite >= schedule.sigma_min * (1 - 1e-6)).all() and (finite <= schedule.sigma_max * (1 + 1e-6)).all()
    assert len(finite) == 0 if kind in ("absorbing", "ordered") else len(finite) > 0
    assert bool((sigma == 0).any()) == (kind in ("absorbing", "ordered", "prefix"))


def by_block(sigma, block):
    """Levels of blocks of equal size, [number of blocks, size]."""
    return sigma.view(int((block.offset_BL == 0).sum()), -1)


def test_shared_is_constant_in_a_block_and_differs_between_blocks():
    document, block, _ = cut(12, 4, 50)
    sigma = by_block(levels("shared", document, block), block)
    assert (sigma == sigma[:, :1]).all()
    assert len(sigma[:, 0].unique()) == len(sigma)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["shared", "prefix"])
def test_levels_have_low_discrepancy(kind, seed):
    document, block, _ = cut(8, 4, 500)
    u = SCHEDULE.u(by_block(levels(kind, document, block, seed), block)[:, -1].double())
    assert kolmogorov(u) < 0.004  # 1,000 independent draws: 0.027 on average
    assert kolmogorov(torch.rand(1000, generator=rng(seed))) > 0.01
    assert kolmogorov(u[:50]) < 0.06  # and so has every part of the batch


def test_levels_have_low_discrepancy_in_a_large_batch():
    run = rows_of(1, 2**19)
    u = SCHEDULE.u(levels("shared", run, run)[:, 0].double())
    assert kolmogorov(u) < 1e-4  # 2^19 independent draws: 1.2e-3


def test_offsets_of_the_sequence_are_uniform():
    """A single block's level is uniform over seeds, so that the loss is unbiased."""
    run = rows_of(2, 1)
    u = torch.stack([SCHEDULE.u(levels("shared", run, run, seed)[0, :1].double()) for seed in range(600)])
    assert kolmogorov(u.flatten()) < 1.63 / math.sqrt(600)  # 1%


@pytest.mark.parametrize("kind", ["absorbing", "ordered", "prefix"])
def test_number_of_clean_positions_is_uniform_and_never_all(kind):
    document, block, _ = cut(10, 5, 10_000)
    clean = (by_block(levels(kind, document, block), block) == 0).sum(1)
    counts = torch.bincount(clean, minlength=5).double()
    assert len(counts) == 5
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 25  # 4 degrees of freedom


def test_absorbing_is_all_or_nothing_over_every_subset():
    document, block, _ = cut(10, 5, 10_000)
    sigma = by_block(levels("absorbing", document, block), block)
    assert ((sigma == 0) | (sigma == INF)).all() and (sigma == INF).any(1).all()
    two = (sigma == 0)[(sigma == 0).sum(1) == 2]
    counts = Counter(map(tuple, two.tolist()))
    expected = len(two) / 10
    assert len(counts) == 10 and sum((c - expected) ** 2 / expected for c in counts.values()) < 35


def test_ordered_is_a_clean_prefix_then_no_evidence():
    document, block, _ = cut(10, 5, 300)
    sigma = by_block(levels("ordered", document, block), block)
    assert ((sigma == 0) | (sigma == INF)).all()
    assert (sigma.isinf().long().diff(dim=1) >= 0).all() and (sigma[:, -1] == INF).all()


def test_prefix_is_a_clean_prefix_then_one_level():
    document, block, _ = cut(10, 5, 300)
    sigma = by_block(levels("prefix", document, block), block)
    assert torch.isfinite(sigma).all() and (sigma[:, -1] > 0).all()
    assert ((sigma == 0) | (sigma == sigma[:, -1:])).all()
    assert ((sigma > 0).long().diff(dim=1) >= 0).all()


def test_ramp_rises_over_positions_of_a_block():
    document, block, _ = cut(24, 12, 500)
    u = SCHEDULE.u(by_block(levels("ramp", document, block), block).double())
    assert (u.diff(dim=1) >= -1e-6).all()
    slopes = set()
    for row in u[((u > 1e-6) & (u < 1 - 1e-6)).sum(1) >= 3]:
        inner = row[(row > 1e-6) & (row < 1 - 1e-6)].diff() * 11
        assert float(inner.max() - inner.min()) < 1e-4  # a line
        slopes.add(round(float(inner.mean()), 3))
    assert slopes == {0.1, 0.25, 0.5, 1.0, 2.0, 4.0}


def test_ramp_leaves_a_lone_position_as_much_to_learn_as_shared():
    """In blocks of one token a ramp has no slope: its level should be spread over [0, 1], not pile up at an end."""
    run = rows_of(1, 2000)
    u = SCHEDULE.u(levels("ramp", run, run)[:, 0].double())
    assert float((u < 1e-6).double().mean()) < 0.1 and float((u > 1 - 1e-6).double().mean()) < 0.1


def test_spread_is_centred_on_the_block():
    document, block, _ = cut(400, 400, 300)
    u = SCHEDULE.u(by_block(levels("spread", document, block), block).double())
    inside = u[(u.min(1).values > 1e-6) & (u.max(1).values < 1 - 1e-6)]
    width = inside.max(1).values - inside.min(1).values
    assert len(inside) > 50 and width.max() <= 1 + 1e-9
    assert kolmogorov(width / width.max()) < 0.35  # widths vary: some narrow, some wide
    centred = (inside - inside.mean(1, keepdim=True)) / width[:, None]
    assert kolmogorov((centred + 0.5).flatten().clamp(0, 1)) < 0.02  # uniform around the centre
    # The same seed draws the same centres for `shared`: the spread is around them, to the sides alike.
    centre = SCHEDULE.u(by_block(levels("shared", document, block), block)[:, 0].double())
    centre = centre[(u.min(1).values > 1e-6) & (u.max(1).values < 1 - 1e-6)]
    assert centre.std() > 0.1
    assert ((inside.mean(1) - centre).abs() < 5 * width / math.sqrt(12 * 400)).all()


def test_independent_is_uniform_in_u_and_independent():
    document, block, _ = cut(20, 10, 500)
    u = SCHEDULE.u(levels("independent", document, block).double())
    assert kolmogorov(u.flatten()) < 1.95 / math.sqrt(u.numel())  # 0.1%
    neighbours = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.04


def test_mixture_draws_kinds_per_document_by_weight():
    document, block, _ = cut(12, 4, 20_000)
    weights = {"shared": 3.0, "absorbing": 1.0}
    mixture = Mixture(**({name: 0.0 for name in KINDS} | weights))
    drawn = draw_levels(document, block, SCHEDULE, mixture, uniform(block.first_BL))
    assert float(drawn.shared_BL.double().mean()) == pytest.approx(0.75, abs=0.015)
    assert (drawn.shared_BL == drawn.shared_BL[:, :1]).all()  # one kind for all blocks of a document
    finite = torch.isfinite(drawn.sigma_BL) & (drawn.sigma_BL > 0)
    assert torch.equal(finite, drawn.shared_BL)


def test_blocks_of_a_document_have_their_own_levels():
    document, block, number = cut(12, 4, 2000)
    sigma = levels("shared", document, block)
    first, second = sigma[number == 0].view(2000, 4)[:, 0], sigma[number == 1].view(2000, 4)[:, 0]
    assert (first != second).all()


# --- ramp and free_place ----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(s=st.floats(0, 1), place=st.floats(0, 1), slope=st.floats(0, 1e6), earlier=st.floats(0, 1), less=st.floats(0, 1))
def test_ramp_is_monotone_and_exact_at_the_ends(s, place, slope, earlier, less):
    def at(s, place):
        return float(ramp(torch.tensor(s, dtype=torch.float64), torch.tensor(place, dtype=torch.float64), slope))

    assert at(1.0, place) == pytest.approx(1, abs=1e-9 * (1 + slope)) and at(0.0, place) == 0
    assert 0 <= at(s, place) <= 1
    assert at(s, place * earlier) <= at(s, place) and at(s * less, place) <= at(s, place)
    assert float(ramp(torch.tensor(s, dtype=torch.float64), torch.tensor(place).double(), 0.0)) == s


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
def test_free_place_against_a_loop(rows):
    place_BL = free_place(torch.tensor(rows))
    assert place_BL.dtype == torch.float64
    for row, free in enumerate(rows):
        places = [column for column, is_free in enumerate(free) if is_free]
        for rank, column in enumerate(places):
            assert float(place_BL[row, column]) == pytest.approx(rank / max(1, len(places) - 1), abs=1e-6)

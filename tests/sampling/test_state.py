"""The state of a generation: dense rows of the model, random numbers that belong to rows, and where they start."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.noise.forward import to_sigma
from scorelm.noise.schedule import Log
from scorelm.sampling.cache import finished_blocks
from scorelm.sampling.draws import RowDraws, generator, inverse_transform, shuffle
from scorelm.sampling.state import Budget, pack, start

from ..conftest import SPECIAL
from .steps import BOS, EOS, INF, records

F64 = torch.float64

# --- packing ----------------------------------------------------------------------------------------------------------


extents = st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any)


@settings(max_examples=120, deadline=None)
@given(extents=extents, spare=st.integers(0, 5))
@example(extents=[7], spare=0)
@example(extents=[0, 0, 3], spare=2)
@example(extents=[5, 5, 5], spare=0)
@example(extents=[1] * 12, spare=9)
def test_pack_places_every_position_once_and_in_order(extents, spare):
    length = max(extents) + spare
    index_RW = pack(extents, length)
    assert index_RW.dtype == torch.long and index_RW.shape[1] == max(extents)
    assert len(index_RW) <= sum(n > 0 for n in extents)
    placed = index_RW[index_RW >= 0].tolist()
    assert sorted(placed) == [row * length + column for row, n in enumerate(extents) for column in range(n)]
    assert (index_RW >= -1).all()
    where = {}
    for r, row in enumerate(index_RW.tolist()):
        used = [i for i in row if i >= 0]
        assert row == used + [-1] * (len(row) - len(used))  # padding is behind, and no row is empty
        assert used
        for place, i in enumerate(used):
            where.setdefault(i // length, []).append((r, place, i % length))
    for row, n in enumerate(extents):
        spots = where.get(row, [])
        assert len(spots) == n
        for column, (r, place, found) in enumerate(spots):  # one stretch, from its first column
            assert (r, place, found) == (spots[0][0], spots[0][1] + column, column)


@settings(max_examples=120, deadline=None)
@given(extents=extents)
def test_pack_wastes_no_row(extents):
    """No two rows would fit in one, so it is at most twice the rows that are needed."""
    used = (pack(extents, 20) >= 0).sum(1).tolist()
    width = max(extents)
    assert all(a + b > width for k, a in enumerate(used) for b in used[:k])
    assert len(used) <= max(1, 2 * math.ceil(sum(extents) / width) - 1)


def test_pack_by_hand():
    """Longest first, each in the fullest row that has room; in a row they stand in their own order."""
    assert pack([2, 5, 3], 6).tolist() == [[6, 7, 8, 9, 10], [0, 1, 12, 13, 14]]
    assert pack([1, 0, 1, 2], 3).tolist() == [[9, 10], [0, 6]]
    assert pack([4], 4).tolist() == [[0, 1, 2, 3]]


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 5, 2**31, 2**32 - 1])
def test_a_seed_below_2_to_the_32_gives_what_it_gave(seed):
    expected = torch.rand(4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.rand(4, generator=generator(seed)), expected)


def test_seeds_differ_beyond_32_bits():
    """Those that have their lowest 32 bits in common, and their highest."""
    seeds = [low + high for low in (0, 1, 7) for high in (0, 2**32, 2**33, 2**40, 2**62, 2**63 - 2**32)]
    first = {tuple(torch.rand(3, generator=generator(seed)).tolist()) for seed in seeds}
    assert len(first) == len(seeds)


def test_text_differs_beyond_32_bits(lm):
    written = [lm.generate(["the"], length=15, steps=4, seed=seed)[0] for seed in (0, 2**32, 1, 2**32 + 1, 2**63 - 2)]
    assert len({tuple(one.ids) for one in written}) == 5
    assert [one.seed for one in written] == [0, 2**32, 1, 2**32 + 1, 2**63 - 2]
    two = lm.generate(["the"], n=2, length=15, steps=4, seed=2**32)
    assert [one.seed for one in two] == [2**32, 2**32 + 1] and two[0].ids != two[1].ids


@pytest.mark.parametrize("seed", [-1, 2**63, 2**63 - 1, 1.5, "x"])
def test_a_seed_out_of_range_is_refused(lm, seed):
    """Two rows would need the seeds 2^63 - 1 and 2^63."""
    with pytest.raises(InputError, match="seed"):
        lm.generate(["the"], n=2, seed=seed)


# --- random numbers ---------------------------------------------------------------------------------------------------


def generators(*seeds):
    return [generator(seed) for seed in seeds]


masks = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(rows=masks.filter(lambda rows: any(map(any, rows))))
def test_a_rows_draws_are_its_own(rows):
    """Normals, tokens and order of a row are those that it gets alone, however many its neighbours ask for."""
    mask_BL = torch.tensor(rows)
    logits_NV = torch.randn(int(mask_BL.sum()), 5, generator=generator(1))
    row_N = mask_BL.nonzero()[:, 0]
    together = RowDraws(generators(*range(len(rows))), mask_BL, 3)
    normal_NE, token_N, second_NE = together.normal(), together.token(logits_NV), together.normal()
    rank_BL = shuffle(generators(*range(len(rows))), mask_BL)
    assert normal_NE.shape == second_NE.shape == (len(row_N), 3) and not torch.equal(normal_NE, second_NE)
    for row, mask in enumerate(rows):
        count = sum(mask)
        if not count:
            continue
        alone = RowDraws(generators(row), mask_BL[row : row + 1], 3)
        assert torch.equal(alone.normal(), normal_NE[row_N == row])
        assert torch.equal(alone.token(logits_NV[row_N == row]), token_N[row_N == row])
        assert torch.equal(alone.normal(), second_NE[row_N == row])
        own = rank_BL[row][mask_BL[row]]
        assert sorted(own.tolist()) == list(range(count))
        assert torch.equal(shuffle(generators(row), mask_BL[row : row + 1])[0][mask_BL[row]], own)


def test_tokens_have_the_law_of_their_logits():
    """Chi-square at 0.1% of 40,000 draws, and what is ruled out is never drawn, first and last token included."""
    law_V = torch.tensor([0.0, 0.5, 0.001, 0.0, 0.299, 0.2, 0.0], dtype=F64)
    count = 40_000
    logits_NV = (law_V.log().float() - 3.0).expand(count, 7)
    found_N = RowDraws(generators(5), torch.ones(1, count, dtype=torch.bool), 2).token(logits_NV)
    share_V = torch.bincount(found_N, minlength=7) / count
    alive_V = law_V > 0
    assert (share_V[~alive_V] == 0).all()
    assert count * float(((share_V - law_V)[alive_V] ** 2 / law_V[alive_V]).sum()) < 16.3


def test_each_position_draws_from_its_own_logits():
    sure_NV = torch.full((5, 5), -torch.inf).fill_diagonal_(0.0).flip(0)
    draws = RowDraws(generators(0, 1), torch.tensor([[True, False, True], [True, True, True]]), 2)
    assert draws.token(sure_NV).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("size", [5, 64, 150])
def test_draws_in_two_levels_are_the_inverse_transform(size):
    logits_NV = torch.randn(4000, size, generator=generator(size)) * 3
    logits_NV[:, size // 2 :: 3] = -torch.inf
    found_N = RowDraws(generators(1), torch.ones(1, 4000, dtype=torch.bool), 2).token(logits_NV)
    u_N = torch.rand(4000, dtype=F64, generator=generator(1))
    total_NV = logits_NV.double().softmax(-1).cumsum(-1)
    expected_N = (total_NV <= u_N[:, None] * total_NV[:, -1:]).sum(-1)
    assert (found_N != expected_N).sum() <= 1  # where u is within a rounding of a boundary
    assert logits_NV.gather(1, found_N[:, None]).isfinite().all()


def test_the_largest_u_draws_a_token_that_is_possible():
    weight_NC = torch.tensor([[0.3, 0.0, 0.7, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=F64)
    index_N, through_N = inverse_transform(weight_NC, torch.full((2,), 1 - 2.0**-53, dtype=F64))
    assert index_N.tolist() == [2, 0] and (through_N < 1).all()


def test_normals_are_standard_and_independent():
    x_NE = RowDraws(generators(3, 4), torch.ones(2, 10_000, dtype=torch.bool), 4).normal().double()
    both = torch.cat([x_NE[:10_000], x_NE[10_000:]], 1)  # of the two rows, side by side
    assert both.mean(0).abs().max() < 0.045
    assert (both.T.cov() - torch.eye(8, dtype=F64)).abs().max() < 0.06


def test_orders_are_uniform():
    """All six orders of three positions, 1,200 rows: chi-square, 0.1%."""
    free_BL = torch.tensor([[False, True, False, True, True]]).expand(1200, 5)
    rank_BL = shuffle(generators(*range(1200)), free_BL)
    assert (rank_BL[~free_BL] == 0).all()
    codes = rank_BL[:, 1] * 9 + rank_BL[:, 3] * 3 + rank_BL[:, 4]
    counts = torch.unique(codes, return_counts=True)[1]
    assert len(counts) == 6 and float(((counts - 200) ** 2 / 200).sum()) < 20.5


# --- the start --------------------------------------------------------------------------------------------------------


def test_the_start_is_given_or_nothing(lm):
    templates = [
        [BOS, 7, None, None, 9, None, EOS],
        [BOS, None, None, None, None, None, None, None, 12, EOS],
        [BOS, None, EOS],
        [BOS, 8, 9, 10, EOS],
    ]
    table_VE = lm.denoiser.embedding.table().detach()
    state = start(table_VE, templates, range(4), SPECIAL, 3, Budget(lm.schedule, 5))
    free, layout = state.free_BL, state.rows.layout
    assert torch.equal(state.sigma_BL == INF, free) and torch.equal(state.sigma_BL == 0, ~free)
    assert free.sum(1).tolist() == [3, 7, 1, 0]
    assert layout.segment_BL.sum(1).tolist() == [len(template) for template in templates]
    assert layout.block_BL[0].tolist() == [0, 2, 2, 2, 5, 5, 5, 8, 8, 8]
    assert state.real_BL.sum(1).tolist() == state.length_B.tolist() == [len(template) for template in templates]
    given = ~free & state.real_BL
    assert torch.equal(state.x_BLE[given], table_VE[state.ids_BL[given]]) and (state.x_BLE[free] == 0).all()
    assert state.rows.closed_B.all() and state.rows.prompt_BL.sum(1).tolist() == [2, 1, 0, 3]


def test_a_repair_starts_with_noise_on_what_is_given(lm):
    """But for the ends; the noise has the size of the level."""
    template = [BOS, *[7] * 400, EOS]
    table_VE = lm.denoiser.embedding.table().detach()
    state = start(table_VE, [template], [3], SPECIAL, 0, Budget(lm.schedule, 5, start=0.5))
    sigma = math.sqrt(0.7 * 20)
    assert state.free_BL.tolist() == [[False, *[True] * 400, False]]
    torch.testing.assert_close(state.sigma_BL[0], torch.tensor([0.0, *[sigma] * 400, 0.0]))
    noise = (state.x_BLE[0, 1:-1] - table_VE[7]) / sigma
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.04


def test_levels_are_the_schedules(lm):
    u = torch.tensor([[1.0, 0.999, 0.5, 1e-9, 0.0]], dtype=F64)
    sigma = to_sigma(u, Log(0.7, 20.0))
    expected = [INF, 0.7 * (20 / 0.7) ** 0.999, math.sqrt(0.7 * 20), 0.7, 0.0]
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma[0], torch.tensor(expected), rtol=1e-5, atol=0)
    sigmas = [float(record.sigma_BL[0, 1]) for record in records(lm, [[BOS, None, EOS]], steps=4)]
    assert sigmas == pytest.approx([0.7 * (20 / 0.7) ** u for u in (0.75, 0.5, 0.25)] + [0.0], rel=1e-5)


def test_blocks_without_noise_are_finished():
    block = torch.tensor([[0, 2, 2, 4, 4, 6]])
    sigma = torch.tensor([[0, 0, 0, 0, 1.0, INF]])
    assert finished_blocks(block, sigma).tolist() == [[True, True, True, False, False, False]]

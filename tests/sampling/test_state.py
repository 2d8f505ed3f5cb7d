"""The state of a generation: dense rows of the model, random numbers that belong to rows, and batches against one."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scorelm.sampling.generate import generate
from scorelm.sampling.options import Options
from torch import nn

from scorelm.config.recipe import ModelConfig
from scorelm.lm import ScoreLM
from scorelm.noise.schedule import Log
from scorelm.sampling.guidance import Guidance
from scorelm.sampling.halting import entropy_of
from scorelm.sampling.paths import make_path
from scorelm.sampling.solvers import make_solver
from scorelm.sampling.state import RowDraws, inverse_transform, pack, shuffle
from scorelm.text.sentencepiece import BOS, EOS, PAD, UNK, Tokenizer

F64, VOCAB = torch.float64, 50
LINES = [
    "in the beginning god created the heaven and the earth",
    "and the earth was without form and void",
    "and god said let there be light and there was light",
    "he called the light day and the darkness night 12",
] * 5


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(LINES, VOCAB, byte_fallback=False)
    config = ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=16)
    lm = ScoreLM(config, tokenizer, Log(0.7, 20.0), [0] * 5 + [1] * 40)
    for parameter in lm.denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(lm.denoiser.context.weight, std=0.5)
    return lm.eval()


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
        for column, (r, place, found) in enumerate(spots):
            assert (r, place, found) == (
                spots[0][0],
                spots[0][1] + column,
                column,
            )  # one stretch, from its first column


@settings(max_examples=120, deadline=None)
@given(extents=extents)
def test_pack_wastes_no_row(extents):
    """No two rows would fit in one, so it is at most twice the rows that are needed."""
    used = (pack(extents, 20) >= 0).sum(1).tolist()
    width = max(extents)
    assert all(a + b > width for k, a in enumerate(used) for b in used[:k])
    assert len(used) <= max(1, 2 * math.ceil(sum(extents) / width) - 1)


def test_pack_by_hand():
    """Longest first, each where it first fits."""
    assert pack([2, 5, 3], 6).tolist() == [[6, 7, 8, 9, 10], [12, 13, 14, 0, 1]]
    assert pack([1, 0, 1, 2], 3).tolist() == [[9, 10], [0, 6]]
    assert pack([4], 4).tolist() == [[0, 1, 2, 3]]


# --- random numbers ---------------------------------------------------------------------------------------------------


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


masks = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(rows=masks.filter(lambda rows: any(map(any, rows))))
def test_a_rows_draws_are_its_own(rows):
    """Normals, tokens and order of a row are those that it gets alone, however many its neighbours ask for."""
    mask_BL = torch.tensor(rows)
    logits_NV = torch.randn(int(mask_BL.sum()), 5, generator=torch.Generator().manual_seed(1))
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
        assert sorted(rank_BL[row][mask_BL[row]].tolist()) == list(range(count))
        assert torch.equal(
            shuffle(generators(row), mask_BL[row : row + 1])[0][mask_BL[row]], rank_BL[row][mask_BL[row]]
        )


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


# --- a batch is its rows ----------------------------------------------------------------------------------------------


UNEVEN = [
    [BOS, None, EOS],
    [BOS, *[5, None] * 16, 9, EOS],
    [BOS, 7, 8, None, None, EOS],
    [BOS, *[None] * 12, EOS],
    [BOS, 11, 12, 13, 14, EOS],  # nothing to write
    [BOS, None, 9, EOS],
    [BOS, *range(4, 30), None, EOS],
]


def records(lm, templates, path, solver, steps, seeds, **guidance):
    chosen = Options(make_path(path), make_solver(solver), steps, Guidance(**guidance))
    return list(generate(lm.denoiser, lm.schedule, templates, seeds, chosen))


PATHS = ["uniform", "ramp:0.5", "blocks:3", "shuffled", "confidence", "entropy", "surest", "bounded:1", "remask:0.3"]


@pytest.mark.parametrize(
    ("path", "solver"),
    [*((path, "posterior") for path in PATHS)]
    + [(path, solver) for path in ("uniform", "blocks:3", "confidence") for solver in ("heun", "sde", "dpmpp_2m")],
)
def test_rows_of_very_different_lengths_are_each_row_alone(lm, path, solver):
    """Ids and evaluations, with rows that share a row of the model; levels and entropies as they are alone."""
    steps, seeds = 7, list(range(40, 47))
    together = records(lm, UNEVEN, path, solver, steps, seeds)
    for row, template in enumerate(UNEVEN):
        alone = records(lm, [template], path, solver, steps, seeds[row : row + 1])
        if None not in template:
            assert not alone and together[-1].nfe_B[row] == 0
            continue
        size = len(template)
        assert together[-1].ids_BL[row, :size].tolist() == alone[-1].ids_BL[0].tolist()
        assert (together[-1].ids_BL[row, size:] == PAD).all() and (together[-1].sigma_BL[row] == 0).all()
        assert int(together[-1].nfe_B[row]) == int(alone[-1].nfe_B[0])
        if path == "uniform":
            for one, many in zip(alone, together, strict=True):
                assert torch.equal(one.sigma_BL[0], many.sigma_BL[row, :size])
                assert torch.equal(one.ids_BL[0], many.ids_BL[row, :size])
                torch.testing.assert_close(one.entropy_BL[0], many.entropy_BL[row, :size], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [5, 64, 150])
def test_draws_in_two_levels_are_the_inverse_transform(size):
    logits_NV = torch.randn(4000, size, generator=torch.Generator().manual_seed(size)) * 3
    logits_NV[:, size // 2 :: 3] = -torch.inf
    found_N = RowDraws(generators(1), torch.ones(1, 4000, dtype=torch.bool), 2).token(logits_NV)
    u_N = torch.rand(4000, dtype=torch.float64, generator=generators(1)[0])
    total_NV = logits_NV.double().softmax(-1).cumsum(-1)
    expected_N = (total_NV <= u_N[:, None] * total_NV[:, -1:]).sum(-1)
    assert (found_N != expected_N).sum() <= 1  # where u is within a rounding of a boundary
    assert logits_NV.gather(1, found_N[:, None]).isfinite().all()


def test_the_largest_u_draws_a_token_that_is_possible():
    weight_NC = torch.tensor([[0.3, 0.0, 0.7, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    index_N, through_N = inverse_transform(weight_NC, torch.full((2,), 1 - 2.0**-53, dtype=torch.float64))
    assert index_N.tolist() == [2, 0] and (through_N < 1).all()


def test_entropy_is_that_of_the_distribution():
    logits_NV = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 50)[:, None]
    logits_NV[:, ::7] = -torch.inf
    p_NV = logits_NV.double().softmax(-1)
    torch.testing.assert_close(
        entropy_of(logits_NV, logits_NV.softmax(-1)).double(), torch.special.entr(p_NV).sum(-1), rtol=1e-4, atol=2e-5
    )


PROMPTS = ["", "the", "and god said let there be light", "in the beginning god created the heaven and the earth"]


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_of_prompts_is_the_same_requests_one_by_one(lm, path):
    longest = max(len(lm.tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert longest + 3 < lm.max_length
    for options in ({}, {"solver": "ancestral", "temperature": 0.8, "top_p": 0.95}):
        batch = lm.generate(PROMPTS, n=2, path=path, steps=7, seed=7, **options)
        assert len({len(one.ids) for one in batch}) > 2
        for k, one in enumerate(batch):
            alone = lm.generate([PROMPTS[k // 2]], path=path, steps=7, seed=7 + k, **options)
            assert alone == [one]  # text, ids, seed and evaluations
            assert not set(one.ids[1:-1]) & {BOS, EOS, PAD, UNK}


def test_open_and_closed_rows_share_the_model(lm):
    """Only a row that is open may write its end, wherever it stands in a row of the model; each is the row alone."""
    templates = [[BOS, 7, *[None] * 9], [BOS, *[None] * 3, EOS], [BOS, *[None] * 4], [BOS, *[None] * 6, EOS]] * 3
    prior = lm.denoiser.prior.detach().clone()
    with torch.no_grad():
        lm.denoiser.prior[EOS] += 6.0
    try:
        for path in ("uniform", "blocks:3"):
            together = records(lm, templates, path, "posterior", 4, range(12))[-1]
            for row, template in enumerate(templates):
                alone = records(lm, [template], path, "posterior", 4, [row])[-1]
                assert together.ids_BL[row, : len(template)].tolist() == alone.ids_BL[0].tolist()
                length = int(together.length_B[row])
                assert length == int(alone.length_B[0]) and int(together.nfe_B[row]) == int(alone.nfe_B[0])
                text = together.ids_BL[row, :length].tolist()
                assert EOS not in text[:-1]
                assert template[-1] is None or (length == len(template) and text[-1] == EOS)
            lengths = together.length_B.tolist()
            assert any(n < len(template) for n, template in zip(lengths, templates, strict=True))
    finally:
        with torch.no_grad():
            lm.denoiser.prior.copy_(prior)


def test_the_order_of_the_requests_does_not_matter(lm):
    """Packing sorts rows by length; nothing comes back in another row."""
    seeds = list(range(7))
    there = records(lm, UNEVEN, "uniform", "posterior", 5, seeds)[-1]
    back = records(lm, UNEVEN[::-1], "uniform", "posterior", 5, seeds[::-1])[-1]
    assert torch.equal(there.ids_BL, back.ids_BL.flip(0)) and torch.equal(there.nfe_B, back.nfe_B.flip(0))


def test_the_model_sees_dense_rows(lm):
    """The six rows that move, of up to 35 positions and 91 in all, stand in three rows of the model."""
    sizes = []

    def watch(module, args):
        sizes.append(tuple(args[1].shape))

    handle = lm.denoiser.trunk.register_forward_pre_hook(watch)
    try:
        records(lm, UNEVEN, "uniform", "posterior", 3, range(7))
    finally:
        handle.remove()
    assert [len(template) for template in UNEVEN if None in template] == [3, 35, 6, 14, 4, 29]
    assert sizes == [(3, 35)] * 3  # 35; 29 and 6; 14, 4 and 3


# --- a shuffled path --------------------------------------------------------------------------------------------------


def finishing_order(found, row, template):
    """The step at which each free position is finished."""
    free = [column for column, token in enumerate(template) if token is None]
    return [next(r.step for r in found if r.sigma_BL[row, column] == 0) for column in free]


@pytest.mark.parametrize("steps", [1, 4, 5, 12, 30])
def test_shuffled_finishes_equally_many_in_every_step(lm, steps):
    template = [BOS, *[None] * 12, EOS]
    found = records(lm, [template] * 3, "shuffled", "posterior", steps, [1, 2, 3])
    made = min(steps, 12)
    assert len(found) == made and found[-1].nfe_B.tolist() == [made] * 3
    orders = [finishing_order(found, row, template) for row in range(3)]
    for order in orders:
        counts = [order.count(step) for step in range(1, made + 1)]
        assert sum(counts) == 12 and max(counts) - min(counts) <= 1
    assert made == 1 or len({tuple(order) for order in orders}) == 3
    for record in found:
        assert torch.isin(record.sigma_BL, torch.tensor([0.0, math.inf])).all()  # at once


def test_the_order_is_the_rows_own(lm):
    """Reproducible from its seed, whatever its neighbours, and different for other seeds; given tokens have no turn."""
    templates = [[BOS, 5, *[None] * 7, EOS], [BOS, *[None] * 20, EOS], [BOS, None, 6, None, 7, None, None, None, EOS]]
    together = records(lm, templates, "shuffled", "posterior", 5, [8, 9, 8])
    orders = [finishing_order(together, row, template) for row, template in enumerate(templates)]
    for row, template in enumerate(templates):
        alone = records(lm, [template], "shuffled", "posterior", 5, [[8, 9, 8][row]])
        assert finishing_order(alone, 0, template) == orders[row]
    others = [records(lm, templates[:1], "shuffled", "posterior", 5, [seed]) for seed in range(10)]
    assert len({tuple(finishing_order(found, 0, templates[0])) for found in others}) > 5


def test_through_generate_a_shuffled_sample_can_be_had_again(lm):
    many = lm.generate(["the light"], n=4, path="shuffled", steps=6, length=16, seed=30)
    assert len({tuple(one.ids) for one in many}) == 4
    for one in many:
        assert lm.generate(["the light"], path="shuffled", steps=6, length=16, seed=one.seed) == [one]

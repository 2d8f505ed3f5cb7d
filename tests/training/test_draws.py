"""Noise levels as objectives draw them: blocks, given tokens, open positions, against loops and expectations."""

import math

import pytest
import torch

from scorelm.config.recipe import NoiseConfig, TrainingConfig
from scorelm.model.layout import CLEAN, NOISY
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch
from scorelm.training.step import concatenate, take_rows

from ..conftest import SPECIAL
from .batches import BOS, EOS, PAD, SCHEDULE, E, draw_noise, loss_of, noisy_draw, only, pack, rng, trained_like

INF = math.inf
SHARED = only("shared")


def halves(draw):
    length = draw.sigma_BS.shape[1] // 2
    return (draw.sigma_BS[:, :length], draw.sigma_BS[:, length:]), length


# --- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 4), (1, 4, 0)])
def test_two_streams_are_a_clean_and_a_noisy_copy(sizes):
    batch = pack(8)
    draw = draw_noise(batch, streams=2, block_sizes=sizes, hidden=0.5)
    (clean, noisy), length = halves(draw)
    assert length == batch.ids.shape[1]
    for half in (slice(None, length), slice(length, None)):
        assert torch.equal(draw.ids_BS[:, half], batch.ids)
        assert torch.equal(draw.layout.segment_BL[:, half], batch.segment)
        assert torch.equal(draw.layout.position_BL[:, half], batch.position)
    assert (draw.layout.stream_BL[:, :length] == CLEAN).all() and (draw.layout.stream_BL[:, length:] == NOISY).all()
    in_blocks = 0
    for row in range(8):
        for number in range(1, int(batch.segment[row].max()) + 1):
            where = batch.segment[row] == number
            first = int(batch.ids[row, where][0] == BOS)
            one, other = (block[where].tolist() for block in draw.layout.block_BL[row].view(2, -1))
            if not draw.asks_next_BS[row, :length][where].any():  # whole
                assert 0 in sizes and one == other == [0] * first + [1 + first] * (len(one) - first)
                continue
            in_blocks += 1
            assert one == [*[0] * first, *range(1 + first, 1 + len(one))]
            hidden = clean[row, where] > 0
            assert not hidden[:first].any() and (clean[row, where][hidden] == INF).all()
            assert (draw.asks_next_BS[row, :length][where][:-1] == ~hidden[:-1]).all()
            assert (noisy[row, where][first:] > 0).any()
    assert in_blocks > 5


def test_up_to_the_share_that_is_said_of_a_clean_copy_is_hidden():
    """The share of each document is uniform, so that 0.2 are on average."""
    batch = pack(1500)
    draw = draw_noise(batch, block_sizes=(1, 8), hidden=0.4)
    (clean, _), length = halves(draw)
    inner = (batch.segment > 0) & (batch.ids != BOS)
    assert torch.isin(clean, torch.tensor([0.0, INF])).all()
    assert (clean[~inner & (batch.segment > 0)] == 0).all()
    assert float((clean[inner] > 0).double().mean()) == pytest.approx(0.2, abs=0.01)
    pairs = inner[:, 1:] & inner[:, :-1] & (batch.segment[:, 1:] == batch.segment[:, :-1])
    both = ((clean[:, 1:] > 0) & (clean[:, :-1] > 0))[pairs].double().mean()
    assert float(both) == pytest.approx(0.4**2 / 3, abs=0.006)  # of independent positions with one share: E[share^2]
    assert not draw.shared_BS[:, :length].any()


def test_a_whole_document_is_noisy_in_both_copies_each_with_levels_of_its_own():
    """No block of it sees the clean copy of another, so that a clean copy would be computed for nothing."""
    batch = pack(400)
    draw = draw_noise(batch, streams=2, block_sizes=(0,), mixture=SHARED)
    inner = (batch.segment > 0) & (batch.ids != BOS)
    one, other = (sigma[inner] for sigma in halves(draw)[0])
    for sigma in (one, other):
        assert float((sigma == 0).double().mean()) == pytest.approx(0.31, abs=0.03)  # spans and ends
    noisy = (one > 0) & (other > 0)
    levels = torch.corrcoef(SCHEDULE.u(torch.stack([one[noisy], other[noisy]]).double()))
    assert abs(float(levels[0, 1])) < 0.1
    assert draw.shared_BS.all()


def test_one_stream_is_whole_documents_with_a_clean_start():
    batch = pack(8)
    draw = draw_noise(batch, streams=1)
    starts = batch.ids == BOS
    assert draw.sigma_BS.shape == batch.ids.shape
    begins = torch.stack([(starts & (batch.segment == number)).any(1) for number in range(batch.segment.max() + 1)], 1)
    assert torch.equal(draw.layout.block_BL, torch.where(starts, 0, 1 + begins.long().gather(1, batch.segment)))
    assert torch.equal(draw.layout.stream_BL[batch.segment > 0] == CLEAN, starts[batch.segment > 0])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_open_positions(streams, seed):
    batch = pack(16, seed)
    draw = draw_noise(batch, seed, streams=streams)
    live = 0
    for sigma_row, segment_row in zip(draw.level_BS.tolist(), draw.layout.segment_BL.tolist(), strict=True):
        live += sum(sigma > 0 and segment > 0 for sigma, segment in zip(sigma_row, segment_row, strict=True))
    assert draw.live == live == int(draw.open_BS.sum()) > 0
    assert draw.noisy == int(((draw.sigma_BS > 0) & (draw.sigma_BS < INF) & (draw.layout.segment_BL > 0)).sum()) > 0
    assert (draw.sigma_BS >= 0).all() and not draw.sigma_BS.isnan().any()
    assert (draw.sigma_BS[draw.ids_BS == BOS] == 0).all()  # <s> is always given


@pytest.mark.parametrize("objective", ["score", "masked", "autoregressive"])
def test_a_draw_of_some_rows_and_the_others_is_the_draw(objective):
    batch = pack(6)
    draw = draw_noise(batch, objective=objective).with_noise(E, rng(1))
    _, joined = concatenate([take_rows(batch, draw, rows) for rows in (slice(0, 2), slice(2, 6))])
    for name, whole in draw._asdict().items():
        part = getattr(joined, name)
        if name == "layout":
            assert all(torch.equal(a, b) for a, b in zip(part.marks, whole.marks, strict=True))
        else:
            assert torch.equal(part, whole) if isinstance(whole, torch.Tensor) else part == whole, name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_of_each_size_against_a_loop(size):
    batch = pack(8)
    draw = draw_noise(batch, block_sizes=(size,), mixture=SHARED)
    (_, sigma), length = halves(draw)
    block = draw.layout.block_BL[:, length:]
    for row in range(len(batch.ids)):
        for number in range(1, int(batch.segment[row].max()) + 1):
            where = (batch.segment[row] == number).nonzero().flatten().tolist()
            first = int(batch.ids[row, where[0]] == BOS)
            expected = [0] * first + [1 + first + k // size * size for k in range(len(where) - first)]
            assert block[row, where].tolist() == expected
            for one in set(expected) - {0}:
                levels = {float(sigma[row, w]) for w, b in zip(where, expected, strict=True) if b == one}
                assert len(levels) == 1 and levels != {0.0}  # one level, nothing given: spans are for whole documents


@pytest.mark.parametrize("objective", ["score", "masked", "autoregressive"])
@pytest.mark.parametrize("noise", [{}, {"streams": 1}, {"block_sizes": (0,)}, {"block_sizes": (0, 3), "hidden": 0.5}])
def test_an_objective_says_whether_it_asks_for_next_tokens(objective, noise):
    draw = draw_noise(pack(40), objective=objective, **noise)
    asked = draw.asks_next_BS is not None and bool(draw.asks_next_BS.any())
    assert OBJECTIVES[objective].asks_next(NoiseConfig(**noise)) == asked


def test_sizes_are_drawn_per_document():
    draw = draw_noise(pack(300), block_sizes=(1, 1, 1, 0))
    _, length = halves(draw)
    segment, block = draw.layout.segment_BL[:, length:], draw.layout.block_BL[:, length:]
    most = torch.stack([torch.where(segment == k, block, 0).amax(1) for k in (1, 2)], 1).flatten()
    whole = (most[most > 0] <= 2).double().mean()
    assert abs(float(whole) - 0.25) < 0.06


@pytest.mark.parametrize("streams", [1, 2])
def test_the_end_is_given_in_half_of_the_whole_documents(streams):
    batch = pack(800)
    draw = draw_noise(batch, streams=streams, block_sizes=(0,), given=0.0, mixture=SHARED)
    sigma = draw.sigma_BS[:, -batch.ids.shape[1] :]
    ends = batch.ids == EOS
    share = (sigma[ends] == 0).double().mean()
    assert abs(float(share) - 0.5) < 5 * 0.5 / math.sqrt(int(ends.sum()))
    others = (batch.segment > 0) & ~ends & (batch.ids != BOS)
    assert (sigma[others] > 0).all()


def test_the_end_is_not_given_in_blocks():
    batch = pack(100)
    draw = draw_noise(batch, block_sizes=(1, 2, 8), given=1.0, mixture=SHARED)
    (_, sigma), _ = halves(draw)
    real = (batch.segment > 0) & (batch.ids != BOS)
    assert (sigma[real] > 0).all()


@pytest.mark.parametrize("given", [0.0, 0.4, 1.0])
def test_spans_are_given_in_a_share_of_the_whole_documents(given):
    batch = pack(500)
    draw = draw_noise(batch, streams=1, given=given, mixture=SHARED)
    inner = (batch.segment > 0) & (batch.ids != BOS) & (batch.ids != EOS)
    clean = (draw.sigma_BS == 0) & inner

    def chance(k, n):
        """That position k of n is given: half of the spans are shuffled, the others of uniform length, then place."""
        covering = [min(k, n - size) - max(0, k - size + 1) + 1 for size in range(n + 1)]
        return 0.25 + 0.5 * sum(c / (n - size + 1) for size, c in enumerate(covering) if size) / (n + 1)

    chances = {n: [chance(k, n) for k in range(n)] for n in range(3, 11)}
    found, expected = float(clean.sum()), 0.0
    for row in range(len(batch.ids)):
        for number in range(1, int(batch.segment[row].max()) + 1):
            inside = inner[row, batch.segment[row] == number].tolist()
            expected += given * sum(p for p, real in zip(chances[len(inside)], inside, strict=True) if real)
    assert found == pytest.approx(expected, rel=0.1, abs=1e-9)


@pytest.mark.parametrize("objective", ["score", "masked"])
def test_every_table_of_random_numbers_decides_something(objective):
    learned, config, batch = OBJECTIVES[objective], NoiseConfig(hidden=0.5), pack(32)

    def draw(random_TBS):
        drawn = learned.draw(batch, config, SCHEDULE, SPECIAL, random_TBS)
        return torch.cat([drawn.sigma_BS, drawn.layout.block_BL])

    random_TBS = learned.random(batch, config, rng())
    for k in range(learned.tables):
        other_TBS = random_TBS.clone()
        other_TBS[k] = random_TBS[k].flip(0)
        assert not torch.equal(draw(other_TBS), draw(random_TBS))


@pytest.mark.parametrize("objective", ["score", "masked"])
def test_same_generator_same_draw(objective):
    batch = pack(6)
    one, two, other = (draw_noise(batch, seed, objective) for seed in (4, 4, 5))
    assert torch.equal(one.sigma_BS, two.sigma_BS) and torch.equal(one.layout.block_BL, two.layout.block_BL)
    assert not torch.equal(one.sigma_BS, other.sigma_BS)


# --- the peers --------------------------------------------------------------------------------------------------------


def test_every_token_but_the_first_is_a_target_of_an_autoregressive_model():
    batch = pack(8)
    draw = draw_noise(batch, objective="autoregressive")
    assert torch.equal(draw.open_BS, (batch.segment > 0) & (batch.ids != BOS))
    assert (draw.sigma_BS[draw.open_BS] == INF).all() and (draw.sigma_BS[~draw.open_BS] == 0).all()


def test_a_masked_draw_knows_no_noise_but_all_or_none_and_weighs_by_the_share_that_it_masks():
    """1 / t, over a share that is uniform on [0, 1] by documents, makes the mean weight of what is not given 1."""
    batch = pack(600)
    draw = draw_noise(batch, objective="masked")
    masked = draw.open_BS
    assert torch.isin(draw.sigma_BS, torch.tensor([0.0, INF])).all()
    assert not masked[batch.ids == BOS].any() and not masked[batch.segment == 0].any()
    ends = masked[batch.ids == EOS].double().mean()
    assert float(ends) == pytest.approx(0.25, abs=0.04)  # open half of the time, masked in half of these
    others = (batch.segment > 0) & (batch.ids != BOS) & (batch.ids != EOS)
    assert float(masked[others].double().mean()) == pytest.approx(0.5, abs=0.03)
    assert (draw.weight_BS[~masked] == 0).all() and (draw.weight_BS[masked] > 0).all()
    assert float(draw.weight_BS.sum()) / draw.live == pytest.approx(1, abs=0.1)


# --- nothing to learn from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["score", "masked", "autoregressive"])
def test_an_empty_batch_has_nothing_open_and_no_loss(objective):
    empty = Batch(torch.full((2, 6), PAD), torch.zeros(2, 6).long(), torch.zeros(2, 6).long())
    draw, denoiser = noisy_draw(empty, objective=objective), trained_like()
    assert draw.live == draw.noisy == 0
    outcome = loss_of(denoiser, draw, TrainingConfig(z_loss=1.0, likelihood_weight=1.0), objective=objective)
    outcome.loss.backward()
    assert outcome.loss.item() == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in denoiser.parameters())


def test_noise_is_standard_normal_and_of_its_generator():
    draw = draw_noise(pack(30))
    eps = draw.with_noise(E, rng(3)).eps_BSE
    assert eps.shape == (*draw.sigma_BS.shape, E) and torch.equal(eps, draw.with_noise(E, rng(3)).eps_BSE)
    assert abs(float(eps.mean())) < 5 / math.sqrt(eps.numel()) and float(eps.std()) == pytest.approx(1, abs=0.03)


# --- low discrepancy --------------------------------------------------------------------------------------------------


def equal_rows(count, documents=1, length=12):
    """Rows of so many documents of one length each."""
    place = torch.arange(documents * length).expand(count, -1)
    ids = torch.where(place % length == 0, BOS, 5)
    return Batch(ids, 1 + place // length, place % length)


def discrepancy(u):
    """Largest distance between the share of numbers below a number of [0, 1] and that number."""
    u, n = u.sort().values, len(u)
    return float(torch.maximum(torch.arange(1, n + 1) / n - u, u - torch.arange(n) / n).max())


@pytest.mark.parametrize("sizes", [(1,), (3,), (0,), (1, 0)])
def test_the_levels_that_are_used_are_spread_evenly(sizes):
    """Those of a clean copy, which nobody uses, take no place among them."""
    draw = draw_noise(equal_rows(200), mixture=SHARED, block_sizes=sizes, given=0.0)
    for sigma, block in zip(halves(draw)[0], draw.layout.block_BL.chunk(2, 1), strict=True):
        first = (block > 0) & (block != block.roll(1, 1)) & (sigma > 0) & (sigma < INF)
        u = SCHEDULE.u(sigma[first].double())
        assert len(u) == 0 or discrepancy(u) * len(u) < 4  # of 2,000 random numbers: 40


@pytest.mark.parametrize("documents", [1, 2, 4, 13, 17])
def test_the_levels_of_two_copies_of_a_document_are_independent(documents):
    """However many documents a row has: counts of correlated pairs would be far from equal."""
    batch = equal_rows(60, documents)
    draw = draw_noise(batch, mixture=SHARED, block_sizes=(0,), given=0.0)
    one, other = (SCHEDULE.u(sigma[batch.position == 1].double()) for sigma in halves(draw)[0])
    cells = torch.bincount((one * 4).long() * 4 + (other * 4).long(), minlength=16).double()
    expected = len(one) / 16
    assert float(((cells - expected) ** 2 / expected).sum()) < 25  # 15 degrees of freedom: 5%
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.2

"""Static paths against their definitions, in u and row by row."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.noise.schedule import Power
from scorelm.sampling.draws import generator, shuffle
from scorelm.sampling.paths import PATHS, make_path, ramp_path

from .walks import ADAPTIVE, INF, STATIC, begin, follow
from .walks import walk as walk_in_sigma

SCHEDULE = Power(1.0, 2.0, rho=1.0)  # sigma = 1 + u


def walk(text, free_BL, steps):
    """All levels u of a path, [K, B, L], for documents with <s> in column 0; and the blocks of their positions."""
    path, state = begin(text, free_BL, steps, SCHEDULE)
    found = list(follow(path, state))
    sigma = torch.stack(found) if found else torch.zeros(0, *free_BL.shape)
    u_KBL = torch.where(sigma == 0, 0.0, torch.where(sigma.isinf(), 1.0, sigma.double() - 1))
    return u_KBL, state.rows.layout.block_BL


masks = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
).map(lambda rows: torch.tensor(rows) & (torch.arange(len(rows[0])) > 0))  # fmt: skip


@pytest.mark.parametrize("text", STATIC)
@settings(max_examples=15, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 20))
def test_levels_fall_from_anywhere_to_nothing(text, free_BL, steps):
    u_KBL, _ = walk(text, free_BL, steps)
    assert ((u_KBL >= 0) & (u_KBL <= 1)).all()
    assert (u_KBL.diff(dim=0) <= 0).all()
    assert (u_KBL[:, ~free_BL] == 0).all()
    if free_BL.any():
        assert len(u_KBL) >= 1 and (u_KBL[-1] == 0).all()
        assert (u_KBL[0] < 1)[free_BL].any()  # the first evaluation is not wasted


@settings(max_examples=30, deadline=None)
@given(
    free_BL=masks.filter(lambda mask: (mask.sum(1) > 1).any()),
    steps=st.integers(1, 20),
    slope=st.sampled_from([0, 0.25, 1, 1e9]),
)
def test_ramps_take_the_steps_they_are_given(free_BL, steps, slope):
    """The last position of a row is on time; the others, and one that is alone in its row, are ahead of it."""
    assert len(walk(f"ramp:{slope}", free_BL, steps)[0]) == steps


@settings(max_examples=20, deadline=None)
@given(free_BL=masks.filter(torch.any), steps=st.integers(1, 20))
def test_uniform_is_equal_steps_and_ramp_of_slope_nothing(free_BL, steps):
    u_KBL, _ = walk("uniform", free_BL, steps)
    for k in range(steps):
        expected = torch.full((int(free_BL.sum()),), (steps - 1 - k) / steps, dtype=torch.float64)
        torch.testing.assert_close(u_KBL[k][free_BL], expected, rtol=0, atol=1e-6)
    assert torch.equal(u_KBL, walk("ramp:0", free_BL, steps)[0])


@pytest.mark.parametrize("slope", [0.1, 0.25, 1.0, 5.0])
def test_ramp_is_the_line_of_ar_diffusion(slope):
    """The first free position is `slope` of u ahead of the last, wherever neither is clipped."""
    free_BL = torch.tensor([[False, True, False, True, True, False, True, True, True]])
    steps, places = 50, [0, 1, 2, 3, 4, 5]
    u_KL = walk(f"ramp:{slope}", free_BL, steps)[0][:, 0][:, free_BL[0]]
    for k in range(steps):
        time = (steps - 1 - k) / steps
        for rank in places:
            line = time * (1 + slope) - slope * (1 - rank / 5)
            assert float(u_KL[k, rank]) == pytest.approx(min(1.0, max(0.0, line)), abs=1e-6)
    assert (u_KL.diff(dim=1) >= 0).all()


@settings(max_examples=25, deadline=None)
@given(free_BL=masks.filter(torch.any), exponent=st.integers(6, 300))
def test_a_very_steep_ramp_is_token_by_token_from_left_to_right(free_BL, exponent):
    count = int(free_BL.sum(1).max())
    u_KBL, _ = walk(f"ramp:1e{exponent}", free_BL, count)
    for row, free in enumerate(free_BL):
        u_KN = u_KBL[:, row, free]
        assert (((u_KN > 0) & (u_KN < 1)).sum(1) <= 1).all()  # at most one under way
        assert (u_KN.diff(dim=1) >= 0).all()  # from left to right
        if int(free.sum()) == count:
            assert ((u_KN == 0).sum(1) - torch.arange(1, count + 1) == 0).all()  # one finishes in every step


@settings(max_examples=60, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 30), size=st.sampled_from([1, 2, 3, 5, 100]))
def test_a_block_starts_when_the_one_before_is_finished(free_BL, steps, size):
    u_KBL, block_BL = walk(f"blocks:{size}", free_BL, steps)
    for row, (free, block) in enumerate(zip(free_BL, block_BL, strict=True)):
        for u_L in u_KBL[:, row]:
            per_block = [u_L[free & (block == b)] for b in block.unique().tolist()]
            per_block = [u for u in per_block if len(u)]
            assert all((u == u[0]).all() for u in per_block)  # one level in a block
            values = [float(u[0]) for u in per_block]
            running = [v for v in values if 0 < v < 1]
            assert len(running) <= 1 and values == sorted(values)


@settings(max_examples=40, deadline=None)
@given(free_BL=masks.filter(torch.any).map(lambda m: m[m.any(1)][:1]), steps=st.integers(1, 30), size=st.integers(1, 5))
def test_blocks_share_the_steps_out_evenly(free_BL, steps, size):
    u_KBL, block_BL = walk(f"blocks:{size}", free_BL, steps)
    numbers = block_BL[free_BL].unique().tolist()
    assert len(u_KBL) == max(steps, len(numbers))
    shares = []
    for number in numbers:
        mine = u_KBL[:, 0][:, free_BL[0] & (block_BL[0] == number)]
        waiting, finished = int((mine[:, 0] == 1).sum()), int((mine[:, 0] == 0).sum())
        assert waiting == sum(shares)  # it starts when those before it are finished
        shares.append(len(mine) - waiting - finished + 1)
        falling = [1 - (k + 1) / shares[-1] for k in range(shares[-1])]
        assert mine[waiting : waiting + shares[-1], 0].tolist() == pytest.approx(falling, abs=1e-6)
    assert max(shares) - min(shares) <= 1 and sum(shares) == len(u_KBL)


@settings(max_examples=40, deadline=None)
@given(free_BL=masks.filter(torch.any), steps=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_shuffled_gives_every_position_one_turn(free_BL, steps, seed):
    """From inf to 0 at once, in an order that is drawn once, as many in a step as in another, give or take one."""
    path, state = begin("shuffled", free_BL, steps, SCHEDULE)
    state.rows.generators[:] = [generator(seed + row) for row in range(len(free_BL))]
    twins = [generator(seed + row) for row in range(len(free_BL))]
    rank_BL, levels = shuffle(twins, free_BL), list(follow(path, state))
    for one, twin in zip(state.rows.generators, twins, strict=True):
        assert torch.equal(one.get_state(), twin.get_state())
    assert len(levels) <= steps
    levels = torch.stack([*levels, torch.zeros(free_BL.shape)])
    assert torch.isin(levels, torch.tensor([0.0, INF])).all() and (levels[:, ~free_BL] == 0).all()
    for row, free in enumerate(free_BL):
        count = int(free.sum())
        open_K = [count, *(levels[:, row] == INF).sum(1).tolist()][: steps + 1]
        each = [a - b for a, b in pairwise(open_K)]
        assert open_K[-1] == 0 and max(each) <= math.ceil(count / steps) and min(each) >= count // steps
        for sigma_L in levels[:, row]:
            open_ranks = rank_BL[row][free & (sigma_L == INF)]
            assert sorted(open_ranks.tolist()) == list(range(count - len(open_ranks), count))  # the last in order


@settings(max_examples=60, deadline=None)
@given(
    free_BL=masks,
    steps=st.integers(1, 30),
    text=st.sampled_from(["uniform", "ramp:0.5", "blocks:1", "blocks:2", "blocks:4"]),
)
def test_a_row_takes_the_same_steps_whatever_its_neighbours_are(free_BL, steps, text):
    def distinct(u_KL):
        kept = [torch.where(free_BL[row], 1.0, 0.0).double()]
        for u_L in u_KL:
            if not torch.equal(u_L, kept[-1]):
                kept.append(u_L)
        return torch.stack(kept)

    together, _ = walk(text, free_BL, steps)
    for row in range(len(free_BL)):
        alone, _ = walk(text, free_BL[row : row + 1], steps)
        expected, found = distinct(alone[:, 0]), distinct(together[:, row])
        assert expected.shape == found.shape and torch.equal(expected, found)


def test_nothing_free_is_nothing_to_do():
    for text in (*STATIC, *ADAPTIVE, "surest", "bounded", "remask"):
        assert walk_in_sigma(text, torch.zeros(2, 5, dtype=torch.bool), 4, SCHEDULE) == []


# --- how they are written ---------------------------------------------------------------------------------------------


def test_names_and_blocks():
    assert (str(make_path("uniform")), make_path("uniform").block) == ("uniform", 0)
    assert (str(make_path("ramp:0.25")), make_path("ramp:0.25").block) == ("ramp:0.25", 0)
    assert str(make_path("ramp")) == "ramp:0.25" and str(ramp_path(3.0)) == "ramp:3"
    assert (str(make_path("blocks:4")), make_path("blocks:4").block) == ("blocks:4", 4)
    assert make_path("blocks").block == 8
    assert [str(make_path(n)) for n in ("confidence", "entropy")] == ["confidence:0.1", "entropy:0"]
    assert [str(make_path(n)) for n in ("surest", "bounded", "remask")] == ["surest", "bounded", "remask:0.05"]


@pytest.mark.parametrize("text", [*PATHS, *STATIC, *ADAPTIVE, "bounded:0.5", "remask:0.2"])
def test_names_can_be_read_back(text):
    path = make_path(text)
    assert make_path(str(path)) == path


def test_what_a_path_says_of_itself():
    """What the loop, prices and models of other kinds ask."""
    assert {n for n in PATHS if make_path(n).adaptive} == {"confidence", "entropy", "surest", "bounded"}
    assert {n for n in PATHS if make_path(n).budgeted} == {"confidence", "entropy"}
    assert {n for n in PATHS if make_path(n).jumps} == {"shuffled", "surest", "bounded", "remask"}
    assert {n for n in PATHS if make_path(n).exact} == {"surest", "bounded"}
    assert {n for n in PATHS if make_path(n).forgets} == {"remask"}
    assert {n: make_path(n).slope for n in PATHS if make_path(n).slope is not None} == {
        "uniform": 0, "ramp": 0.25, "blocks": 0,
    }  # fmt: skip
    assert {n for n in PATHS if make_path(n).block} == {"blocks"}


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "blocks:1,2", "uniform:1", "shuffled:2", "surest:1", "sideways", "Uniform", " uniform",
        "uniform:3", "ramp:x", "ramp:0.5:1", "ramp:-0.1", "ramp:nan",
        "ramp:inf", "blocks:0", "blocks:-3", "blocks:2.5", "blocks:x", "blocks:nan", "blocks:inf", "blocks:1e400",
        "blocks:1e30", "bounded:-1", "bounded:nan", "bounded:inf", "remask:1", "remask:-0.1", "remask:nan",
    ],
)  # fmt: skip
def test_bad_paths_are_refused(text):
    with pytest.raises(InputError):
        make_path(text)


@pytest.mark.parametrize(
    "text", ["confidence:-1", "confidence:nan", "entropy:-0.1", "entropy:inf", "entropy:x", "confidence:1,2"]
)
def test_bad_thresholds_are_refused_in_one_line(text):
    with pytest.raises(InputError) as error:
        make_path(text)
    name, _, number = text.partition(":")
    assert name in str(error.value) and number in str(error.value) and "\n" not in str(error.value)


def test_errors_say_what_was_asked_and_what_there_is():
    with pytest.raises(InputError, match=r"'sideways'.*uniform.*ramp.*blocks"):
        make_path("sideways")
    with pytest.raises(InputError, match="'x' is not a number"):
        make_path("ramp:x")
    with pytest.raises(InputError, match=r"whole number.*2\.5"):
        make_path("blocks:2.5")
    with pytest.raises(InputError, match="whole number"):
        make_path("blocks:nan")

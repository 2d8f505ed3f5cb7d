import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.sampling.paths import make_path, ramp_path
from scorelm.noise.plan import Observation, Plan, free_place
from scorelm.noise.schedule import Power

SCHEDULE = Power(1.0, 2.0, rho=1.0)  # sigma = 1 + u
STATIC = [
    "shuffled",
    "uniform",
    "ramp",
    "ramp:0",
    "ramp:0.25",
    "ramp:1",
    "ramp:7",
    "ramp:1e9",
    "blocks",
    "blocks:1",
    "blocks:3",
]


def walk(text, free_BL, steps):
    """All levels u of a path, [K, B, L], for documents with <s> in column 0."""
    path = make_path(text)
    size = path.block or free_BL.shape[1]
    column = torch.arange(free_BL.shape[1]).expand_as(free_BL)
    block_BL = torch.where(column == 0, 0, 1 + (column - 1) // size)
    gen = torch.Generator().manual_seed(0)

    def shuffle():
        rank_BL = torch.zeros(free_BL.shape, dtype=torch.long)
        for row, free in enumerate(free_BL):
            rank_BL[row, free] = torch.randperm(int(free.sum()), generator=gen)
        return rank_BL

    def never() -> Observation:
        raise AssertionError("a static path does not look")

    found = list(path.levels(Plan(free_BL, block_BL, steps, SCHEDULE, never, shuffle)))
    sigma = torch.stack(found) if found else torch.zeros(0, *free_BL.shape)
    return torch.where(sigma == 0, 0.0, torch.where(sigma.isinf(), 1.0, sigma.double() - 1)), block_BL


masks = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
).map(lambda rows: torch.tensor(rows) & (torch.arange(len(rows[0])) > 0))  # fmt: skip


@pytest.mark.parametrize("text", STATIC)
@settings(max_examples=40, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 20))
def test_levels_fall_from_anywhere_to_nothing(text, free_BL, steps):
    u_KBL, _ = walk(text, free_BL, steps)
    assert u_KBL.dtype in (torch.float32, torch.float64)
    assert ((u_KBL >= 0) & (u_KBL <= 1)).all()
    assert (u_KBL.diff(dim=0) <= 0).all()
    assert (u_KBL[:, ~free_BL] == 0).all()
    if free_BL.any():
        assert len(u_KBL) >= 1 and (u_KBL[-1] == 0).all()
        assert (u_KBL[0] < 1)[free_BL].any()  # the first evaluation is not wasted


@pytest.mark.parametrize("text", ["uniform", "ramp:0", "ramp:0.25", "ramp:1", "ramp:1e9"])
@settings(max_examples=30, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 20))
def test_static_paths_take_the_steps_they_are_given(text, free_BL, steps):
    assert len(walk(text, free_BL, steps)[0]) == steps


@settings(max_examples=30, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 20))
def test_uniform_is_equal_steps_and_ramp_of_slope_nothing(free_BL, steps):
    u_KBL, _ = walk("uniform", free_BL, steps)
    for k in range(steps):
        expected = torch.full((int(free_BL.sum()),), (steps - 1 - k) / steps, dtype=torch.float64)
        torch.testing.assert_close(u_KBL[k][free_BL], expected, rtol=0, atol=1e-6)
    assert torch.equal(u_KBL, walk("ramp:0", free_BL, steps)[0])


@settings(max_examples=50, deadline=None)
@given(free_BL=masks)
def test_free_place_against_a_loop(free_BL):
    place_BL = free_place(free_BL)
    for row, free in enumerate(free_BL.tolist()):
        places = [column for column, is_free in enumerate(free) if is_free]
        for rank, column in enumerate(places):
            assert float(place_BL[row, column]) == pytest.approx(rank / max(1, len(places) - 1), abs=1e-6)


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


@settings(max_examples=50, deadline=None)
@given(free_BL=masks, exponent=st.integers(6, 300))
def test_a_very_steep_ramp_is_token_by_token_from_left_to_right(free_BL, exponent):
    count = int(free_BL.sum(1).max())
    if count == 0:
        return
    u_KBL, _ = walk(f"ramp:1e{exponent}", free_BL, count)
    for row, free in enumerate(free_BL):
        u_KN = u_KBL[:, row, free]
        assert (((u_KN > 0) & (u_KN < 1)).sum(1) <= 1).all()  # at most one under way
        assert (u_KN.diff(dim=1) >= 0).all()  # from left to right
        if int(free.sum()) == count:
            assert ((u_KN == 0).sum(1) - torch.arange(1, count + 1) == 0).all()  # one finishes in every step


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@settings(max_examples=40, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 30))
def test_a_block_starts_when_the_one_before_is_finished(size, free_BL, steps):
    u_KBL, block_BL = walk(f"blocks:{size}", free_BL, steps)
    for row, (free, block) in enumerate(zip(free_BL, block_BL, strict=True)):
        for u_L in u_KBL[:, row]:
            per_block = [u_L[free & (block == b)] for b in block.unique().tolist()]
            per_block = [u for u in per_block if len(u)]
            assert all((u == u[0]).all() for u in per_block)  # one level in a block
            values = [float(u[0]) for u in per_block]
            running = [v for v in values if 0 < v < 1]
            assert len(running) <= 1 and values == sorted(values)


@settings(max_examples=60, deadline=None)
@given(free_BL=masks.map(lambda m: m[:1]), steps=st.integers(1, 30), size=st.integers(1, 5))
def test_blocks_share_the_steps_out_evenly(free_BL, steps, size):
    u_KBL, block_BL = walk(f"blocks:{size}", free_BL, steps)
    numbers = block_BL[free_BL].unique().tolist()
    assert len(u_KBL) == max(steps, len(numbers), 1)
    shares = []
    for number in numbers:
        mine = u_KBL[:, 0][:, free_BL[0] & (block_BL[0] == number)]
        waiting, finished = int((mine[:, 0] == 1).sum()), int((mine[:, 0] == 0).sum())
        assert waiting == sum(shares)  # it starts when those before it are finished
        shares.append(len(mine) - waiting - finished + 1)
        falling = [1 - (k + 1) / shares[-1] for k in range(shares[-1])]
        assert mine[waiting : waiting + shares[-1], 0].tolist() == pytest.approx(falling, abs=1e-6)
    assert not shares or (max(shares) - min(shares) <= 1 and sum(shares) == len(u_KBL))


@pytest.mark.parametrize("text", ["uniform", "ramp:0.5", "blocks:1", "blocks:2", "blocks:4"])
@settings(max_examples=30, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 30))
def test_a_row_takes_the_same_steps_whatever_its_neighbours_are(text, free_BL, steps):
    def distinct(u_KL):
        kept = [torch.where(free_BL[row], 1.0, 0.0).double()]
        for u_L in u_KL:
            if not torch.equal(u_L.double(), kept[-1]):
                kept.append(u_L.double())
        return torch.stack(kept)

    together, _ = walk(text, free_BL, steps)
    for row in range(len(free_BL)):
        alone, _ = walk(text, free_BL[row : row + 1], steps)
        expected, found = distinct(alone[:, 0]), distinct(together[:, row])
        assert expected.shape == found.shape and torch.equal(expected, found)


def test_nothing_free_is_nothing_to_do():
    for text in STATIC:
        u_KBL, _ = walk(text, torch.zeros(2, 5, dtype=torch.bool), 4)
        assert (u_KBL == 0).all()


def test_names_and_blocks():
    assert (make_path("uniform").name, make_path("uniform").block) == ("uniform", 0)
    assert (make_path("ramp:0.25").name, make_path("ramp:0.25").block) == ("ramp:0.25", 0)
    assert make_path("ramp").name == "ramp:0.25" and ramp_path(3.0).name == "ramp:3"
    assert (make_path("blocks:4").name, make_path("blocks:4").block) == ("blocks:4", 4)
    assert make_path("blocks").block == 8


@pytest.mark.parametrize("text", STATIC)
def test_names_can_be_read_back(text):
    name = make_path(text).name
    assert make_path(name).name == name


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "blocks:1,2", "uniform:1", "shuffled:2",
        "confidence:-1", "entropy:nan", "sideways", "Uniform", " uniform",
        "uniform:3", "ramp:x", "ramp:0.5:1", "ramp:-0.1", "ramp:nan",
        "ramp:inf", "blocks:0", "blocks:-3", "blocks:2.5", "blocks:x", "blocks:nan", "blocks:inf", "blocks:1e400",
        "blocks:1e30",
    ],
)  # fmt: skip
def test_bad_paths_are_refused(text):
    with pytest.raises(ValueError):
        make_path(text)


def test_errors_say_what_was_asked_and_what_there_is():
    with pytest.raises(ValueError, match=r"'sideways'.*uniform.*ramp.*blocks"):
        make_path("sideways")
    with pytest.raises(ValueError, match="'x' is not a number"):
        make_path("ramp:x")
    with pytest.raises(ValueError, match=r"whole number.*2\.5"):
        make_path("blocks:2.5")
    with pytest.raises(ValueError, match="whole number"):
        make_path("blocks:nan")

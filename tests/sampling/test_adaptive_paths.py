"""Adaptive paths: the shares and clocks of their definition, and what they do to the law that is sampled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.noise.schedule import Log, Power
from scorelm.sampling.loop import generate

from .laws import (
    BOS,
    EOS,
    F64,
    INF,
    LAW,
    PRIOR,
    SCHEDULE,
    SOLVERS,
    TABLE,
    E,
    bayes,
    mixture_denoiser,
    sample_jointly,
    total_variation,
)
from .walks import ADAPTIVE, World, constant
from .walks import walk as walk_on

RANGE = Power(0.1, 10.0, rho=3.0)


def walk(text, free_BL, steps, entropy, rate, schedule=RANGE):
    return walk_on(text, free_BL, steps, schedule, World(entropy, rate))


def all_free(*shape):
    return torch.ones(*shape, dtype=torch.bool)


# --- what every adaptive path keeps -----------------------------------------------------------------------------------


masks = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
).map(torch.tensor)  # fmt: skip


@pytest.mark.parametrize("text", ADAPTIVE)
@settings(max_examples=20, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 12), seed=st.integers(0, 10**6), spread=st.floats(0.0, 9.0))
def test_levels_fall_and_end_at_nothing_in_time(text, free_BL, steps, seed, spread):
    """Whatever the posterior says: entropies over many magnitudes and 0, rates down to 0, in rows apart."""
    gen = torch.Generator().manual_seed(seed)

    def anything(sigma_BL, look):
        size = 10 ** (0.5 - spread * torch.rand(sigma_BL.shape, generator=gen))
        return torch.where(torch.rand(sigma_BL.shape, generator=gen) < 0.1, 0.0, size)

    levels = walk(text, free_BL, steps, anything, anything)
    before_BL = torch.where(free_BL, INF, 0.0)
    assert len(levels) <= steps
    for sigma_BL in levels:
        assert sigma_BL.dtype == torch.float32 and sigma_BL.shape == free_BL.shape
        assert (sigma_BL <= before_BL).all() and (sigma_BL >= 0).all() and sigma_BL.isfinite().all()
        assert ((sigma_BL == 0) | (sigma_BL >= 0.1)).all()  # below the schedule's least there is nothing to decide
        assert (sigma_BL[~free_BL] == 0).all()
        before_BL = sigma_BL
    assert not free_BL.any() or (levels and (levels[-1] == 0).all())


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(["confidence:0", "confidence:0.3", "entropy", "entropy:0.3"]),
    free_BL=masks, steps=st.integers(1, 8), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_row_goes_its_own_way(text, free_BL, steps, seed):
    """Its levels depend on its own entropies alone."""
    gen = torch.Generator().manual_seed(seed)
    entropy_KBL, rate_KBL = 2 * torch.rand(2, steps, *free_BL.shape, generator=gen)
    together = walk(text, free_BL, steps, lambda s, k: entropy_KBL[k], lambda s, k: rate_KBL[k])
    for row in range(len(free_BL)):
        part = slice(row, row + 1)
        levels = walk(
            text, free_BL[part], steps, lambda s, k: entropy_KBL[k, part], lambda s, k: rate_KBL[k, part]  # noqa: B023
        )  # fmt: skip
        for k, sigma_BL in enumerate(together):
            expected = levels[k][0] if k < len(levels) else torch.zeros(free_BL.shape[1])
            assert torch.equal(sigma_BL[row], expected)


def test_in_one_step_everything_finishes():
    for text in ADAPTIVE:
        levels = walk(text, all_free(2, 3), 1, constant([1.0]), constant([2.0]))
        assert len(levels) == 1 and (levels[0] == 0).all()


# --- shares and clocks, in closed form --------------------------------------------------------------------------------


def test_confidence_spends_the_same_on_every_open_position():
    """Three nats in four steps over three positions: 0.25 nats each; from inf, tau = 0.25 / rate."""
    rate = [2.0, 1.0, 0.5]
    levels = walk("confidence:0", all_free(1, 3), 4, constant([0.8, 1.0, 1.2]), constant(rate))
    tau = [0.25 / r for r in rate]
    assert levels[0][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    tau = [t + 1 / 3 / r for t, r in zip(tau, rate, strict=True)]  # as much is left as before, in three steps
    assert levels[1][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    tau = [t + 0.5 / r for t, r in zip(tau, rate, strict=True)]
    assert levels[2][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    assert levels[3][0].tolist() == [0, 0, 0]


def test_entropy_spends_in_proportion():
    """Each position its own entropy over the steps that are left."""
    entropy, rate = [0.1, 1.0, 2.0], [0.5, 1.0, 0.25]
    levels = walk("entropy", all_free(1, 3), 3, constant(entropy), constant(rate))
    tau = [h / 3 / r for h, r in zip(entropy, rate, strict=True)]
    assert levels[0][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    tau = [t + h / 2 / r for t, h, r in zip(tau, entropy, rate, strict=True)]
    assert levels[1][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    assert levels[2][0].tolist() == [0, 0, 0]


def test_each_row_has_a_budget_of_its_own():
    free_BL = torch.tensor([[True, True, False], [True, True, True]])
    entropy = [[1.0, 3.0, 9.0], [0.5, 0.6, 0.7]]
    levels = walk("confidence:0", free_BL, 8, constant(entropy), constant([1.0]))
    expected = [[0.25**-0.5] * 2 + [0.0], [0.075**-0.5] * 3]  # 4 nats over 8 steps and 2; 1.8 over 8 and 3
    torch.testing.assert_close(levels[0], torch.tensor(expected), rtol=1e-6, atol=0)


def test_a_position_within_its_equal_share_finishes_at_once():
    """8.4 nats in two steps over four positions: 1.05 each, and two have no more than that."""
    levels = walk("confidence:0", all_free(1, 4), 2, constant([1.0, 1.05, 1.1, 5.25]), constant([1.0]))
    assert levels[0][0, :2].tolist() == [0, 0] and (levels[0][0, 2:] > 0).all()
    assert levels[0][0, 2:].tolist() == pytest.approx([1.05**-0.5] * 2, rel=1e-6)


def test_finished_positions_have_no_share_any_more():
    """Of 0.05, 1 and 2 nats in three steps the first goes at once; then two share three nats over two steps."""
    levels = walk("confidence:0", all_free(1, 3), 3, constant([0.05, 1.0, 2.0]), constant([3.0]))
    first = 3.05 / 9 / 3
    assert levels[0][0].tolist() == pytest.approx([0.0, first**-0.5, first**-0.5], rel=1e-6)
    second = first + 0.75 / 3
    assert levels[1][0].tolist() == pytest.approx([0.0, second**-0.5, second**-0.5], rel=1e-6)


@pytest.mark.parametrize("name", ["confidence", "entropy"])
def test_a_position_within_the_threshold_finishes_at_once(name):
    entropy = constant([0.49, 0.5, 0.51, 4.0])  # one row of which 0.05 nats are each position's share
    levels = walk(f"{name}:0.5", all_free(1, 4), 30, entropy, constant([1.0]))
    assert (levels[0][0] == 0).tolist() == [True, True, False, False]
    bare = walk(f"{name}:0", all_free(1, 4), 30, entropy, constant([1.0]))
    assert (bare[0] > 0).all()
    assert torch.equal(levels[0][0, 2:], bare[0][0, 2:])  # the others go as far as without
    sure = walk(f"{name}:0", all_free(1, 4), 30, constant([0.0, 0.0, 1.0, 1.0]), constant([1.0]))
    assert (sure[0][0] == 0).tolist() == [True, True, False, False]  # nothing left to decide is within any threshold


def test_a_threshold_above_all_entropies_ends_at_the_first_look():
    for text in ("confidence:3", "entropy:3"):
        levels = walk(text, all_free(2, 3), 9, constant([1.0]), constant([1.0]))
        assert len(levels) == 1 and (levels[0] == 0).all()


def test_below_the_least_level_a_position_is_finished():
    """tau = 1.5 is sigma 0.816, above or below the least."""
    for least, expected in ((0.8, 1.5**-0.5), (0.82, 0.0)):
        levels = walk("entropy", all_free(1, 2), 2, constant([3.0]), constant([1.0]), Power(least, 10.0))
        assert levels[0][0].tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_the_surer_the_faster_on_confidence_and_together_on_entropy():
    """Binary positions with embeddings of -1 and 1, which have p of the likelier token."""
    p = torch.tensor([0.55, 0.8, 0.95, 0.99], dtype=F64)
    entropy, rate = torch.special.entr(p) + torch.special.entr(1 - p), (1 - (2 * p - 1) ** 2) / 2
    first = {}
    for name in ("confidence", "entropy"):
        found = walk(f"{name}:0", all_free(1, 4), 100, constant(entropy.tolist()), constant(rate.tolist()))
        first[name] = found[0][0]
    assert (first["confidence"].diff() < 0).all()
    spread = {name: float(sigma.max() / sigma.min()) for name, sigma in first.items()}
    assert spread["entropy"] < 2 < spread["confidence"]


# --- with exact posteriors --------------------------------------------------------------------------------------------


def test_the_first_steps_are_those_of_the_prior_and_the_rate_of_i_mmse(loop_of, settings_of):
    """The rate is (E - |x0|^2) / 2, with x0 the mean under the prior where nothing is known, and then under Bayes."""
    loop = loop_of(mixture_denoiser(), SCHEDULE)
    steps = generate(loop, [[BOS, *[None] * 50, EOS]], [0], settings_of(path="entropy", steps=5))
    next(steps)
    (job,) = loop.jobs
    entropy = float(torch.special.entr(PRIOR).sum())
    rate = (E - float((PRIOR @ TABLE).square().sum())) / 2
    sigma_N = job.state.sigma_BL[0, 1:-1].double()
    assert sigma_N.tolist() == pytest.approx([(entropy / 5 / rate) ** -0.5] * 50, rel=1e-5)
    p_NV = bayes(job.state.x_BLE[0, 1:-1].double(), sigma_N).softmax(-1)
    record = next(steps)
    entropy_N = torch.special.entr(p_NV).sum(-1)
    torch.testing.assert_close(record.entropy_BL[0, 1:-1].double(), entropy_N, rtol=1e-4, atol=1e-5)
    rate_N = (E - (p_NV @ TABLE).square().sum(-1)) / 2
    expected_N = (sigma_N**-2 + entropy_N / 4 / rate_N) ** -0.5
    expected_N = torch.where(expected_N < SCHEDULE.sigma_min, 0.0, expected_N)
    torch.testing.assert_close(record.sigma_BL[0, 1:-1].double(), expected_N, rtol=1e-3, atol=1e-4)


def fall_of_entropy(loop_of, settings_of, path, solver="posterior", steps=30):
    """Mean entropy of 1,500 independent positions before each step, as a share of the first."""
    chosen = settings_of(path=path, solver=solver, steps=steps)
    loop = loop_of(mixture_denoiser(), Log(0.2, 12.0))
    found = list(generate(loop, [[BOS, *[None] * 50, EOS]] * 30, range(30), chosen))
    nats = torch.stack([record.entropy_BL[:, 1:-1].double().mean() for record in found])
    return nats / nats[0]


@pytest.mark.parametrize(("path", "solver"), [("entropy", "posterior"), ("confidence:0", "ancestral")])
def test_equal_steps_remove_equal_information(loop_of, settings_of, path, solver):
    """By I-MMSE: with the posterior exact, entropy falls on a straight line, to within what a finite step misses."""
    share_K = fall_of_entropy(loop_of, settings_of, path, solver)
    line_K = 1 - torch.arange(len(share_K), dtype=F64) / 30
    assert len(share_K) == 30
    assert (share_K - line_K).abs().max() < 0.06
    fixed_K = fall_of_entropy(loop_of, settings_of, "uniform")
    assert (fixed_K - line_K).abs().max() > 0.15  # where steps of sigma are equal, it does not


@pytest.mark.parametrize("path", ["confidence", "entropy"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_more_evaluations_than_asked_for(loop_of, settings_of, path, solver):
    templates, loop = [[BOS, *[None] * 6, EOS], [BOS, None, EOS]], loop_of(mixture_denoiser(), SCHEDULE)
    for steps in (1, 2, 7):
        *_, last = generate(loop, templates, [0, 1], settings_of(path=path, solver=solver, steps=steps))
        assert (last.sigma_BL == 0).all() and (last.nfe_B >= 1).all() and (last.nfe_B <= steps).all()


def surplus(name, steps, rows):
    """Mean log probability of samples of the joint law, less that of the law itself, nats."""
    share_V, made = sample_jointly("confidence:0", name, steps, rows)
    assert made <= steps
    return float((share_V - LAW) @ LAW.log())


@pytest.mark.thorough
def test_ancestral_steps_keep_the_law_on_the_path_of_equal_shares():
    """2,000 rows of the law itself are about 0.02 away from it; other pairs stand in test_laws.py."""
    share_V, _ = sample_jointly("entropy", "ancestral", 64, 2000)
    assert total_variation(share_V) < 0.04


@pytest.mark.thorough
def test_the_deterministic_flow_is_biased_there_however_small_the_steps():
    """It favours likely sequences by about 0.06 nats, at 20 steps as at 60; a standard error is 0.017.

    So a position that is sure may go faster only if its steps keep their noise: the default solver is stochastic.
    """
    assert surplus("euler", 20, 3000) > 0.035
    assert surplus("euler", 60, 3000) > 0.035
    assert surplus("heun", 16, 3000) > 0.035
    assert abs(surplus("ancestral", 40, 3000)) < 0.035


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sde", "renoise"])
def test_noise_that_is_put_back_is_worse_still(name):
    """Raising a level that was chosen from the state, or forgetting the state, is not what theory allows.

    The bias grows with the number of steps, although these solvers draw their tokens; a standard error is 0.021.
    """
    few, many = surplus(name, 12, 2000), surplus(name, 32, 2000)
    assert 0.04 < few < many - 0.06

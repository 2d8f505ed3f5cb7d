"""Adaptive paths: the shares and clocks of their definition, and what they do to the law that is sampled."""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.sampling.paths import make_path
from scorelm.noise.plan import Observation, Plan
from scorelm.noise.schedule import Log, Power
from scorelm.sampling.generate import Sampler, generate
from scorelm.sampling.options import Options
from scorelm.sampling.solvers import make_solver
from scorelm.text.sentencepiece import BOS, EOS

F64, INF = torch.float64, math.inf
E = 4.0
SCHEDULE = Power(0.1, 10.0, rho=3.0)


def load(name):
    """Another test module, for its exact laws."""
    path = Path(__file__).parents[1] / "sampling" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


exact = load("test_solver_published")


class World:
    """Entropies and rates that a path is shown, step by step, and how often it looks."""

    def __init__(self, free_BL, entropy, rate, confidence=lambda sigma_BL, look: torch.zeros_like(sigma_BL)):
        """`entropy`, `rate` and `confidence` are functions of sigma_BL and the number of the look, from 0."""
        self.free_BL, self.entropy, self.rate, self.confidence = free_BL, entropy, rate, confidence
        self.sigma_BL = torch.where(free_BL, INF, 0.0)
        self.looks = 0

    def observe(self):
        seen = Observation(
            self.sigma_BL, self.entropy(self.sigma_BL, self.looks), self.rate(self.sigma_BL, self.looks),
            self.confidence(self.sigma_BL, self.looks),
        )  # fmt: skip
        self.looks += 1
        return seen

    def walk(self, text, steps, schedule=SCHEDULE):
        """All levels of a path; positions go exactly where it says."""

        def no_order():
            raise AssertionError("an adaptive path has no random order")

        plan = Plan(self.free_BL, self.free_BL.long(), steps, schedule, self.observe, no_order)
        levels = []
        for sigma_BL in make_path(text).levels(plan):
            assert self.looks == len(levels) + 1  # one look a step
            levels.append(sigma_BL)
            self.sigma_BL = sigma_BL
        assert self.looks <= steps
        return levels


def all_free(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def constant(values):
    tensor = torch.tensor(values)
    return lambda sigma_BL, look: tensor.expand(sigma_BL.shape)


# --- what every adaptive path keeps -----------------------------------------------------------------------------------


masks = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
).map(torch.tensor)  # fmt: skip
TEXTS = ["confidence", "confidence:0", "confidence:0.7", "entropy", "entropy:0.5", "entropy:1e9"]


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=30, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 12), seed=st.integers(0, 10**6), spread=st.floats(0.0, 9.0))
def test_levels_fall_and_end_at_nothing_in_time(text, free_BL, steps, seed, spread):
    """Whatever the posterior says: entropies over many magnitudes and 0, rates down to 0, in rows apart."""
    gen = torch.Generator().manual_seed(seed)

    def anything(sigma_BL, look):
        size = 10 ** (0.5 - spread * torch.rand(sigma_BL.shape, generator=gen))
        return torch.where(torch.rand(sigma_BL.shape, generator=gen) < 0.1, 0.0, size)

    levels = World(free_BL, anything, anything).walk(text, steps)
    before_BL = torch.where(free_BL, INF, 0.0)
    assert len(levels) <= steps
    for sigma_BL in levels:
        assert sigma_BL.dtype == torch.float32 and sigma_BL.shape == free_BL.shape
        assert (sigma_BL <= before_BL).all() and (sigma_BL >= 0).all() and sigma_BL.isfinite().all()
        assert ((sigma_BL == 0) | (sigma_BL >= 0.1)).all()  # below the schedule's least there is nothing to decide
        assert (sigma_BL[~free_BL] == 0).all()
        before_BL = sigma_BL
    assert not free_BL.any() or (levels and (levels[-1] == 0).all())


@pytest.mark.parametrize("text", ["confidence:0", "confidence:0.3", "entropy", "entropy:0.3"])
@settings(max_examples=20, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_a_row_goes_its_own_way(text, free_BL, steps, seed):
    """Its levels depend on its own entropies alone."""
    gen = torch.Generator().manual_seed(seed)
    entropy_KBL, rate_KBL = 2 * torch.rand(2, steps, *free_BL.shape, generator=gen)
    together = World(free_BL, lambda s, k: entropy_KBL[k], lambda s, k: rate_KBL[k]).walk(text, steps)
    for row in range(len(free_BL)):
        part = slice(row, row + 1)
        alone = World(free_BL[part], lambda s, k: entropy_KBL[k, part], lambda s, k: rate_KBL[k, part])  # noqa: B023
        levels = alone.walk(text, steps)
        for k, sigma_BL in enumerate(together):
            expected = levels[k][0] if k < len(levels) else torch.zeros(free_BL.shape[1])
            assert torch.equal(sigma_BL[row], expected)


def test_nothing_free_is_nothing_to_do():
    for text in TEXTS:
        assert World(torch.zeros(2, 3, dtype=torch.bool), constant([1.0]), constant([1.0])).walk(text, 5) == []


def test_in_one_step_everything_finishes():
    for text in TEXTS:
        levels = World(all_free(2, 3), constant([1.0]), constant([2.0])).walk(text, 1)
        assert len(levels) == 1 and (levels[0] == 0).all()


# --- shares and clocks, in closed form --------------------------------------------------------------------------------


def test_confidence_spends_the_same_on_every_open_position():
    """Three nats in four steps over three positions: 0.25 nats each; from inf, tau = 0.25 / rate."""
    entropy, rate = [[0.8, 1.0, 1.2]], [[2.0, 1.0, 0.5]]
    levels = World(all_free(1, 3), constant(entropy), constant(rate)).walk("confidence:0", 4)
    tau = [0.25 / r for r in rate[0]]
    assert levels[0][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    tau = [t + 1 / 3 / r for t, r in zip(tau, rate[0], strict=True)]  # as much is left as before, in three steps
    assert levels[1][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    tau = [t + 0.5 / r for t, r in zip(tau, rate[0], strict=True)]
    assert levels[2][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    assert levels[3][0].tolist() == [0, 0, 0]


def test_entropy_spends_in_proportion():
    """Each position its own entropy over the steps that are left."""
    entropy, rate = [[0.1, 1.0, 2.0]], [[0.5, 1.0, 0.25]]
    levels = World(all_free(1, 3), constant(entropy), constant(rate)).walk("entropy", 3)
    tau = [h / 3 / r for h, r in zip(entropy[0], rate[0], strict=True)]
    assert levels[0][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    tau = [t + h / 2 / r for t, h, r in zip(tau, entropy[0], rate[0], strict=True)]
    assert levels[1][0].tolist() == pytest.approx([t**-0.5 for t in tau], rel=1e-6)
    assert levels[2][0].tolist() == [0, 0, 0]


def test_each_row_has_a_budget_of_its_own():
    free_BL = torch.tensor([[True, True, False], [True, True, True]])
    entropy = [[1.0, 3.0, 9.0], [0.5, 0.6, 0.7]]
    levels = World(free_BL, constant(entropy), constant([1.0])).walk("confidence:0", 8)
    expected = [[0.25**-0.5] * 2 + [0.0], [0.075**-0.5] * 3]  # 4 nats over 8 steps and 2; 1.8 over 8 and 3
    torch.testing.assert_close(levels[0], torch.tensor(expected), rtol=1e-6, atol=0)


def test_a_position_within_its_equal_share_finishes_at_once():
    """8.4 nats in two steps over four positions: 1.05 each, and two have no more than that."""
    entropy = [[1.0, 1.05, 1.1, 5.25]]
    levels = World(all_free(1, 4), constant(entropy), constant([1.0])).walk("confidence:0", 2)
    assert levels[0][0, :2].tolist() == [0, 0] and (levels[0][0, 2:] > 0).all()
    assert levels[0][0, 2:].tolist() == pytest.approx([1.05**-0.5] * 2, rel=1e-6)


def test_finished_positions_have_no_share_any_more():
    """Of 0.05, 1 and 2 nats in three steps the first goes at once; then two share three nats over two steps."""
    levels = World(all_free(1, 3), constant([[0.05, 1.0, 2.0]]), constant([3.0])).walk("confidence:0", 3)
    first = 3.05 / 9 / 3
    assert levels[0][0].tolist() == pytest.approx([0.0, first**-0.5, first**-0.5], rel=1e-6)
    second = first + 0.75 / 3
    assert levels[1][0].tolist() == pytest.approx([0.0, second**-0.5, second**-0.5], rel=1e-6)


@pytest.mark.parametrize("name", ["confidence", "entropy"])
def test_a_position_within_the_threshold_finishes_at_once(name):
    entropy = [[0.49, 0.5, 0.51, 4.0]]  # one row of which 0.05 nats are each position's share
    levels = World(all_free(1, 4), constant(entropy), constant([1.0])).walk(f"{name}:0.5", 30)
    assert (levels[0][0] == 0).tolist() == [True, True, False, False]
    bare = World(all_free(1, 4), constant(entropy), constant([1.0])).walk(f"{name}:0", 30)
    assert (bare[0] > 0).all()
    assert torch.equal(levels[0][0, 2:], bare[0][0, 2:])  # the others go as far as without
    sure = World(all_free(1, 4), constant([[0.0, 0.0, 1.0, 1.0]]), constant([1.0])).walk(f"{name}:0", 30)
    assert (sure[0][0] == 0).tolist() == [True, True, False, False]  # nothing left to decide is within any threshold


def test_a_threshold_above_all_entropies_ends_at_the_first_look():
    for text in ("confidence:3", "entropy:3"):
        levels = World(all_free(2, 3), constant([1.0]), constant([1.0])).walk(text, 9)
        assert len(levels) == 1 and (levels[0] == 0).all()


def test_below_the_least_level_a_position_is_finished():
    """tau = 1.5 is sigma 0.816, above or below the least."""
    for least, expected in ((0.8, 1.5**-0.5), (0.82, 0.0)):
        world = World(all_free(1, 2), constant([3.0]), constant([1.0]))
        assert world.walk("entropy", 2, Power(least, 10.0))[0][0].tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_the_surer_the_faster_on_confidence_and_together_on_entropy():
    """Binary positions with embeddings of -1 and 1, which have p of the likelier token."""
    p = torch.tensor([0.55, 0.8, 0.95, 0.99], dtype=F64)
    entropy, rate = torch.special.entr(p) + torch.special.entr(1 - p), (1 - (2 * p - 1) ** 2) / 2
    first = {}
    for name in ("confidence", "entropy"):
        world = World(all_free(1, 4), constant([entropy.tolist()]), constant([rate.tolist()]))
        first[name] = world.walk(f"{name}:0", 100)[0][0]
    assert (first["confidence"].diff() < 0).all()
    spread = {name: float(sigma.max() / sigma.min()) for name, sigma in first.items()}
    assert spread["entropy"] < 2 < spread["confidence"]


@pytest.mark.parametrize(
    "text", ["confidence:-1", "confidence:nan", "entropy:-0.1", "entropy:inf", "entropy:x", "confidence:1,2"]
)
def test_bad_thresholds_are_refused_in_one_line(text):
    with pytest.raises(ValueError) as error:
        make_path(text)
    name, _, number = text.partition(":")
    assert name in str(error.value) and number in str(error.value) and "\n" not in str(error.value)


def test_names():
    assert [make_path(n).name for n in ("confidence", "entropy")] == ["confidence:0.1", "entropy:0"]
    assert all(make_path(n).adaptive for n in TEXTS)
    assert not any(make_path(n).adaptive for n in ("uniform", "ramp", "blocks", "shuffled"))


# --- shuffled ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(free_BL=masks, steps=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_shuffled_gives_every_position_one_turn(free_BL, steps, seed):
    """From inf to 0 at once, in the order that it is given, as many in a step as in another, give or take one."""
    gen = torch.Generator().manual_seed(seed)
    rank_BL = torch.zeros(free_BL.shape, dtype=torch.long)
    for row, free in enumerate(free_BL):
        rank_BL[row, free] = torch.randperm(int(free.sum()), generator=gen)
    asked = []

    def shuffle():
        asked.append(1)
        return rank_BL

    def never():
        raise AssertionError("a static path does not look")

    plan = Plan(free_BL, free_BL.long(), steps, SCHEDULE, never, shuffle)
    levels = torch.stack(list(make_path("shuffled").levels(plan)))
    assert asked == [1] and len(levels) == steps
    assert torch.isin(levels, torch.tensor([0.0, INF])).all() and (levels[:, ~free_BL] == 0).all()
    for row, free in enumerate(free_BL):
        count = int(free.sum())
        open_K = [count, *(levels[:, row] == INF).sum(1).tolist()]
        each = [a - b for a, b in pairwise(open_K)]
        assert open_K[-1] == 0 and max(each) <= math.ceil(count / steps) and min(each) >= count // steps
        for sigma_L in levels[:, row]:
            open_ranks = rank_BL[row][free & (sigma_L == INF)]
            assert sorted(open_ranks.tolist()) == list(range(count - len(open_ranks), count))  # the last in order


# --- with exact posteriors --------------------------------------------------------------------------------------------


def test_the_first_look_is_the_entropy_of_the_prior_and_the_rate_of_i_mmse():
    """(E - |x0|^2) / 2 with x0 the mean under the prior, where nothing is known; and after a step at another state."""
    chosen = Options(make_path("entropy"), make_solver("posterior"), 5)
    sampler = Sampler(exact.mixture_denoiser(), exact.SCHEDULE, [[BOS, *[None] * 50, EOS]], [0], chosen)
    with torch.inference_mode():
        seen = sampler.observe()
        assert (seen.sigma_BL[0, 1:-1] == INF).all()
        entropy = float(torch.special.entr(exact.PRIOR).sum())
        rate = (E - float((exact.PRIOR @ exact.TABLE).square().sum())) / 2
        assert seen.entropy_BL[0, 1:-1].tolist() == pytest.approx([entropy] * 50, rel=1e-5)
        assert seen.rate_BL[0, 1:-1].tolist() == pytest.approx([rate] * 50, rel=1e-5)
        sampler.seen = None
        records = sampler.records()
        next(records)
        sigma_N = sampler.state.sigma_BL[0, 1:-1].double()
        p_NV = exact.bayes(sampler.state.x_BLE[0, 1:-1].double(), sigma_N).softmax(-1)
        assert sigma_N.tolist() == pytest.approx([(entropy / 5 / rate) ** -0.5] * 50, rel=1e-5)
        seen = sampler.observe()
        expected = (E - (p_NV @ exact.TABLE).square().sum(-1)) / 2
    torch.testing.assert_close(seen.rate_BL[0, 1:-1].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        seen.entropy_BL[0, 1:-1].double(), torch.special.entr(p_NV).sum(-1), rtol=1e-4, atol=1e-5
    )


def fall_of_entropy(path, solver="posterior", steps=30):
    """Mean entropy of 1,500 independent positions before each step, as a share of the first."""
    chosen = Options(make_path(path), make_solver(solver), steps)
    templates = [[BOS, *[None] * 50, EOS]] * 30
    found = list(generate(exact.mixture_denoiser(), Log(0.2, 12.0), templates, range(30), chosen))
    nats = torch.stack([record.entropy_BL[:, 1:-1].double().mean() for record in found])
    return nats / nats[0]


@pytest.mark.parametrize(("path", "solver"), [("entropy", "posterior"), ("confidence:0", "ancestral")])
def test_equal_steps_remove_equal_information(path, solver):
    """By I-MMSE: with the posterior exact, entropy falls on a straight line, to within what a finite step misses."""
    share_K = fall_of_entropy(path, solver)
    line_K = 1 - torch.arange(len(share_K), dtype=F64) / 30
    assert len(share_K) == 30
    assert (share_K - line_K).abs().max() < 0.06
    fixed_K = fall_of_entropy("uniform")
    assert (fixed_K - line_K).abs().max() > 0.15  # where steps of sigma are equal, it does not


@pytest.mark.parametrize("path", ["confidence", "entropy"])
@pytest.mark.parametrize("solver", exact.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_more_evaluations_than_asked_for(path, solver, steps):
    chosen = Options(make_path(path), make_solver(solver), steps)
    templates = [[BOS, *[None] * 6, EOS], [BOS, None, EOS]]
    last = list(generate(exact.mixture_denoiser(), exact.SCHEDULE, templates, [0, 1], chosen))[-1]
    assert (last.sigma_BL == 0).all() and (last.nfe_B >= 1).all() and (last.nfe_B <= steps).all()


def surplus(name, steps, rows, path="confidence:0"):
    """Mean log probability of samples of the joint law, less that of the law itself, nats."""
    share_V, made = exact.sample_jointly(path, name, steps, rows)
    assert made <= steps
    return float((share_V - exact.LAW) @ exact.LAW.log())


@pytest.mark.parametrize(("name", "steps"), [("ancestral", 64), ("posterior", 48)])
@pytest.mark.parametrize("path", ["confidence:0", "entropy"])
def test_stochastic_solvers_keep_the_law_on_adaptive_paths(path, name, steps):
    """4,000 rows of the law itself are about 0.014 away from it."""
    share_V, _ = exact.sample_jointly(path, name, steps, 4000)
    assert exact.total_variation(share_V) < 0.028


def test_the_deterministic_flow_is_biased_there_however_small_the_steps():
    """It favours likely sequences by about 0.05 nats, at 20 steps as at 60; a standard error is 0.013.

    So a position that is sure may go faster only if its steps keep their noise: the default solver is stochastic.
    """
    assert surplus("euler", 20, 6000) > 0.028
    assert surplus("euler", 60, 6000) > 0.028
    assert surplus("heun", 16, 6000) > 0.028
    assert abs(surplus("ancestral", 40, 6000)) < 0.028


@pytest.mark.parametrize("name", ["sde", "renoise"])
def test_noise_that_is_put_back_is_worse_still(name):
    """Raising a level that was chosen from the state, or forgetting the state, is not what theory allows.

    The bias grows with the number of steps, although these solvers draw their tokens.
    """
    few, many = surplus(name, 12, 4000), surplus(name, 48, 4000)
    assert 0.05 < few < many - 0.04
    assert abs(surplus(name, 24, 4000, "blocks:1")) < 0.05  # on a static path they are right

"""On another device, and in fixed shapes, a model writes what it writes; and the host seldom waits for the device."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from scorelm.config.generation import Continuation, Infilling
from scorelm.config.network import Network
from scorelm.model.passes import KEPT, MOST, Pass, passes_of, round_up
from scorelm.sampling.evaluator import Dense
from scorelm.sampling.loop import generate_in_batches

from ..pretend import elsewhere
from .conftest import LENGTHS
from .steps import BOS, EOS

SOLVERS = ("posterior", "posterior:5,0.9", "renoise", "ancestral:0.5", "sde:20,1,0.1,5", "euler", "heun", "dpmpp_2m")
PATHS = ("uniform", "ramp:0.5", "blocks:1", "blocks:3", "shuffled", "confidence", "surest", "bounded", "remask:0.2")
READS = {"uniform": 0, "ramp:0.5": 0, "blocks:3": 0, "shuffled": 0, "remask:0.2": 0, "confidence": 2}
"""How often in an evaluation the host waits; once where it is not said."""
FAST = {("bounded", "posterior"), ("uniform", "heun"), ("blocks:3", "posterior"), ("confidence", "sde:20,1,0.1,5")}
EVERY = [
    pytest.param(path, solver, marks=() if (path, solver) in FAST else mark)
    for p, path in enumerate(PATHS)
    for s, solver in enumerate(SOLVERS)
    for mark in [pytest.mark.slow if (p + s) % 4 else pytest.mark.thorough]  # each path and each solver twice, in CI
]
OTHERS = [
    ({"guidance": 2.0, "self_guidance": 1.5}, 1), ({"path": "blocks:3", "guidance": 2.0}, 0), ({"halt": "kl:0.3"}, 2),
    ({"path": "uniform", "halt": "patience:2", "steps": 12}, 1), ({"top_k": 9, "top_p": 0.8}, 1),
    ({"temperature": 0}, 1), ({"path": "blocks:4", "length": 24, "max_length": 24}, 0),
]  # fmt: skip
"""Options, and how often the host waits."""


def make_calm(make_lm, objective="score"):
    """A model in which a rounding stays one, so that whole texts can be compared."""
    lm = make_lm(objective, lengths=LENGTHS)
    with torch.no_grad():
        lm.denoiser.context.weight *= 0.1
    return lm


@pytest.fixture(scope="module")
def calm(make_lm):
    return make_calm(make_lm)


def write(lm, fixed=False, texts=("the", ""), **options):
    """Two texts for each of these, in fixed shapes or not; ids and evaluations of each."""
    request = (Infilling if "____" in texts[0] else Continuation).of(
        **{"steps": 6, "temperature": 1, "top_p": 1} | options
    )
    plan, loop = lm.plan(texts, 2, request), lm.loop()
    if fixed:
        loop.network.passes = passes_of(loop.network.denoiser)
    return [(s.ids, s.nfe) for s in plan.read(generate_in_batches(loop, plan.templates, plan.seeds, plan.settings))]


def compare(lm, **options):
    """Write here and elsewhere, in fixed shapes and not; how often the host waits in an evaluation elsewhere."""
    expected, waits = write(lm, **options), []
    assert write(lm, fixed=True, **options) == expected
    with elsewhere(lm) as device:
        for fixed in (False, True):
            device.waits.clear()
            assert write(lm, fixed, **options) == expected
            waits.append(device.waits.total() - 1)  # one for the ids at the end
    assert waits[0] == waits[1]
    return waits[0] / max(nfe for _, nfe in expected)


@pytest.mark.parametrize(("path", "solver"), EVERY)
def test_every_path_and_solver(calm, path, solver):
    assert compare(calm, path=path, solver=solver) <= READS.get(path, 1)


@pytest.mark.parametrize(("options", "most"), OTHERS)
def test_every_other_option(calm, options, most):
    assert compare(calm, **options) <= most


@pytest.mark.parametrize("objective", ["masked", "autoregressive"])
def test_other_objectives(make_lm, objective):
    lm = make_calm(make_lm, objective)
    assert compare(lm) <= 1


def test_blanks_and_repairs(calm):
    assert compare(calm, texts=["god ____ the light", "and ____ was ____"], blank_words=1) <= 1
    assert compare(calm, texts=["god ____ the light"], repair=0.6) == 0


# --- passes of fixed shapes -------------------------------------------------------------------------------------------

TEXTS = [[BOS, 7, *[None] * 20, EOS], [BOS, *[None] * 7, 12, EOS], [BOS, None, EOS]]


def logits(loop, settings):
    """What is answered to the first three queries of a request."""
    job, found = loop.join(TEXTS, range(3), settings), []
    for _ in range(3):
        query = job.query
        with torch.inference_mode():
            (answer,) = Dense(loop.network)([query])
        found.append(answer.logits_NV)
        loop.step()
    return found


NETWORKS = [
    {}, {"noise_conditioning": "film"},
    {"network": Network(family="bert", norm_eps=1e-5, kv_heads=2, positions=30, head=True)},
    {"network": Network(family="modernbert", norm_eps=1e-5, kv_heads=2, positions=64, every=2, reach=4)},
    {"network": Network(family="llama", norm_eps=1e-5, kv_heads=1, positions=64)},
]  # fmt: skip


@pytest.mark.parametrize("config", NETWORKS)
def test_a_pass_gives_the_logits_that_exact_places_give(make_lm, settings_of, config):
    lm, settings = make_lm(**config), settings_of(path="uniform", steps=5)
    for _ in range(2):
        nn.init.normal_(lm.denoiser.context.weight, std=0.05)  # in place: the passes stay, and see it
        exact, fixed = logits(lm.loop(), settings), logits(make_loop(lm), settings)
        for one, other in zip(exact, fixed, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert list(passes_of(lm.denoiser).kept) == [(2, 32)]


def make_loop(lm):
    """A loop whose network computes fixed shapes."""
    loop = lm.loop()
    loop.network.passes = passes_of(loop.network.denoiser)
    return loop


def test_threads_that_share_a_model_write_what_they_write_alone(calm):
    texts, before = ("the", ""), sys.getswitchinterval()
    expected = [write(calm, fixed=True, texts=(text,), length=14, steps=9) for text in texts]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(6):
                found = pool.map(lambda text: write(calm, fixed=True, texts=(text,), length=14, steps=9), texts)
                assert list(found) == expected
    finally:
        sys.setswitchinterval(before)


def test_passes_end_with_the_weights_that_they_read(make_lm):
    lm = make_lm()
    passes = passes_of(lm.denoiser)
    assert passes_of(lm.denoiser) is passes and passes_of(make_lm().denoiser) is not passes
    lm.denoiser.prior = nn.Parameter(lm.denoiser.prior.detach().clone())
    assert passes_of(lm.denoiser) is not passes
    passes = passes_of(lm.denoiser)
    assert passes_of(lm.denoiser.train()) is not passes


def test_few_passes_are_kept(make_lm):
    passes, cpu = passes_of(make_lm().denoiser), torch.device("cpu")
    first = passes.of_shape(1, 16, 4, cpu)
    assert isinstance(first, Pass) and passes.of_shape(1, 16, 4, cpu) is first
    for k in range(2, KEPT + 1):
        passes.of_shape(k, 16, 4, cpu)
    assert passes.of_shape(1, 16, 4, cpu) is first
    passes.of_shape(KEPT + 1, 16, 4, cpu)
    assert len(passes.kept) == KEPT and (1, 16) in passes.kept and (2, 16) not in passes.kept


def test_shapes_are_rounded_up_and_large_ones_computed_exactly(lm, settings_of, monkeypatch):
    assert round_up(1, 1) == (1, 16) and round_up(5, 64) == (8, 64) and round_up(256, 65) == (256, 80)
    assert MOST >= 64 * 2048  # a text of 64 tokens
    loop = make_loop(lm)
    monkeypatch.setattr("scorelm.sampling.evaluator.MOST", 100)
    job = loop.join(TEXTS[1:], range(2), settings_of(steps=3))
    while not job.finished:
        loop.step()
    assert not loop.network.passes.kept

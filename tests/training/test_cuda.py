"""What only a GPU can show: it computes what a CPU computes, repeats it bit for bit, and never waits inside a step."""

import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS is first used

from scorelm import ScoreLM, price
from scorelm.config.network import Network
from scorelm.config.recipe import ModelConfig, NoiseConfig, TrainingConfig
from scorelm.model.denoiser import Denoiser
from scorelm.noise.schedule import make_schedule
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch, Draw
from scorelm.sampling.evaluator import Dense
from scorelm.text.tokenizer import Special
from scorelm.training.data import prepare
from scorelm.training.step import find_places
from scorelm.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SPECIAL = Special(0, 1, 2, 3)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
V, E = 64, 16
EVERY = pytest.mark.parametrize("objective", OBJECTIVES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The vocabulary in several chunks; and whatever happens, waiting is allowed again afterwards."""
    monkeypatch.setattr("scorelm.model.prediction.CHUNK_ON_GPU", 100 * V)
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What has no deterministic implementation is refused."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def step(device: torch.device, objective: str, waiting: str = "default") -> tuple[float, list[Tensor]]:
    """Loss and gradients of one drawn batch; the first of two turns compiles."""
    torch.manual_seed(0)
    denoiser = Denoiser(ModelConfig(dim=64, layers=2, heads=2, embedding_dim=E), V)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    denoiser.to(device)
    learned, rng, position = OBJECTIVES[objective], torch.Generator().manual_seed(1), torch.arange(160).expand(4, -1)
    batch = Batch(torch.randint(4, V, (4, 160), generator=rng), 1 + position // 70, position % 70)
    schedule = make_schedule("adaptive", E, V)
    draw = learned.draw(batch, NoiseConfig(), schedule, SPECIAL, learned.random(batch, NoiseConfig(), rng))
    draw = draw.with_noise(E, rng)
    how: dict[str, Any] = {"live": draw.live, "special": SPECIAL, "self_conditioned": learned.self_conditions}
    for turn in range(2):
        denoiser.zero_grad()
        placed = find_places(Draw.merge([draw], lambda parts: parts[0].to(device)), fixed=device.type == "cuda")
        if device.type == "cuda" and turn:
            torch.cuda.set_sync_debug_mode(waiting)
        found = learned.loss(denoiser, placed, schedule, TrainingConfig(), **how)
        found.loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1e9)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return float(found.loss.detach()), [p.grad.cpu() for p in denoiser.parameters() if p.grad is not None]


@EVERY
def test_a_gpu_computes_what_a_cpu_computes(objective: str) -> None:
    (one, ones), (other, others) = step(CPU, objective), step(GPU, objective)
    assert other == pytest.approx(one, rel=1e-4)
    for gradient, expected in zip(others, ones, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4)


@EVERY
def test_nothing_in_a_step_waits_for_the_gpu(objective: str) -> None:
    step(GPU, objective, waiting="error")


@pytest.mark.parametrize(("optimizer", "compiled"), [("adamw", False), ("muon", False), ("muon", True)])
@EVERY
def test_nothing_in_a_step_of_a_run_waits_for_the_gpu(
    tools: Any, text: Path, tmp_path: Path, objective: str, optimizer: str, compiled: bool
) -> None:
    """From the rows to the averages of the weights; where nothing is logged and no schedule fitted."""
    how = {"steps": 9, "log_every": 100, "device": "cuda", "self_conditioning": 1}
    recipe = tools.recipe(text, objective=objective, optimizer=optimizer, compile=compiled, **how)
    trainer = Trainer(recipe, prepare(recipe.data, tmp_path, False, lambda text: None))
    for _ in range(3):
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        trainer.step()
    torch.cuda.set_sync_debug_mode("default")
    trainer.read()
    assert trainer.progress.step == 6 and trainer.progress.tokens > 0 and trainer.progress.skipped == 0


@pytest.mark.parametrize(("objective", "dense"), [("autoregressive", 0), ("score", 0), ("score", 512)])
def test_what_is_compiled_learns_the_same(
    tools: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, dense: int
) -> None:
    """Held-out text, whose graph has no gradients, and a step: by blocks, and under a mask of all pairs.

    Later steps differ by more and more: rounding decides where AdamW takes a gradient that is nearly nothing.
    """
    monkeypatch.setattr("scorelm.model.attention.DENSE", dense)
    how = {"steps": 9, "log_every": 100, "precision": "float32", "device": "cuda", "self_conditioning": 1}
    found = []
    for compiled in (False, True):
        recipe = tools.recipe(text, {"model": {"dim": 64, "heads": 2}}, objective=objective, compile=compiled, **how)
        trainer = Trainer(recipe, prepare(recipe.data, tmp_path, compiled, lambda text: None))
        torch.manual_seed(1)
        for parameter in trainer.learner.denoiser.parameters():
            nn.init.normal_(parameter, std=0.2)
        trainer.measure_heldout()
        trainer.step()
        found.append([trainer.progress.heldout["weights"], float(trainer.unread.loss), float(trainer.unread.norm)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@EVERY
def test_a_gpu_repeats_a_step_bit_for_bit(objective: str, deterministic: None) -> None:
    (one, ones), (other, others) = step(GPU, objective), step(GPU, objective)
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.fixture(scope="module")
def both(make_lm: Any) -> Any:
    """For an objective: the same model on the CPU and on the GPU."""

    @cache
    def models(objective: str) -> tuple[ScoreLM, ScoreLM]:
        return make_lm(objective), make_lm(objective).to(GPU)

    return models


def assert_alike(ours: list[Any], theirs: list[Any]) -> None:
    """Six texts, which may differ where a rounding has moved a draw: one in fifty does."""
    assert [s.seed for s in ours] == [s.seed for s in theirs]
    assert sum(one.ids == other.ids and one.nfe == other.nfe for one, other in zip(ours, theirs, strict=True)) >= 4


@EVERY
def test_a_model_on_a_gpu_writes_what_it_writes_on_a_cpu(both: Any, objective: str) -> None:
    ours, theirs = both(objective)
    assert theirs.device.type == GPU.type
    options: dict[str, Any] = {"n": 3, "steps": 4}
    assert_alike(*(lm.generate(["the", ""], **options) for lm in (ours, theirs)))
    if objective == "score":
        for path, solver in (("uniform", "heun"), ("blocks:3", "posterior"), ("confidence", "ancestral")):
            options |= {"path": path, "solver": solver, "guidance": 1.5}
            assert_alike(*(lm.generate(["the", ""], **options) for lm in (ours, theirs)))


@pytest.mark.parametrize("objective", ["score", "masked"])
def test_a_model_on_a_gpu_fills_in_what_it_fills_in_on_a_cpu(both: Any, objective: str) -> None:
    texts = ["god ____ the light", "and ____ was ____"]
    assert_alike(*(lm.infill(texts, n=3, steps=4, blank_tokens=2) for lm in both(objective)))


@pytest.mark.parametrize(
    ("objective", "path", "steps"),
    [
        ("score", "uniform", None), ("score", "blocks:2", None), ("score", "ordered", None), ("score", "reverse", None),
        ("score", "random", None), ("score", "bounded", 6), ("score", "uniform", 6), ("score", "blocks:1", 6),
        ("masked", "random", None), ("masked", "bounded", 6), ("autoregressive", "ordered", None),
    ],
)  # fmt: skip
def test_a_price_on_a_gpu_is_that_on_a_cpu(both: Any, objective: str, path: str, steps: int | None) -> None:
    texts = ["and god said let there be light", "the earth was void", "day 12"]
    one, other = (price(lm, texts, path, steps=steps, draws=4) for lm in both(objective))
    assert other.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-4)
    torch.testing.assert_close(other.by_text, one.by_text, rtol=1e-4, atol=1e-4)
    assert (other.exact, other.tokens, other.nfe) == (one.exact, one.tokens, one.nfe)


def test_precision_is_an_option_on_a_gpu(both: Any) -> None:
    _, lm = both("score")
    one, other = (price(lm, "and god said", "ordered", precision=p) for p in ("float32", "bfloat16"))
    assert other.nats_per_token == pytest.approx(one.nats_per_token, rel=0.05)
    assert len(lm.generate("the", n=2, steps=3, precision="bfloat16")) == 2


NETWORKS: list[dict[str, Any]] = [
    {}, {"noise_conditioning": "film"},
    {"network": Network(family="bert", norm_eps=1e-5, kv_heads=2, positions=64, head=True)},
    {"network": Network(family="modernbert", norm_eps=1e-5, kv_heads=2, positions=64, every=2, reach=4)},
    {"network": Network(family="llama", norm_eps=1e-5, kv_heads=1, positions=64)},
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "precision", "far"), [*((config, "float32", 1e-3) for config in NETWORKS), ({}, "bfloat16", 0.5)]
)
def test_a_recorded_evaluation_gives_the_logits_of_a_plain_one(
    make_lm: Any, settings_of: Any, config: dict[str, Any], precision: str, far: float
) -> None:
    """Two texts of different shapes in turn; after five turns the weights are changed in place."""
    lm = make_lm(**config).to(GPU)
    plain, fast = lm.loop(precision), lm.loop(precision)
    plain.network.passes = None
    evaluators = Dense(plain.network), Dense(fast.network)
    special, settings = lm.tokenizer.special, settings_of(path="uniform", steps=9)
    texts = [[special.bos, 7, *[None] * 9, special.eos], [special.bos, *[None] * 20, special.eos]]
    jobs = [plain.join([text], [seed], settings) for seed, text in enumerate(texts)]
    for turn in range(8):
        if turn == 5:
            with torch.no_grad():
                lm.denoiser.prior.mul_(-1.0)
        for job in jobs:
            assert job.query is not None
            with torch.inference_mode():
                (expected,), (found,) = (evaluator([job.query]) for evaluator in evaluators)
            torch.testing.assert_close(found.logits_NV, expected.logits_NV, rtol=far, atol=far)
        plain.step()
    assert fast.network.passes is not None
    assert [shape for shape, one in fast.network.passes.kept.items() if one.graph is not None] == [(1, 16), (1, 32)]


@pytest.mark.parametrize(
    ("objective", "path", "most"),
    [
        ("score", "uniform", 0), ("score", "blocks:3", 0), ("score", "shuffled", 0), ("score", "bounded", 1),
        ("score", "surest", 1), ("score", "confidence", 2), ("masked", "bounded", 1), ("autoregressive", "blocks:1", 0),
    ],
)  # fmt: skip
def test_the_host_seldom_waits_for_the_gpu_in_generation(
    both: Any, settings_of: Any, objective: str, path: str, most: int
) -> None:
    """In an evaluation on its way, with all that goes with it; the first ones compile, or are recorded."""
    _, lm = both(objective)
    loop, special = lm.loop(), lm.tokenizer.special
    job = loop.join([[special.bos, *[None] * 18, special.eos]], [0], settings_of(path=path, steps=12))
    for _ in range(4):
        loop.step()
    evaluations = 0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        while not job.finished:
            loop.step()
            evaluations += 1
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in found if "called a synchronizing" in str(one.message)]
    assert evaluations and len(waits) <= most * evaluations, [one.lineno for one in waits]

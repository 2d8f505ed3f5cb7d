"""The training loop: it learns, logs what it says it logs, resumes bit for bit, and refuses what it cannot do."""

import json
import math
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from scorelm import ScoreLM
from scorelm.config.recipe import Recipe, TrainingConfig
from scorelm.device import matmul_peak, pick_device, pick_dtype
from scorelm.errors import DiskError, DivergedError, InputError
from scorelm.training import train
from scorelm.training.checkpoint import Saver
from scorelm.training.data import prepare
from scorelm.training.signals import deferred_signals
from scorelm.training.trainer import Trainer

STEPS = 40


@pytest.fixture(scope="module")
def recipe(tools: Any, text: Path) -> Recipe:
    return tools.recipe(text, steps=STEPS, save_every=7, keep=3, samples=2, accumulation=2, dropout=0.1)


@pytest.fixture(scope="module")
def finished(tools: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    said = tools.train(recipe, out)
    assert any("examples" in line and "held out" in line for line in said)
    return out


def after_its_first_checkpoint(run: Path, out: Path) -> Path:
    """A run as it would be if it had been killed later than its first checkpoint that is kept."""
    shutil.copytree(run, out)
    for later in sorted((out / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(out / "model")
    (out / "checkpoints" / ".writing-00000099").mkdir()  # what a kill inside a save leaves
    return out


def test_a_run_directory_has_what_the_design_says(tools: Any, finished: Path) -> None:
    assert {"recipe.toml", "metrics.jsonl", "checkpoints", "model", "tokenizer.model", "samples.txt"} == {
        p.name for p in finished.iterdir()
    }
    assert tools.checkpoints(finished) == [28, 35, 40]
    samples = (finished / "samples.txt").read_text()
    assert re.findall(r"^step (\d+)$", samples, re.M) == ["8", "16", "24", "32", "40"] and samples.count("\n  ") == 10
    lm = ScoreLM.from_pretrained(finished / "model")
    made = lm.provenance
    assert lm.recipe == (finished / "recipe.toml").read_text()
    assert (made.steps, made.tokens) == (STEPS, tools.log(finished)[-1]["tokens"]) and made.heldout_loss > 0


def test_metrics_have_the_fields_of_the_contract_and_the_loss_falls(tools: Any, finished: Path) -> None:
    log = tools.log(finished)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    for line in log:
        assert {"step", "tokens", "loss", "tokens_per_second", "packing_efficiency", "mfu", "lr", "accuracy",
                "loss_by_snr", "gradient_norm", "parameter_norm", "embedding_anisotropy"} <= line.keys()  # fmt: skip
        assert 0.5 < line["packing_efficiency"] <= 1
    bands = [line["loss_by_snr"]["none"] for line in log]  # without evidence, where levels add no spread
    blind = [loss for loss in bands if loss is not None]
    assert sum(blind[-8:]) < 0.995 * sum(blind[:8])


def test_learning_rate_warms_up_holds_and_decays_to_zero(tools: Any, finished: Path) -> None:
    rates, peak = [line["lr"] for line in tools.log(finished)], TrainingConfig().lr
    assert rates[0] == pytest.approx(peak / 3)
    assert rates[3:24] == [pytest.approx(peak)] * 21
    assert rates[24:] == pytest.approx([peak * min(1, (1 - k / 40) / 0.4) for k in range(24, 40)])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_that_another_version_had_in_another_group_are_stepped_as_today(
    tools: Any, text: Path, tmp_path: Path, optimizer: str
) -> None:
    """FiLM's offsets decayed once. What a checkpoint brings are moments, not rules."""
    recipe = tools.recipe(text, {"model": {"noise_conditioning": "film"}}, steps=4, optimizer=optimizer)
    data = prepare(recipe.data, tmp_path, False, lambda text: None)
    before, after = Trainer(recipe, data), Trainer(recipe, data)
    before.step()
    tensors = before.learner.tensors()
    decaying, others = tensors["optimizer"]["param_groups"][:2]
    decaying["params"].append(others["params"].pop())
    rules = rules_of(after)
    after.learner.load_tensors(tensors)
    assert rules_of(after) == rules
    after.step()


def rules_of(trainer: Trainer) -> list[dict[str, Any]]:
    """How the groups of weights are stepped, and how many there are in each."""
    groups = [group for optimizer in trainer.learner.optimizers for group in optimizer.param_groups]
    return [{**group, "params": len(group["params"])} for group in groups]


def test_resumed_equals_uninterrupted_bit_for_bit(tools: Any, finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = after_its_first_checkpoint(finished, tmp_path / "run")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 1')  # a torn line
    tools.train(recipe, out, resume=True)
    tools.assert_same(out, finished)
    assert tools.checkpoints(out) == [28, 35, 40]


@pytest.mark.thorough
def test_a_signal_saves_and_the_exit_code_says_which(runs: Any, tools: Any, tmp_path: Path) -> None:
    out, before = tmp_path / "run", 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        found, errors = runs(out, "--save-every", "100", kill_after=(5, 0.0, signum))
        assert found == code, errors
        assert "--resume" in errors and "Traceback" not in errors
        assert before + 4 < tools.checkpoints(out)[-1] < runs.steps
        before = tools.checkpoints(out)[-1]
    assert runs(out, "--save-every", "100")[0] == 0
    tools.assert_same(out, runs.whole)
    assert [line["lr"] for line in tools.log(out)] == [line["lr"] for line in tools.log(runs.whole)]


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    handler, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with deferred_signals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [handler]


@pytest.mark.thorough
def test_a_loss_that_is_not_finite_stops_with_a_message_and_keeps_the_checkpoint(
    tools: Any, text: Path, tmp_path: Path
) -> None:
    recipe = tools.recipe(text, steps=60, save_every=1, lr=1e30, warmup=0)
    with pytest.raises(DivergedError, match=r"^step \d+: the loss is .* in 11 steps in a row; the last checkpoint"):
        train(recipe, tmp_path / "run", say=lambda text: None)
    assert tools.checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("room", "change", "says"),
    [
        ("model", {"dim": 64}, "--model.dim can't"),
        ("noise", {"streams": 1}, "--noise.streams can't"),
        ("data", {"holdout": 0.1}, "--holdout can't"),
        ("training", {"optimizer": "muon"}, "--optimizer can't"),
        ("training", {"objective": "masked"}, "--objective can't"),
        ("training", {"ema": (0.9,)}, "--ema can't"),
        ("training", {"seed": 7, "rows": 8}, "--rows, --seed can't"),
        ("training", {"warmup": 9, "weight_decay": 0.5, "shards": 2}, "--shards, --warmup, --weight-decay can't"),
        ("training", {"steps": 40}, "--steps 40: the run has made 40"),
    ],
)
def test_what_cannot_change_is_refused_by_name_on_resume(
    finished: Path, recipe: Recipe, room: str, change: dict[str, Any], says: str
) -> None:
    changed = recipe.model_copy(update={room: getattr(recipe, room).model_copy(update=change)})
    with pytest.raises(InputError, match=f"^{says}"):
        train(changed, finished, resume=True)


def test_a_run_directory_that_cannot_be_used_is_refused(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, how, says in (
        (finished, {}, "already holds a run"),
        (finished, {"resume": True, "overwrite": True}, "--overwrite does not go with --resume"),
        (tmp_path / "new", {"fall_back": True}, "--fall-back needs --resume"),
        (tmp_path / "new", {"resume": True}, "nothing to resume"),
        (tmp_path / "file", {}, "cannot write"),
        (tmp_path / "file" / "inside", {}, "cannot write"),
    ):
        with pytest.raises(InputError, match=says) as refused:
            train(recipe, out, **how)
        assert refused.value.exit_code == 2


def test_a_finished_run_without_its_model_gets_it_back(
    tools: Any, finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """As after a kill between the last checkpoint and its model."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(out / "model")
    tools.train(tools.with_steps(recipe, None), out, resume=True)
    tools.assert_same(out, finished)


def test_held_out_text_in_which_nothing_is_to_be_predicted_ends_no_run(tools: Any, tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    pairs = [f"{a} {v}" for a in ("Ruth", "Saul", "Amos", "Leah") for v in ("sees", "eats", "sells", "hides")]
    text.write_text("\n".join([*pairs, "zz39"]))  # the last alone is held out, and in rows of 19 by chance given whole
    more = {"data": {"holdout": 0.05, "vocab_size": 290, "max_length": 19}, "noise": {"streams": 1, "given": 1.0}}
    said = tools.train(tools.recipe(text, more, rows=1, steps=2), tmp_path / "run")
    assert any("1 held out" in line for line in said)
    provenance = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["provenance"]
    assert provenance["heldout_loss"] is None


def test_bfloat16_is_chosen_only_where_it_is_native() -> None:
    cpu = pick_device("cpu")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    for name, says in (("nonesuch", "nonesuch"), ("mps", "no float64")):
        with pytest.raises(InputError, match=says):
            pick_device(name)


@pytest.mark.parametrize(("long", "sizes"), [(1e-9, [256]), (math.inf, [256, 512, 1024, 2048])])
def test_the_peak_is_measured_with_products_that_do_not_take_long(long: float, sizes: list[int]) -> None:
    """In bfloat16, on a processor that has none, one of 2,048 takes minutes."""
    with patch("scorelm.device.LONG", long), patch.object(torch, "randn", wraps=torch.randn) as made:
        assert matmul_peak(torch.device("cpu"), torch.float32) > 1e6
    assert [call.args[0] for call in made.call_args_list] == sizes


@pytest.mark.thorough
def test_bfloat16_takes_the_steps_of_float32(tools: Any, text: Path, tmp_path: Path) -> None:
    more, losses = {"model": {"noise_conditioning": "film"}}, {}
    for precision in ("float32", "bfloat16"):
        tools.train(tools.recipe(text, more, steps=12, precision=precision), tmp_path / precision)
        losses[precision] = tools.losses(tmp_path / precision)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["bfloat16"] != losses["float32"]


PLACES = pytest.mark.parametrize("places", ["exact", "fixed"])


@contextmanager
def traced() -> Iterator[list[Callable[..., Any]]]:
    """What is compiled is traced and not more; gives the functions."""
    compiled, functions = torch.compile, []

    def trace(function: Callable[..., Any], **how: Any) -> Any:
        functions.append(function)
        return compiled(function, backend="eager", fullgraph=True, dynamic=how.get("dynamic"))

    with patch.object(torch, "compile", trace):
        yield functions


def name(function: Callable[..., Any]) -> str:
    """Of a function, or of a method by the class of what it is bound to."""
    bound = getattr(function, "__self__", None)
    return function.__name__ if bound is None else f"{type(bound).__name__}.{function.__name__}"


def assert_compiled_learns_the_same(tools: Any, text: Path, directory: Path, places: str) -> None:
    one_graph = {"data": {"holdout": 0}, "model": {"layers": 1}}  # compiling takes its time
    for name in ("eager", "compiled"):
        recipe = tools.recipe(text, one_graph, steps=3, self_conditioning=0, compile=name == "compiled", places=places)
        tools.train(recipe, directory / name)
    assert tools.losses(directory / "compiled") == pytest.approx(tools.losses(directory / "eager"), rel=1e-4)


@PLACES
def test_what_is_traced_learns_the_same(tools: Any, text: Path, tmp_path: Path, places: str) -> None:
    """A layer, or with fixed places the whole loss in one graph, without a compiler."""
    with traced() as functions:
        assert_compiled_learns_the_same(tools, text, tmp_path, places)
    names = ["Loss._call_impl"] if places == "fixed" else ["Block._call_impl"]
    assert [name(function) for function in functions] == names


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood_weight", [0.0, 0.1])
def test_a_schedule_that_is_fitted_is_not_compiled_anew(
    tools: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, likelihood_weight: float
) -> None:
    """The loss is one graph, however often it is fitted."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr("scorelm.training.trainer.REFIT_EVERY", 1)
    how = {"places": "fixed", "compile": True, "self_conditioning": 0, "likelihood_weight": likelihood_weight}
    recipe = tools.recipe(text, {"data": {"holdout": 0}, "model": {"layers": 1}}, **how)
    with traced():
        trainer = Trainer(recipe, prepare(recipe.data, tmp_path, False, lambda text: None))
        fits = set()
        for _ in range(24):
            trainer.step()
            fits.add(trainer.schedule)
    assert len(fits) > 8 and counters["stats"]["unique_graphs"] == 1


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_compiled_has_the_same_gradients(tools: Any, text: Path, tmp_path: Path, precision: str) -> None:
    """Of every weight, as AOTAutograd derives them; PyTorch 2.11 gave a layer behind a norm none in float32."""
    gradients = []
    how = {"places": "fixed", "precision": precision, "self_conditioning": 1, "clip": 1e9}
    for compiled in (False, True):
        recipe = tools.recipe(text, {"model": {"layers": 1}}, compile=compiled, **how)
        with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
            trainer = Trainer(recipe, prepare(recipe.data, tmp_path, compiled, lambda text: None))
        torch.manual_seed(1)
        for parameter in trainer.learner.denoiser.parameters():
            nn.init.normal_(parameter, std=0.2)
        with patch.object(trainer.learner, "update"):
            trainer.step()
        gradients.append({name: p.grad for name, p in trainer.learner.denoiser.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.norm() > 0
        atol = 1e-5 if precision == "float32" else 1e-2
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=atol)


@pytest.mark.thorough
@pytest.mark.parametrize("objective", ["score", "masked", "autoregressive"])
def test_a_run_of_fixed_places_is_a_run_of_exact_ones(tools: Any, text: Path, tmp_path: Path, objective: str) -> None:
    more = {"model": {"layers": 1}}
    for places in ("exact", "fixed"):
        recipe = tools.recipe(text, more, steps=8, objective=objective, places=places, accumulation=2)
        tools.train(recipe, tmp_path / places)
    exact, fixed = (tools.log(tmp_path / places) for places in ("exact", "fixed"))
    for one, other in zip(fixed, exact, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["accuracy"] == other["accuracy"] and one["tokens"] == other["tokens"]
        bands = [{name: nats or 0.0 for name, nats in line["loss_by_snr"].items()} for line in (one, other)]
        assert bands[0] == pytest.approx(bands[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs g++")
@PLACES
def test_what_is_compiled_learns_the_same(
    tools: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: str
) -> None:
    """And what was made for it is kept on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    counters.clear()
    assert_compiled_learns_the_same(tools, text, tmp_path, places)
    assert list((tmp_path / "kernels").rglob("*.so"))
    kept = counters["aot_autograd"]
    assert kept["autograd_cache_saved"] > 0 and not kept["autograd_cache_bypass"]


def test_compiling_without_a_compiler_is_refused(tools: Any, text: Path, tmp_path: Path) -> None:
    from torch._inductor.config import cpp

    says = "compiling for a CPU needs a C\\+\\+ compiler, such as g\\+\\+, and there is none"
    with patch.object(cpp, "cxx", (None, "no-such-compiler")), pytest.raises(InputError, match=says):
        train(tools.recipe(text, steps=2, compile=True), tmp_path / "run")


def test_only_errors_of_the_system_become_one_line(tmp_path: Path) -> None:
    """A bug in what is written stays an error of its own, and leaves no draft behind."""
    saver = Saver(tmp_path, 2)
    with pytest.raises(TypeError):
        saver.save(1, {"a": torch.ones(2)}, {"b": object()})
    with patch("os.fsync", side_effect=OSError(28, "No space left on device")), pytest.raises(DiskError) as full:
        saver.save(1, {"a": torch.ones(2)}, {"b": math.pi})
    assert str(full.value) == f"cannot write {tmp_path / 'step-00000001'}: No space left on device"
    assert list(tmp_path.iterdir()) == []
    saver.save(1, {"a": torch.ones(2)}, {"b": math.pi})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]

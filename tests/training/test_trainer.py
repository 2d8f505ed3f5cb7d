"""The training loop in real processes: it learns, logs what it says it logs, and resumes bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scorelm.config import TrainingConfig
from scorelm.device import pick_device, pick_dtype

TINY = [
    *("--model.dim", "32", "--model.layers", "2", "--model.embedding-dim", "8", "--vocab-size", "300"),
    *("--max-length", "32", "--rows", "4", "--log-every", "1", "--warmup", "3"),
    *("--ema", "0.9", "0.5", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names, verbs, things = ["Ruth", "Saul", "Amos", "Leah"], ["sees", "eats", "sells", "hides"], ["figs", "oil", "corn"]
    lines = [f"{a} {v} {t} and {b} {w} {i}." for i, (a, v, t, b, w) in enumerate(
        (a, v, t, b, w) for a in names for v in verbs for t in things for b in names for w in verbs
    )]  # fmt: skip
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def start(text: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scorelm", "train", "--data", str(text), "--out", str(out), *TINY, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def resume(out: Path) -> None:
    command = [sys.executable, "-m", "scorelm", "train", "--out", str(out), "--resume"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until metrics.jsonl has reached a step."""
    for _ in range(1200):
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run makes no progress")


def same_model(a: Path, b: Path) -> None:
    one, two = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert (a / "model" / "config.json").read_text() == (b / "model" / "config.json").read_text()


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start(text, out, "--steps", "40", "--save-every", "7", "--sample-every", "20", "--accumulation", "2")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output == ""
    assert "Warning" not in errors, errors
    return out


def test_a_run_directory_has_what_the_design_says(finished: Path) -> None:
    assert {"recipe.toml", "metrics.jsonl", "checkpoints", "model", "tokenizer.model"} <= {
        p.name for p in finished.iterdir()
    }
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step-00000035", "step-00000040"]
    assert "step 20" in (finished / "samples.txt").read_text()


def test_metrics_have_the_fields_of_the_contract_and_the_loss_falls(finished: Path) -> None:
    log = lines(finished)
    assert [line["step"] for line in log] == list(range(1, 41))
    for line in log:
        assert {"step", "tokens", "loss", "tokens_per_second", "packing_efficiency", "mfu", "lr", "accuracy",
                "loss_by_snr", "gradient_norm", "parameter_norm", "embedding_anisotropy"} <= line.keys()  # fmt: skip
        assert 0.5 < line["packing_efficiency"] <= 1
    bands = [line["loss_by_snr"]["none"] for line in log]  # without evidence, where levels add no spread
    blind = [loss for loss in bands if loss is not None]
    assert sum(blind[-8:]) < 0.995 * sum(blind[:8])


def test_learning_rate_warms_up_holds_and_decays_to_zero(finished: Path) -> None:
    rates = [line["lr"] for line in lines(finished)]
    peak = TrainingConfig().lr
    assert rates[0] == pytest.approx(peak / 3)
    assert rates[3:24] == [pytest.approx(peak)] * 21
    assert rates[24:] == pytest.approx([peak * min(1, (1 - k / 40) / 0.4) for k in range(24, 40)])


@pytest.mark.parametrize("kill_at", [9, 16])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    finished: Path, text: Path, tmp_path: Path, kill_at: int
) -> None:
    out = tmp_path / "killed"
    process = start(text, out, "--steps", "40", "--save-every", "7", "--sample-every", "20", "--accumulation", "2")
    wait_for_step(process, out, kill_at)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (out / "checkpoints" / ".writing-00000099").mkdir(parents=True)  # what a kill inside a save leaves
    resume(out)
    same_model(finished, out)
    assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(finished)]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_exit_code_says_which(
    finished: Path, text: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    out = tmp_path / "stopped"
    process = start(text, out, "--steps", "40", "--save-every", "100", "--sample-every", "20", "--accumulation", "2")
    wait_for_step(process, out, 5)
    process.send_signal(signum)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "--resume" in errors and "Traceback" not in errors
    resume(out)
    for name in ("losses", "lr"):
        key = "loss" if name == "losses" else name
        assert [line[key] for line in lines(out)] == [line[key] for line in lines(finished)]


def test_a_loss_that_is_not_finite_stops_with_a_message_and_keeps_the_checkpoint(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "diverged"
    process = start(text, out, "--steps", "60", "--save-every", "1", "--lr", "1e30", "--warmup", "0")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("scorelm: step ") and "Traceback" not in errors
    kept = sorted((out / "checkpoints").glob("step-*"))
    assert kept and all((p / "state.json").exists() for p in kept)


def test_another_corpus_or_another_model_is_refused_on_resume(finished: Path, text: Path, tmp_path: Path) -> None:
    for flags, says in (
        (["--model.dim", "64"], "model options"),
        (["--noise.streams", "1"], "noise options"),
        (["--optimizer", "muon"], "the optimizer of a run"),
        (["--objective", "masked"], "the objective of a run"),
        (["--ema", "0.9"], "the ema of a run"),
    ):
        command = [sys.executable, "-m", "scorelm", "train", "--out", str(finished), "--resume", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr and done.stderr.count("\n") == 1


def test_held_out_text_in_which_nothing_is_to_be_predicted_ends_no_run(tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    pairs = [f"{a} {v}" for a in ("Ruth", "Saul", "Amos", "Leah") for v in ("sees", "eats", "sells", "hides")]
    text.write_text("\n".join([*pairs, "zz32"]))  # by chance the last, held out alone, is given whole
    more = ("--data.holdout", "0.05", "--vocab-size", "290", "--noise.streams", "1", "--rows", "1", "--steps", "2")
    process = start(text, tmp_path / "run", *more)
    _, errors = process.communicate()
    assert process.returncode == 0 and "1 held out" in errors, errors
    assert (tmp_path / "run" / "model").is_dir()
    provenance = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["provenance"]
    assert provenance["heldout_loss"] is None


def test_bfloat16_is_chosen_only_where_it_is_native() -> None:
    cpu = pick_device("cpu")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ValueError, match="nonesuch"):
        pick_device("nonesuch")


def test_bfloat16_autocast_trains(text: Path, tmp_path: Path) -> None:
    process = start(
        text, tmp_path / "bf16", "--steps", "12", "--precision", "bfloat16", "--model.noise-conditioning", "film"
    )
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    losses = [line["loss"] for line in lines(tmp_path / "bf16")]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs g++")
def test_compiled_layers_learn_the_same(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_graph = ("--self-conditioning", "0", "--data.holdout", "0", "--steps", "4")  # compiling takes its time
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"kernels-{name}"))
        process = start(text, tmp_path / name, *one_graph, *more)
        _, errors = process.communicate()
        assert process.returncode == 0 and "Warning" not in errors, errors
    eager, compiled = ([line["loss"] for line in lines(tmp_path / name)] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-4)
    built = [len(list((tmp_path / f"kernels-{name}").rglob("*.so"))) for name in ("eager", "compiled")]
    assert built[0] == 0 < built[1]


def test_compiling_without_a_compiler_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    process = start(text, tmp_path / "run", "--steps", "6", "--compile")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1].endswith("needs a C++ compiler, and there is no no-such-compiler")

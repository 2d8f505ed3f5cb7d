"""Full disks, damaged files, edited text, losses that are not finite, readers that go, clocks that jump."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILES = (".metadata", "__0_0.distcp", "state.json", "checksums.json")
FAILING_WRITES = [
    {"no_space": [("torch.save", "", 40)]},
    {"no_space": [("fsync", r"\.writing-.*distcp", 1)]},
    {"no_space": [("os.rename", r"\.metadata\.tmp", 1)]},
    {"no_space": [("open", r"\.writing-\d+/state\.json w", 1)]},
    {"no_space": [("fsync", r"\.writing-\d+/checksums\.json", 1)]},
    {"no_space": [("os.rename", r"/\.model-writing ", 1)]},
    {"largest_file": 500_000},
    {"largest_file": 60_000},
]


@pytest.fixture(scope="module")
def half(runs: Any, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed between its checkpoints of steps 6 and 9."""
    out = tmp_path_factory.mktemp("runs") / "half"
    code, errors = runs(out, kill_after=(8, 0.0))
    assert code == -9 and tools.checkpoints(out)[-1] >= 6, errors
    return out


@pytest.fixture
def out(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_one_line(errors: str, *words: str) -> None:
    """The last line is the command's own, has the words, and is no part of a traceback."""
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("scorelm: ") and all(word in last for word in words), errors
    assert sum(line.startswith("scorelm: ") for line in errors.splitlines()) == 1


def files_of(checkpoints: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoints)): p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}


def test_a_write_that_fails_ends_in_one_line_and_the_run_resumes(whole: Path, runs: Any, tools: Any, out: Path) -> None:
    for fault in FAILING_WRITES:
        before = tools.checkpoints(out)
        code, errors = runs(out, **fault)
        assert code == 1, (fault, code, errors)
        assert_one_line(
            errors, "could not be written", "File too large" if "largest_file" in fault else "No space left"
        )
        assert tools.checkpoints(out)[-1] >= before[-1], fault
        assert not list((out / "checkpoints").glob(".writing-*"))
    assert runs(out)[0] == 0
    assert tools.weights(out) == tools.weights(whole)


def test_a_thread_that_fails_to_write_ends_in_one_line_too(runs: Any, tools: Any, out: Path) -> None:
    for fault in FAILING_WRITES[1:4]:
        before = tools.checkpoints(out)
        code, errors = runs(out, "--async-save", **fault)
        assert code == 1, (fault, code, errors)
        assert_one_line(errors, "could not be written", "No space left")
        assert tools.checkpoints(out)[-1] >= before[-1], fault
        assert not list((out / "checkpoints").glob(".writing-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of six megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(whole: Path, runs: Any, tools: Any, half: Path, small_disk: Path) -> None:
    out, ballast = small_disk / "run", small_disk / "ballast"
    shutil.copytree(half, out)
    size = sum(p.stat().st_size for p in next((out / "checkpoints").glob("step-*")).iterdir())
    for free in (0, 20_000, size // 2, size - 20_000):
        before = tools.checkpoints(out)
        disk = os.statvfs(small_disk)
        ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
        code, errors = runs(out)
        assert code == 1, (free, code, errors)
        assert_one_line(errors, "No space left on device")
        assert tools.checkpoints(out)[-1] >= before[-1]
        ballast.unlink()
    assert runs(out)[0] == 0
    assert tools.weights(out) == tools.weights(whole)


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "truncated":
        del content[len(content) // 2 :]
    else:
        content[int(how) * len(content) // 100] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_before_use_and_named(runs: Any, tools: Any, out: Path, name: str) -> None:
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    sound = (newest / name).read_bytes()
    for how in ("missing", "truncated", "1", "30", "50", "97"):
        damaged(newest / name, how)
        before = files_of(out / "checkpoints")
        code, errors = runs(out)
        assert code == 2, (how, errors)
        assert_one_line(errors, str(newest / name), "--fall-back")
        assert errors.count("\n") == 1
        assert files_of(out / "checkpoints") == before
        (newest / name).write_bytes(sound)


def test_no_damaged_pickle_is_opened(runs: Any, out: Path) -> None:
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    trap = out / "sprung"
    (newest / ".metadata").write_bytes(b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR.")
    assert runs(out)[0] == 2
    assert not trap.exists()


def test_falling_back_continues_from_the_sound_one_and_loses_nothing(
    whole: Path, runs: Any, tools: Any, out: Path
) -> None:
    older, newest = sorted((out / "checkpoints").glob("step-*"))
    damaged(newest / "__0_0.distcp", "50")
    kept = files_of(newest)
    code, errors = runs(out, "--fall-back")
    assert code == 0, errors
    aside = newest.with_name(newest.name.replace("step", "damaged"))
    assert str(newest / "__0_0.distcp") in errors and str(aside) in errors
    assert files_of(aside) == kept
    assert [line["step"] for line in log(out)] == list(range(1, tools.STEPS + 1))
    assert tools.weights(out) == tools.weights(whole)
    for path in (out / "checkpoints").glob("step-*"):
        damaged(path / "state.json", "missing")
    before = files_of(out / "checkpoints")
    code, errors = runs(out, "--fall-back")
    assert code == 2
    assert_one_line(errors, "no sound checkpoint", "state.json is missing")
    assert files_of(out / "checkpoints") == before and older


def test_edited_text_is_refused(runs: Any, out: Path) -> None:
    sound = runs.text.read_text()
    try:
        runs.text.write_text(sound.replace("Leah hides oil", "Leah hides 0il", 1).replace("figs", "fogs", 1))
        code, errors = runs(out)
    finally:
        runs.text.write_text(sound)
    assert code == 2
    assert_one_line(errors, str(runs.text), "has changed", "start a new run")


def test_steps_that_are_not_finite_change_nothing_and_are_counted(runs: Any, tools: Any, tmp_path: Path) -> None:
    bad = [5, 6, 12, 13, 14, 40]
    one, two = tmp_path / "one", tmp_path / "two"
    assert runs(one, "--keep", "30", poison=bad)[0] == 0
    states = [json.loads(p.read_text()) for p in sorted(one.glob("checkpoints/step-*/state.json"))]
    assert [s["skipped"] for s in states[:4]] == [[0, 0], [2, 2], [2, 0], [3, 1]]
    assert states[17]["schedule"] != states[-1]["schedule"], "the schedule is no longer fitted"
    lines = log(one)
    assert [line["skipped_steps"] for line in lines] == [sum(b <= k + 1 for b in bad) for k in range(tools.STEPS)]
    for k in bad:
        assert lines[k - 1]["loss"] is None
        assert lines[k - 1]["parameter_norm"] == lines[k - 2]["parameter_norm"]
        assert lines[k - 1]["tokens"] > lines[k - 2]["tokens"]
    assert "NaN" not in (one / "metrics.jsonl").read_text() + (one / "model" / "config.json").read_text()
    for kill in (5, 8, 30):
        assert runs(two, poison=bad, kill_after=(kill, 0.01))[0] == -9
    assert runs(two, poison=bad)[0] == 0
    assert tools.weights(one) == tools.weights(two)
    assert [line["skipped_steps"] for line in log(two)] == [line["skipped_steps"] for line in lines]


def test_too_many_skipped_steps_in_a_row_end_the_run_also_across_a_resume(runs: Any, tools: Any, out: Path) -> None:
    start = tools.checkpoints(out)[-1]
    bad = list(range(start + 2, start + 10))
    code, _ = runs(out, "--save-every", "1", "--skip-limit", "4", poison=bad, kill_after=(4, 0.0))
    assert code == -9
    code, errors = runs(out, "--save-every", "1", "--skip-limit", "4", poison=bad)
    assert code == 1
    assert_one_line(errors, f"step {start + 6}:", "5 steps in a row")
    assert tools.checkpoints(out)[-1] == start + 5
    code, errors = runs(out, "--save-every", "3", "--skip-limit", "8", poison=bad)
    assert code == 0, errors


def test_a_wall_clock_that_jumps_changes_nothing(whole: Path, runs: Any, tools: Any, tmp_path: Path) -> None:
    code, errors = runs(tmp_path / "jumps", clock=True)
    assert code == 0, errors
    assert errors.count("tokens/s") > 50
    seconds = [line["seconds"] for line in log(tmp_path / "jumps")]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 1000
    assert tools.weights(tmp_path / "jumps") == tools.weights(whole)


def test_a_pipe_that_nobody_reads_stops_nothing(whole: Path, runs: Any, tools: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    handle = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(handle, bytes(fcntl.fcntl(handle, 1032)))  # F_GETPIPE_SZ: fills it
        runs.begin(tmp_path / "run", errors=pipe, clock=True, kill_after=(20, 0.0, signal.SIGTERM))
        assert runs.end(60) == 143
        runs.begin(tmp_path / "run", errors=pipe, clock=True)
        assert runs.end() == 0
    finally:
        os.close(handle)
    assert tools.weights(tmp_path / "run") == tools.weights(whole)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_reader_of_stderr_that_goes_stops_nothing(
    whole: Path, runs: Any, tools: Any, tmp_path: Path, when: str
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "scorelm", "train", "--data", str(runs.text), "--out", str(out), *tools.FLAGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stderr is not None and process.stdout is not None
    if when == "later":
        assert process.stderr.readline()
    process.stderr.close()
    process.stdout.close()
    assert process.wait() == 0
    assert tools.weights(out) == tools.weights(whole)


def test_an_error_that_nobody_reads_keeps_its_exit_code(whole: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "scorelm", "train", "--out", whole], stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait() == 2

"""Full disks, damaged files, edited text, losses that are not finite, readers that go, clocks that jump."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scorelm import ScoreLM
from scorelm.errors import InputError
from scorelm.training import train
from scorelm.training.checkpoint import list_checkpoints, seal

pytestmark = pytest.mark.thorough  # processes

FILES = (".metadata", "__0_0.distcp", "state.json", "checksums.json")
FAILING_WRITES = [
    {"no_space": [("torch.save", "", 20)]},
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


def assert_one_line(errors: str, *words: str) -> None:
    """The last line is the command's own, has the words, and is no part of a traceback."""
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("scorelm: ") and all(word in last for word in words), errors
    assert sum(line.startswith("scorelm: ") for line in errors.splitlines()) == 1


def files_of(checkpoints: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoints)): p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}


def assert_fails_to_write(runs: Any, tools: Any, out: Path, says: str, *flags: str, **fault: Any) -> None:
    """The run ends in one line, and no checkpoint is lost or half written."""
    before = tools.checkpoints(out)
    code, errors = runs(out, *flags, **fault)
    assert code == 1, (fault, code, errors)
    assert_one_line(errors, "cannot write", says)
    assert tools.checkpoints(out)[-1] >= before[-1], fault
    assert not list((out / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("faults", [FAILING_WRITES[2:7:2], pytest.param(FAILING_WRITES, marks=pytest.mark.slow)])
def test_a_write_that_fails_ends_in_one_line_and_the_run_resumes(
    runs: Any, tools: Any, out: Path, faults: list[dict[str, Any]]
) -> None:
    for fault in faults:
        says = "File too large" if "largest_file" in fault else "No space left"
        assert_fails_to_write(runs, tools, out, says, **fault)
    assert runs(out)[0] == 0
    tools.assert_same(out, runs.whole)


@pytest.mark.parametrize("faults", [FAILING_WRITES[2:3], pytest.param(FAILING_WRITES[1:4], marks=pytest.mark.slow)])
def test_a_thread_that_fails_to_write_ends_in_one_line_too(
    runs: Any, tools: Any, out: Path, faults: list[dict[str, Any]]
) -> None:
    for fault in faults:
        assert_fails_to_write(runs, tools, out, "No space left", "--async-save", **fault)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of six megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full(runs: Any, tools: Any, half: Path, small_disk: Path, count: int) -> None:
    out, ballast = small_disk / "run", small_disk / "ballast"
    shutil.copytree(half, out)
    size = sum(p.stat().st_size for p in next((out / "checkpoints").glob("step-*")).iterdir())
    for free in (size // 2, 0, 20_000, size - 20_000)[:count]:
        disk = os.statvfs(small_disk)
        ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
        assert_fails_to_write(runs, tools, out, "No space left on device")
        ballast.unlink()
    assert runs(out)[0] == 0
    tools.assert_same(out, runs.whole)


def damage(path: Path, how: str) -> None:
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
def test_damage_is_found_before_use_and_named(runs: Any, out: Path, name: str) -> None:
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    sound = (newest / name).read_bytes()
    for how in ("missing", "truncated", "1", "30", "50", "97"):
        damage(newest / name, how)
        before = files_of(out / "checkpoints")
        with pytest.raises(InputError, match=f"^{re.escape(str(newest / name))}.*--fall-back") as refused:
            train(runs.recipe, out, resume=True)
        assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
        assert files_of(out / "checkpoints") == before
        (newest / name).write_bytes(sound)


def test_no_damaged_pickle_is_opened(runs: Any, out: Path) -> None:
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    trap = out / "sprung"
    (newest / ".metadata").write_bytes(b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR.")
    with pytest.raises(InputError):
        train(runs.recipe, out, resume=True)
    assert not trap.exists()


def test_falling_back_continues_from_the_sound_one_and_loses_nothing(runs: Any, tools: Any, out: Path) -> None:
    _, newest = sorted((out / "checkpoints").glob("step-*"))
    damage(newest / "__0_0.distcp", "50")
    kept = files_of(newest)
    code, errors = runs(out, "--fall-back")
    assert code == 0, errors
    aside = newest.with_name(newest.name.replace("step", "damaged"))
    assert str(newest / "__0_0.distcp") in errors and str(aside) in errors
    assert files_of(aside) == kept
    assert [line["step"] for line in tools.log(out)] == list(range(1, runs.steps + 1))
    tools.assert_same(out, runs.whole)
    for path in (out / "checkpoints").glob("step-*"):
        damage(path / "state.json", "missing")
    before = files_of(out / "checkpoints")
    with pytest.raises(InputError, match=r"no sound checkpoint.*state\.json is missing"):
        train(runs.recipe, out, resume=True, fall_back=True)
    assert files_of(out / "checkpoints") == before


def test_edited_text_is_refused(runs: Any, text: Path, out: Path) -> None:
    sound = text.read_text()
    try:
        text.write_text(sound.replace("figs", "fogs", 1))
        with pytest.raises(InputError, match=f"^{re.escape(str(text))} has changed.*start a new run"):
            train(runs.recipe, out, resume=True, say=lambda text: None)
    finally:
        text.write_text(sound)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(runs: Any, tools: Any, tmp_path: Path) -> None:
    bad = [5, 6, 12, 13, 14, 20]
    one, two = tmp_path / "one", tmp_path / "two"
    assert runs(one, "--keep", "30", poison=bad)[0] == 0
    states = [json.loads(p.read_text()) for p in sorted(one.glob("checkpoints/step-*/state.json"))]
    assert [s["skipped"] for s in states[:4]] == [[0, 0], [2, 2], [2, 0], [3, 1]]
    assert states[3]["schedule"] != states[6]["schedule"], "the schedule is no longer fitted"
    lines = tools.log(one)
    assert [line["skipped_steps"] for line in lines] == [sum(b <= k + 1 for b in bad) for k in range(runs.steps)]
    for k in bad:
        assert lines[k - 1]["loss"] is None
        assert lines[k - 1]["parameter_norm"] == lines[k - 2]["parameter_norm"]
        assert lines[k - 1]["tokens"] > lines[k - 2]["tokens"]
    assert "NaN" not in (one / "metrics.jsonl").read_text() + (one / "model" / "config.json").read_text()
    for kill in (5, 8):
        assert runs(two, poison=bad, kill_after=(kill, 0.01))[0] == -9
    assert runs(two, poison=bad)[0] == 0
    tools.assert_same(one, two)
    assert [line["skipped_steps"] for line in tools.log(two)] == [line["skipped_steps"] for line in lines]


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


def test_a_wall_clock_that_jumps_changes_nothing(runs: Any, tools: Any, tmp_path: Path) -> None:
    code, errors = runs(tmp_path / "jumps", clock=True)
    assert code == 0, errors
    assert errors.count("tokens/s") > 2 / 3 * runs.steps
    seconds = [line["seconds"] for line in tools.log(tmp_path / "jumps")]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 1000
    tools.assert_same(tmp_path / "jumps", runs.whole)


def test_a_pipe_that_nobody_reads_stops_nothing(runs: Any, forks: Any, tools: Any, tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe", tmp_path / "run"
    os.mkfifo(pipe)
    handle = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(handle, bytes(fcntl.fcntl(handle, 1032)))  # F_GETPIPE_SZ: fills it
        forks.begin(*runs.words(out), errors=pipe, clock=True, kill_after=(20, 0.0, signal.SIGTERM))
        assert forks.end(60) == 143
        forks.begin(*runs.words(out), errors=pipe, clock=True)
        assert forks.end() == 0
    finally:
        os.close(handle)
    tools.assert_same(out, runs.whole)


def test_a_reader_of_stderr_that_goes_later_stops_nothing(runs: Any, forks: Any, tools: Any, tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe", tmp_path / "run"
    os.mkfifo(pipe)

    def read_one_line() -> None:
        with pipe.open() as reader:
            reader.readline()

    threading.Thread(target=read_one_line).start()
    forks.begin(*runs.words(out), errors=pipe, clock=True)
    assert forks.end() == 0
    tools.assert_same(out, runs.whole)


def test_a_reader_that_goes_at_once_stops_nothing(runs: Any, tools: Any, tmp_path: Path) -> None:
    """In a process of its own, of which Python's last flush is a part."""
    out = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "scorelm", *runs.words(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stderr is not None and process.stdout is not None
    process.stderr.close()
    process.stdout.close()
    assert process.wait() == 0
    tools.assert_same(out, runs.whole)


def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path: Path) -> None:
    words = ["train", "--out", tmp_path, "--recipe", "no-such-recipe"]
    process = subprocess.Popen([sys.executable, "-m", "scorelm", *words], stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait() == 2


def test_a_run_that_began_before_next_tokens_were_asked_for_is_read_as_before(tools: Any, runs: Any, out: Path) -> None:
    newest = list_checkpoints(out / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    assert state.pop("tells_next_token")
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "checksums.json").unlink()
    seal(newest)
    tools.train(tools.with_steps(runs.recipe, state["step"] + 1), out, resume=True)
    assert not ScoreLM.from_pretrained(out).provenance.tells_next_token


@pytest.mark.parametrize("age", ["no watch", "rows packed in another way"])
def test_a_checkpoint_of_an_older_version_is_refused(runs: Any, out: Path, age: str) -> None:
    newest = list_checkpoints(out / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    if age == "no watch":
        del state["watch"]
    else:
        state["batches"] = {"0": {"parent": {"next_index": 0}, "next_row": 128, "counter": 128}}
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "checksums.json").unlink()
    seal(newest)
    with pytest.raises(InputError, match=r"was written by an older scorelm: start a new run .* --init-from [^\n]*$"):
        train(runs.recipe, out, resume=True, say=lambda text: None)

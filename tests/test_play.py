"""``scorelm play``: lines in, texts out."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from scorelm.cli.entry import main


@pytest.fixture(scope="module")
def model(make_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("play") / "model"
    make_lm().save_pretrained(path)
    return path


@pytest.fixture
def play(model, monkeypatch, capsys):
    """Plays some lines; returns what was written, and what was told but the help at the beginning."""

    def played(*lines: str) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as ended:
            main(["play", str(model)])
        assert ended.value.code == 0
        shown, told = capsys.readouterr()
        return shown.splitlines(), told.partition("being written\n\n")[2]

    return played


def test_texts_are_continued_and_filled_in_with_the_next_seed_each(play, make_lm):
    lm = make_lm()
    shown, told = play("and god", "let there be ____", "/seed 9", "/again")
    assert shown[0] == lm.generate("and god", seed=0)[0].text
    for line, seed in zip(shown[1:], (1, 9), strict=True):
        assert line.replace("[", "").replace("]", "") == lm.infill("let there be ____", seed=seed)[0].text
        assert "[" in line
    assert [line.rpartition("seed ")[2] for line in told.splitlines()] == ["0", "1", "9"]


def test_four_underscores_behind_a_backslash_are_text_and_what_is_read_otherwise_is_said(play):
    shown, told = play("let there \\____")
    assert len(shown) == 1 and "[" not in shown[0]
    assert "the model reads" in told


def test_options_are_set_shown_and_taken_back(play, make_lm):
    shown, told = play(
        "/path uniform",
        "/steps 4",
        "/options",
        "a",
        "/default steps",
        "/steps",
        "/temperature",
        "/default",
        "/path",
        "",
    )
    assert shown[0] == make_lm().generate("a", path="uniform", steps=4)[0].text
    assert "/seed 0  /path uniform  /steps 4" in told
    assert (
        "steps is not set" in told and "temperature is 0.75" in told and "path is not set" in told and len(shown) == 2
    )


def test_what_is_wrong_is_said_and_changes_nothing(play, make_lm):
    shown, told = play(
        "/steps many", "/path nowhere", "/colour red", "/nats-per-step 1", "/default seed", "a", "/quit", "b"
    )
    for words in ("steps: Input should", "no path 'nowhere'", "no command or option 'colour'", "does not count nats"):
        assert words in told
    assert shown == [make_lm().generate("a")[0].text]


def in_a_terminal():
    """As a shell starts a command: stdin is its terminal, and Ctrl-C means something, which it does not behind `&`."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.thorough
def test_in_a_terminal_a_text_is_shown_while_it_comes_about_and_ctrl_c_stops_only_the_text(model, tmp_path):
    ours, theirs = pty.openpty()
    environment = os.environ | {"HOME": str(tmp_path), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "scorelm", "play", str(model)], stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment, start_new_session=True, preexec_fn=in_a_terminal,
    )  # fmt: skip
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < end, seen[-2000:]
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536)
        seen = seen.partition(words)[2]

    try:
        until(b"> ")
        os.write(ours, b"/steps 1000000\n")
        until(b"> ")
        os.write(ours, b"/path uniform\n")
        until(b"> ")
        os.write(ours, b"and god\n")
        until(b"evaluations of the network")
        os.write(ours, b"\x03")
        until(b"stopped")
        os.write(ours, b"/steps 3\n")
        until(b"> ")
        os.write(ours, b"and god\n")
        until(b"3 evaluations of the network, seed 0")
        os.write(ours, b"/quit\n")
        assert process.wait(30) == 0
        assert "/steps 3" in (tmp_path / ".cache/scorelm/play-history").read_text()
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        os.close(ours)
        os.close(theirs)

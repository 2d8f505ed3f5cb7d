"""Progress: the share that is done and the time left, as a bar in a terminal and as lines elsewhere."""

import re
import time

import pytest

from scorelm.viz import progress as module
from scorelm.viz.progress import progress, time_left


def test_the_time_left_follows_from_the_share_and_the_time_so_far():
    assert time_left(0.25, 20.0) == "0:01:00 left" and time_left(0.5, 3725.0) == "1:02:05 left"
    assert time_left(1.0, 9.0) == "0:00:00 left" and time_left(0.0, 9.0) == "time left not known yet"


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.05)


def test_without_a_terminal_there_are_lines_even_while_nothing_is_told(often, capsys):
    with progress("pricing 9 [examples]") as watch:
        time.sleep(0.08)
        watch(0.5, "blocks:4")
        time.sleep(0.2)
    first, *later = capsys.readouterr().err.splitlines()
    assert first == "pricing 9 [examples]: 0% done, time left not known yet"
    assert len(later) > 1 and set(later) == {"pricing 9 [examples]: blocks:4: 50% done, 0:00:00 left"}


def test_short_work_and_hidden_work_say_nothing(often, capsys):
    with progress("short"):
        pass
    with progress("hidden", False) as watch:
        watch(0.5)
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_there_is_a_bar_with_the_time_left(monkeypatch, capsys):
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm"}
    monkeypatch.setattr(module.Console, "_environ", terminal)  # os.environ may be another since rich was imported
    with progress("pricing 9 [examples]") as watch:
        watch(0.25, "blocks:4")
        time.sleep(0.2)
    shown = capsys.readouterr().err
    assert "pricing 9 [examples]: blocks:4" in shown and "25%" in shown and re.search(r"0:\d\d:\d\d left", shown)


def test_what_the_body_raises_comes_through(capsys):
    with pytest.raises(ZeroDivisionError), progress("dividing"):
        1 / 0  # noqa: B018
    assert capsys.readouterr() == ("", "")

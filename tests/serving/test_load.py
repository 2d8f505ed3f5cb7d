"""The server under the load of `benchmarks/serving.py`: correctness, memory and its end, whatever the speed."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def load():
    """What 200 clients in a process of their own see in a minute, and when the server is stopped under them."""
    sys.path.insert(0, BENCHMARKS)
    try:
        import serving
    finally:
        sys.path.remove(BENCHMARKS)
    return serving.run()


def test_no_answer_is_wrong(load):
    """Up to rounding, which moves a token now and then; and whoever sends nonsense is told so."""
    assert load["checked"] >= 50 and load["same_as_alone"] >= 0.97 * load["checked"]
    statuses = load["crowd"]["statuses"]
    assert set(statuses) <= {"200", "429", "left", "left, answered before", "malformed, 400"}
    assert statuses["200"] > 0 < statuses["left"] and statuses["malformed, 400"] > 0


def test_memory_is_flat(load):
    warm, end = load["megabytes_after_warm_up_and_at_the_end"]
    assert end <= 1.05 * warm


def test_what_was_accepted_is_answered_or_told_to_come_back(load):
    """None of the connections that were open breaks; who comes too late gets none."""
    statuses = load["stopped"]["statuses"]
    assert load["stopped"]["exit_code"] == 0
    assert {"200", "503"} <= set(statuses) <= {"200", "503", "ConnectError"}
    assert sum(statuses.values()) == load["clients"]

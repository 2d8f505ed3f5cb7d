"""What benchmarks/shakespeare.py counts is what nanoGPT counts."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scorelm.training.trainer import Trainer

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
TEXT = "ROMEO:\nO, she doth teach the torches to burn bright!\n\n" * 20
TINY = {"model__dim": 32, "model__layers": 1, "data__max_length": 16, "training__rows": 8, "training__steps": 2,
        "training__device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmark."""
    sys.path.insert(0, BENCHMARKS)
    try:
        import shakespeare

        yield shakespeare
    finally:
        sys.path.remove(BENCHMARKS)


def test_the_split_is_that_of_nanogpt(bench: Any) -> None:
    assert [len(side) for side in bench.split("a" * 1_115_394)] == [1_003_854, 111_540]


def test_every_held_out_character_but_the_first_is_counted_once(bench: Any) -> None:
    rows = bench.windows(list(range(1000)), 64)
    assert [token for row in rows for token in row[1:]] == list(range(1, 15 * 64 + 1))
    assert all(len(row) == 65 and row[0] == row[1] - 1 for row in rows)
    assert len(bench.windows(list(range(129)), 64)) == 2


@pytest.mark.parametrize(
    ("objective", "path", "off"),
    [("autoregressive", "ordered", 1e-5), ("score", "ordered", 1e-5), ("masked", "random", 0.03)],
)
def test_an_untrained_model_pays_for_each_character_what_its_frequency_says(
    bench: Any, objective: str, path: str, off: float
) -> None:
    data = bench.read(TEXT, "a fingerprint")
    lm = Trainer(bench.recipe("shakespeare-char", training__objective=objective, **TINY), data).model()
    assert lm is not None
    logits, special = lm.denoiser.state_dict()["prior"].double(), lm.tokenizer.special
    logits[[special.bos, special.pad, special.unk, *[special.eos] * (path == "random")]] = -torch.inf
    rows = bench.windows(data.tokenizer.encode(bench.split(TEXT)[1]), 16)
    counted = [token for row in rows for token in row[1:]]
    expected = float(-logits.log_softmax(0)[counted].mean())
    assert bench.nats(lm, rows, path, 128) == pytest.approx(expected, abs=off)


def test_a_model_is_kept_at_its_own_best(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = bench.read(TEXT, "a fingerprint")
    rows = bench.windows(data.tokenizer.encode(bench.split(TEXT)[1]), 16)
    found = {}
    for objective, paths in bench.PATHS.items():
        options = bench.recipe("shakespeare-char", training__objective=objective, **TINY)
        one = found[objective] = bench.measure(options, data, rows, 2, 2)
        assert [point["step"] for point in one["curve"]] == [1, 2]
        assert one["best"] == min(one["curve"], key=lambda point: point[paths[0]])
        assert list(one["nats_per_character"]) == list(paths)
    bench.show(found, small=True)
    assert "1.8800" in capsys.readouterr().out.splitlines()[-4]

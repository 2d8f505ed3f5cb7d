"""The arithmetic of benchmarks/scaling.py against real processes, a real backward pass and a real model."""

import sys
from pathlib import Path
from typing import Any

import pytest

from scorelm.config.recipe import ModelConfig, NoiseConfig, TrainingConfig

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def modules() -> Any:
    """The two benchmark files."""
    sys.path.insert(0, BENCHMARKS)
    try:
        import collectives
        import scaling

        yield collectives, scaling
    finally:
        sys.path.remove(BENCHMARKS)


def test_the_parameter_formula_is_exact(modules: Any) -> None:
    _, scaling = modules
    billion = scaling.BILLION
    blocks, rest = scaling.parameters(billion.model, billion.data.vocab_size)
    denoiser = scaling.on_meta(billion)
    assert blocks == sum(p.numel() for p in denoiser.backbone.parameters())
    assert blocks + rest == sum(p.numel() for p in denoiser.parameters()) == 1_007_763_456


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="bytes written are read from /proc")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_real_processes_send_and_hold_what_the_formulas_say(modules: Any, kind: str) -> None:
    collectives, scaling = modules
    found = collectives.measure(2, kind)
    blocks, rest = scaling.parameters(collectives.SIZE, collectives.VOCAB)
    for name, first_pass in (("with first pass", True), ("without", False)):
        payload = scaling.payloads(blocks, rest, collectives.SIZE.size.layers, kind, 2, first_pass)
        assert found[name]["payload"] == pytest.approx(payload, rel=0.01)
        assert found[name]["wire"] == pytest.approx(scaling.wire(payload, 2, gloo=True), rel=0.02)
    shards = 2 if kind == "fsdp" else 1
    state = scaling.state_bytes(blocks + rest, len(TrainingConfig().ema), shards)
    assert found["state"] == pytest.approx(state, rel=0.01)


def test_a_backward_pass_keeps_what_the_formula_says(modules: Any) -> None:
    """Exactly so for what layers, heads and the vocabulary add; what is left is small and the same for all."""
    collectives, scaling = modules
    excess = set()
    for layers, heads, vocab_size in ((2, 2, 1_001), (4, 2, 1_001), (2, 4, 1_001), (2, 2, 3_001)):
        config = ModelConfig(dim=128, layers=layers, heads=heads)
        draw = collectives.drawn(160, 2, vocab_size, NoiseConfig(), seed=0)
        formula = scaling.activation_bytes(config, 2, 160, 2, int(draw.live)) + scaling.mask_bytes(layers, 2, 320)
        excess.add(collectives.saved_for_backward(config, vocab_size, draw) - formula)
    assert len(excess) == 1
    assert 0 < excess.pop() < 0.04 * formula

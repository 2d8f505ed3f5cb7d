"""What only a GPU can show: the same loss and gradients as on the CPU, and no wait for the device inside a step."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from scorelm.config.recipe import ModelConfig, NoiseConfig, TrainingConfig
from scorelm.model.denoiser import Denoiser
from scorelm.noise.schedule import make_schedule
from scorelm.training.draws import sent
from scorelm.objectives.score import Batch, draw_noise, score_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
V, E = 64, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The vocabulary in several chunks; and whatever happens, waiting is allowed again afterwards."""
    monkeypatch.setattr("scorelm.model.denoiser.CHUNK", 100 * V)
    yield
    torch.cuda.set_sync_debug_mode("default")


def outcome(device: str, waiting: str = "default") -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one drawn batch."""
    torch.manual_seed(0)
    denoiser = Denoiser(ModelConfig(dim=64, layers=2, heads=2, embedding_dim=E), V)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    denoiser.to(device)
    rng, position = torch.Generator().manual_seed(1), torch.arange(160).expand(4, -1)
    batch = Batch(torch.randint(4, V, (4, 160), generator=rng), 1 + position // 70, position % 70)
    schedule = make_schedule("adaptive", E, V)
    draw = draw_noise(batch, NoiseConfig(), schedule, rng).with_noise(E, rng)
    for turn in range(2):  # the first compiles
        denoiser.zero_grad()
        placed = sent(draw, torch.device(device))
        if device == "cuda" and turn:
            torch.cuda.set_sync_debug_mode(waiting)
        found = score_loss(denoiser, placed, schedule, TrainingConfig(), live=draw.live, self_conditioned=True)
        found.loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1e9)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return float(found.loss.detach()), [p.grad.cpu() for p in denoiser.parameters() if p.grad is not None]


def test_a_gpu_computes_what_a_cpu_computes() -> None:
    (one, ones), (other, others) = outcome("cpu"), outcome("cuda")
    assert other == pytest.approx(one, rel=1e-4)
    for gradient, expected in zip(others, ones, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4)


def test_nothing_in_a_step_waits_for_the_gpu() -> None:
    outcome("cuda", waiting="error")

"""Which weight steps by which rule."""

import math

import pytest
import torch
from torch import nn

from scorelm.config.recipe import ModelConfig, TrainingConfig
from scorelm.model.denoiser import Denoiser
from scorelm.training.optimizer import (
    MUON_LR,
    Muon,
    learning_rate,
    make_averages,
    make_optimizers,
    move_averages,
    orthogonalized,
    set_learning_rate,
    step_if,
)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_has_one_rule_and_only_matrices_of_the_backbone_decay(name: str) -> None:
    """A parameter with two axes that multiplies nothing, such as FiLM's offsets or a gate, is no matrix."""
    denoiser = Denoiser(ModelConfig(dim=32, layers=2, heads=2, noise_conditioning="film"), 50)
    gate = denoiser.backbone.layers[0].gate = nn.Parameter(torch.ones(2, 32))
    optimizers = make_optimizers(denoiser, TrainingConfig(optimizer=name, weight_decay=0.3), torch.float32)
    set_learning_rate(optimizers, 1e-2)
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in found and optimizer.state[p]
                found[id(p)] = (type(optimizer), group["weight_decay"], group["lr"])
    layers = {id(p) for p in denoiser.backbone.layers.parameters()} - {id(gate)}
    others = {id(p) for p in (gate, denoiser.backbone.film.offset)}
    matrices = {id(p) for p in denoiser.backbone.parameters() if p.ndim == 2} - others
    assert layers < matrices  # FiLM's are no part of Muon
    for p in denoiser.parameters():
        if name == "muon" and id(p) in layers:
            assert found[id(p)] == (Muon, 0.3, MUON_LR * 1e-2)
        else:
            assert found[id(p)] == (torch.optim.AdamW, 0.3 if id(p) in matrices else 0.0, 1e-2)


def test_the_rate_rises_in_a_tenth_of_the_run_at_most() -> None:
    """Else a short run would be over before its rate has risen."""
    config = TrainingConfig(lr=1.0, warmup=50, decay=0.0)
    assert [learning_rate(config, step, step / 80) for step in (0, 4, 8, 79)] == pytest.approx([0.02, 0.5, 1, 1])
    assert [learning_rate(config, step, step / 5000) for step in (0, 4, 49, 4999)] == pytest.approx([0.02, 0.1, 1, 1])


def test_a_first_step_of_muon_is_orthogonal_and_of_the_size_of_adamw() -> None:
    """From a zero weight: along the polar factor of the gradient, to Muon's five iterations, with an RMS of 0.2 lr."""
    denoiser = Denoiser(ModelConfig(dim=32, layers=1, heads=1), 50)
    matrix = denoiser.backbone.layers[0].attention.out.weight  # starts at zero, so that decay does nothing
    optimizers = make_optimizers(denoiser, TrainingConfig(optimizer="muon"), torch.float32)
    set_learning_rate(optimizers, 0.1)
    generator = torch.Generator().manual_seed(0)
    for p in denoiser.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    u, _, v = torch.linalg.svd(matrix.grad.double())
    for optimizer in optimizers:
        optimizer.step()
    update = -matrix.detach().double()
    size = MUON_LR * 0.1 * 0.2 * 32**0.5  # of each singular value
    values = torch.linalg.svdvals(update) / size
    assert values.median() > 0.6 and values.max() < 1.5
    assert float((update * (u @ v)).sum() / (update.norm() * (u @ v).norm())) > 0.95
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2 * MUON_LR * 0.1, rel=0.3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_products_in_float32_keep_singular_vectors(shape: tuple[int, int]) -> None:
    """Singular values, in units of the matrix's norm, go through the polynomial five times; the vectors stay."""
    matrix_NKL = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix_NKL.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(orthogonalized(matrix_NKL, torch.float32).double(), expected, rtol=0, atol=1e-5)
    rounded = orthogonalized(matrix_NKL, torch.bfloat16).double()
    assert 1e-4 < float((rounded - expected).abs().max()) < 0.1


@pytest.mark.parametrize("together", [1, 2**24])
def test_muon_steps_as_that_of_torch(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Three steps of matrices of three shapes, two of each, one without a gradient; but for bfloat16's rounding."""
    monkeypatch.setattr("scorelm.training.optimizer.TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 24), (24, 8), (16, 16), (16, 16)]
    own = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in own]
    ours = Muon(own, 0.1, 0.3, torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in list(zip(own, theirs, strict=True))[1:]:
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        reference.step()
    for p, q in zip(own, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        if p.grad is not None:
            torch.testing.assert_close(ours.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_weights_and_moments_as_they_are(optimizer: str, bad: float) -> None:
    """Three steps, of which the second is skipped, are two."""

    def after(gradients: list[float]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        denoiser = Denoiser(ModelConfig(dim=32, layers=1, heads=1), 50)
        optimizers = make_optimizers(denoiser, TrainingConfig(optimizer=optimizer, weight_decay=0.3), torch.float32)
        for seed, scale in enumerate(gradients):
            generator = torch.Generator().manual_seed(seed)
            for p in denoiser.parameters():
                p.grad = torch.randn(p.shape, generator=generator) * (scale or bad)
            for each in optimizers:
                step_if(torch.tensor(scale > 0), each)
        moments = {
            f"{k} {i} {name}": value
            for k, each in enumerate(optimizers)
            for i, state in enumerate(each.state.values())
            for name, value in state.items()
        }
        return dict(denoiser.state_dict()) | moments

    found, once, never = after([1.0, 0.0]), after([1.0]), after([])
    assert [name for name in once if not torch.equal(found[name], once[name])] == []
    assert not torch.equal(once["context.weight"], never["context.weight"])
    goes_on = after([1.0, 0.0, 1.0])
    assert all(value.isfinite().all() for value in goes_on.values())
    assert not torch.equal(goes_on["trunk.blocks.0.attention.out.weight"], once["trunk.blocks.0.attention.out.weight"])


def test_averages_are_geometric_means_of_all_weights_there_were() -> None:
    denoiser = Denoiser(ModelConfig(dim=32, layers=1, heads=1), 50)
    averages, history = make_averages(denoiser, [0.5, 0.9]), [denoiser.prior.detach().clone()]
    for _ in range(3):
        with torch.no_grad():
            denoiser.prior += torch.randn(50)
        history.append(denoiser.prior.detach().clone())
        move_averages(averages, denoiser)
    for name, average in averages.items():
        d = float(name)
        expected = d**3 * history[0] + (1 - d) * (d**2 * history[1] + d * history[2] + history[3])
        torch.testing.assert_close(average.prior, expected)
        assert not average.training and not any(p.requires_grad for p in average.parameters())

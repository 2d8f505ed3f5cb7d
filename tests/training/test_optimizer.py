"""Which weight steps by which rule."""

import pytest
import torch

from scorelm.config.recipe import ModelConfig, TrainingConfig
from scorelm.model.denoiser import Denoiser
from scorelm.training.optimizer import MUON_LR, make_optimizers, set_learning_rate


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_has_one_rule_and_only_matrices_of_the_backbone_decay(name: str) -> None:
    denoiser = Denoiser(ModelConfig(dim=32, layers=2, heads=2, noise_conditioning="film"), 50)
    optimizers = make_optimizers(denoiser, TrainingConfig(optimizer=name, weight_decay=0.3))
    set_learning_rate(optimizers, 1e-2)
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in found and optimizer.state[p]
                found[id(p)] = (type(optimizer), group["weight_decay"], group["lr"])
    layers = {id(p) for p in denoiser.backbone.layers.parameters()}
    matrices = {id(p) for p in denoiser.backbone.parameters() if p.ndim == 2}
    assert layers < matrices  # FiLM's are no part of Muon
    for p in denoiser.parameters():
        if name == "muon" and id(p) in layers:
            assert found[id(p)] == (torch.optim.Muon, 0.3, MUON_LR * 1e-2)
        else:
            assert found[id(p)] == (torch.optim.AdamW, 0.3 if id(p) in matrices else 0.0, 1e-2)


def test_a_first_step_of_muon_is_orthogonal_and_of_the_size_of_adamw() -> None:
    """From a zero weight: along the polar factor of the gradient, to Muon's five iterations, with an RMS of 0.2 lr."""
    denoiser = Denoiser(ModelConfig(dim=32, layers=1, heads=1), 50)
    matrix = denoiser.backbone.layers[0].attention.out.weight  # starts at zero, so that decay does nothing
    optimizers = make_optimizers(denoiser, TrainingConfig(optimizer="muon"))
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

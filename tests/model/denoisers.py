"""Small denoisers, noisy rows for them, and their logits where they stand."""

import torch
from torch import nn

from scorelm.config.recipe import ModelConfig
from scorelm.model.denoiser import Denoiser
from scorelm.model.layout import CLEAN, NOISY, Layout

V, E = 50, 16


def fresh(conditioning="none", seed=0, dim=E):
    """A denoiser as it is built: its output layers are zero."""
    sizes = {"dim": 32, "layers": 2, "heads": 2, "hidden": 64, "embedding_dim": dim}
    torch.manual_seed(seed)
    return Denoiser(ModelConfig(**sizes, noise_conditioning=conditioning), V)


def trained_like(conditioning="none", seed=0):
    """A denoiser whose every weight is random, so that nothing is hidden by a layer of zeros."""
    denoiser = fresh(conditioning, seed)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


def whole(rows, length, padding=0):
    """Documents of `length`, each one block behind its ``<s>``, then padding."""
    place = torch.arange(length + padding).expand(rows, -1)
    real = (place < length).long()
    block = (place > 0).long() * real
    return Layout(real, place * real, block, torch.where((place == 0) & (real > 0), CLEAN, NOISY))


def noisy(denoiser, sigma_BL, seed=1):
    """Random ids, and their embeddings with noise of these levels; without any where sigma is inf."""
    gen = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(4, V, sigma_BL.shape, generator=gen)
    e_BLE = denoiser.embedding(ids_BL).detach()
    level_BL = torch.where(sigma_BL.isinf(), 0.0, sigma_BL)
    return ids_BL, e_BLE + level_BL[..., None] * torch.randn(e_BLE.shape, generator=gen)


def logits(denoiser, x_BLE, sigma_BL, layout, self_cond_BLE=None):
    """The logits of a prediction where they stand, [B, L, V]; 0 at positions that are not open."""
    found = denoiser.predict(x_BLE, sigma_BL, layout, self_cond_BLE)
    return found.spread(found.logits_NV)

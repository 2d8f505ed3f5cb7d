"""The backbone: what turns a soft token at every position into what its context says of it.

`Backbone` is all that the denoiser knows of it, so that a pretrained network can take its place; `Transformer` is ours,
pre-norm with SwiGLU (arXiv 2002.05202) and, as an option, FiLM (arXiv 1709.07871).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.config.recipe import ModelConfig
from scorelm.model.attention import Attention, AttentionInputs, attention_inputs
from scorelm.model.kernels import Dropout, unit_rms
from scorelm.model.layout import Layout

Count = TypeVar("Count", float, Tensor)


class Backbone(nn.Module, ABC):
    """What the denoiser, the cache of keys and values, and a distributed run ask of a network."""

    dim: int
    """Width of what goes in and comes out."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """What is compiled, and shared out over ranks, one by one."""

    @property
    @abstractmethod
    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, heads, and size of a head, of the keys and values that a layout's past holds."""

    @abstractmethod
    def forward(self, h_BLD: Tensor, sigma_BL: Tensor, layout: Layout) -> Tensor:
        """[B, L, D] in, [B, L, D] out, for positions at these noise levels; reads and fills `layout.past`."""

    def flops(self, tokens: Count, pairs: Count) -> Count:
        """FLOPs of a forward pass over `tokens` positions, of which `pairs` pairs see each other.

        2 for each weight of a matrix and position, and 4 for each pair, channel and layer. Layers that do not see far
        compute all pairs, and leave out most of them.
        """
        weights = sum(p.numel() for p in matrices_of(self))
        return 2.0 * weights * tokens + 4.0 * self.dim * len(self.layers) * pairs


def matrices_of(module: nn.Module) -> list[Tensor]:
    """The weights that multiply: those of the linear layers, and no other parameters with two axes."""
    return [part.weight for part in module.modules() if isinstance(part, nn.Linear)]


class SwiGLU(nn.Module):
    """Gated feed-forward layer; its output starts at zero."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = Dropout()
        nn.init.zeros_(self.down.weight)

    def forward(self, h_BLD: Tensor) -> Tensor:
        gate, value = self.up(h_BLD).chunk(2, dim=-1)
        result: Tensor = self.dropout(self.down(F.silu(gate) * value))
        return result


class Block(nn.Module):
    """Attention and SwiGLU, each on a normalised input that FiLM may scale and shift per position."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.feed_forward = SwiGLU(dim, hidden)

    def forward(self, h_BLD: Tensor, inputs: AttentionInputs, film: tuple[Tensor, ...] | None) -> Tensor:
        a = unit_rms(h_BLD)
        h_BLD = h_BLD + self.attention(a if film is None else torch.addcmul(a + film[1], a, film[0]), inputs)
        f = unit_rms(h_BLD)
        result: Tensor = h_BLD + self.feed_forward(f if film is None else torch.addcmul(f + film[3], f, film[2]))
        return result


class FiLM(nn.Module):
    """Scales and shifts from the noise level of each position: one projection for all layers, an offset for each.

    The features are cosines of ``t = r / (r + sigma)``, a function of log sigma that is exact at both ends
    (sigma 0: t = 1, sigma inf: t = 0).
    """

    FEATURES = 16

    def __init__(self, dim: int, layers: int, norm: float) -> None:
        super().__init__()
        self.norm = norm
        last = nn.Linear(dim, 4 * dim)
        nn.init.zeros_(last.weight)
        self.project = nn.Sequential(nn.Linear(self.FEATURES, dim), nn.SiLU(), last)
        self.offset = nn.Parameter(torch.zeros(layers, 4 * dim))

    def forward(self, sigma_BL: Tensor) -> Tensor:
        """The shared part, [B, L, 4 D]; layer k adds its ``offset[k]``."""
        t_BL1 = (self.norm / (self.norm + sigma_BL.float()))[..., None]
        harmonics = torch.arange(self.FEATURES, device=sigma_BL.device)
        shared: Tensor = self.project((math.pi * harmonics * t_BL1).cos())
        return shared


class Transformer(Backbone):
    """`Backbone` from scratch; `norm` is sqrt(E), the scale of noise levels for FiLM."""

    def __init__(self, config: ModelConfig, norm: float) -> None:
        super().__init__()
        dim, layers, heads, hidden = config.size
        self.dim, self.heads = dim, heads
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(layers))
        self.film = FiLM(dim, layers, norm) if config.noise_conditioning == "film" else None

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, heads, and size of a head."""
        return len(self.blocks), self.heads, self.dim // self.heads

    def forward(self, h_BLD: Tensor, sigma_BL: Tensor, layout: Layout) -> Tensor:
        inputs = attention_inputs(layout, self.dim // self.heads, self.training)
        shared = self.film(sigma_BL) if self.film is not None else None
        for k, block in enumerate(self.blocks):
            film = None
            if self.film is not None and shared is not None:
                film = (shared + self.film.offset[k]).chunk(4, dim=-1)
            h_BLD = block(h_BLD, inputs, film)
        return unit_rms(h_BLD)

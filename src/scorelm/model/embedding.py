"""Token embeddings of fixed norm, and the evidence that a noisy one holds about its token.

Every row of the table is L2-normalised and scaled to norm sqrt(E) (CDCD, arXiv 2211.15089, section 3.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """A learned table of V embeddings of size E, each of norm sqrt(E)."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))
        self.norm = math.sqrt(dim)

    def table(self) -> Tensor:
        """All embeddings, [V, E]."""
        return F.normalize(self.weight, dim=-1) * self.norm

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids of any shape: [..., E]."""
        return F.normalize(F.embedding(ids, self.weight), dim=-1) * self.norm


def evidence(x_NE: Tensor, sigma_N: Tensor, table_VE: Tensor, prior_V: Tensor | None = None) -> Tensor:
    """Log-likelihood of every token given a noisy embedding, up to a constant: ``<x, e_v> / sigma^2``, [N, V].

    With embeddings of one norm, ``log p(x | v) = -|x - e_v|^2 / (2 sigma^2)`` differs from it by a term without v.
    sigma inf gives exactly 0 (no evidence); sigma is floored at sqrt(E)/12, where a token is beyond doubt. In fp32.
    Log prior probabilities `prior_V`, where given, are added.
    """
    floor = math.sqrt(table_VE.shape[1]) / 12
    tau_N = sigma_N.float().clamp(min=floor).pow(-2)
    with torch.autocast(x_NE.device.type, enabled=False):
        y_NE = x_NE.float() * tau_N[:, None]
        if prior_V is None:
            return y_NE @ table_VE.float().T
        return torch.addmm(prior_V.float(), y_NE, table_VE.float().T)


def nearest_token(x_NE: Tensor, table_VE: Tensor, chunk: int = 4096) -> Tensor:
    """Ids of the tokens whose embeddings are nearest to x: [N]. Exact for embeddings themselves."""
    with torch.no_grad(), torch.autocast(x_NE.device.type, enabled=False):
        return torch.cat([(part.float() @ table_VE.T).argmax(-1) for part in torch.split(x_NE, chunk)])

"""Token embeddings of fixed norm, and the evidence that a noisy one holds about its token.

Every row of the table is L2-normalised and scaled to norm sqrt(E) (CDCD, arXiv 2211.15089, section 3.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIKE = 0.5
"""How much of the square of an embedding tells what stands beside its token, at the start; the rest is random."""


class Embedding(nn.Module):
    """A learned table of V embeddings of size E, each of norm sqrt(E)."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))
        self.norm = math.sqrt(dim)

    def bring_together(self, vectors_VE: Tensor) -> None:
        """Start tokens whose vectors point the same way near to each other; one whose vector is 0 stays as it is.

        All vectors are first turned together to where they are nearest to the embeddings (orthogonal Procrustes), since
        the axes and signs that a decomposition gives them differ from one processor to the next.
        """
        with torch.no_grad():
            alike_VE, random_VE = F.normalize(vectors_VE, dim=-1), F.normalize(self.weight, dim=-1)
            u_EE, _, v_EE = torch.linalg.svd(alike_VE.T @ random_VE)
            mixed_VE = math.sqrt(ALIKE) * alike_VE @ (u_EE @ v_EE) + math.sqrt(1 - ALIKE) * random_VE
            self.weight.copy_(F.normalize(mixed_VE, dim=-1) * self.norm)

    def table(self) -> Tensor:
        """All embeddings, [V, E]."""
        return F.normalize(self.weight, dim=-1) * self.norm

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids of any shape: [..., E]."""
        return F.normalize(F.embedding(ids, self.weight), dim=-1) * self.norm


def context_vectors(counts_SVC: Tensor, size: int) -> Tensor:
    """Vectors of all tokens, [V, size], which point the same way where tokens stand beside the same others.

    Positive pointwise mutual information with neighbours (Levy, Goldberg and Dagan 2015, TACL 3, with their smoothing),
    as wide as its largest singular values, each weighed by its root, but without the largest of all, which says how
    frequent a token is (arXiv 1702.01417). A token without neighbours has the vector 0.

    Args:
        counts_SVC: how often a token has each of C others beside it, in S places beside it.
        size: of a vector.
    """
    share_S1C = counts_SVC.sum(1, keepdim=True).pow(0.75)
    share_S1C = share_S1C / share_S1C.sum(2, keepdim=True)
    ratio_SVC = counts_SVC / (counts_SVC.sum(2, keepdim=True) * share_S1C)
    matrix_VN = torch.where(ratio_SVC > 1, ratio_SVC.log(), 0.0).transpose(0, 1).flatten(1)
    rank = min(size + 1, *matrix_VN.shape)
    with torch.random.fork_rng(devices=[]):
        u_VR, s_R, _ = torch.svd_lowrank(matrix_VN, q=min(rank + 16, *matrix_VN.shape), niter=2)
    vector_VR = u_VR[:, 1:rank] * s_R[1:rank].sqrt()
    norm_V1 = vector_VR.norm(dim=1, keepdim=True)
    vector_VR = torch.where(norm_V1 > 0.01 * norm_V1.max(), vector_VR, 0.0)  # else rounding errors point somewhere
    return F.pad(vector_VR, (0, size - rank + 1))


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

"""Random numbers for a step of a solver that is taken by hand."""

import torch

from .laws import F64, E


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Given:
    """The normal and the tokens that a test has chosen for a step, whenever they are asked for: a step is a function.

    Without tokens, the likeliest.
    """

    def __init__(self, eps_NE, token_N=None):
        self.eps_NE, self.token_N = eps_NE, token_N

    def normal(self):
        return self.eps_NE

    def token(self, logits_NV):
        return self.token_N if self.token_N is not None else logits_NV.argmax(-1)


class Random:
    """Draws for N positions from one generator."""

    def __init__(self, count, gen, dim=E):
        self.count, self.gen, self.dim = count, gen, dim

    def normal(self):
        return torch.randn(self.count, self.dim, dtype=F64, generator=self.gen)

    def token(self, logits_NV):
        u_N1 = torch.rand(len(logits_NV), 1, dtype=F64, generator=self.gen)
        return (u_N1 > logits_NV.softmax(-1).cumsum(-1)[:, :-1]).sum(-1)

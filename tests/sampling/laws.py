"""Laws that are known exactly, for solvers and paths: one position's mixture, and three tokens that depend on another.

`mixture_denoiser` and `joint_denoiser` stand where a model stands, so that the library's own loop samples the laws.
"""

import math
from functools import cache
from itertools import product

import torch

from scorelm.config.generation import Generation
from scorelm.config.recipe import ModelConfig
from scorelm.model.denoiser import Denoiser
from scorelm.noise.schedule import Log, Power
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.evaluator import Network
from scorelm.sampling.loop import Loop, generate
from scorelm.sampling.request import Settings

from ..conftest import SPECIAL
from ..evaluation.exact import REAL, Exact, Law

INF, F64 = math.inf, torch.float64
BOS, EOS, PAD, UNK = SPECIAL
SOLVERS = ["euler", "heun", "dpmpp_2m", "ancestral", "ancestral:0.5", "sde", "posterior", "renoise"]

# --- one position -----------------------------------------------------------------------------------------------------

E = 4
PRIOR = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=F64)
SCHEDULE = Log(0.4, 8.0)


def make_table():
    table = torch.randn(4, E, dtype=F64, generator=torch.Generator().manual_seed(0))
    return math.sqrt(E) * table / table.norm(dim=-1, keepdim=True)


TABLE = make_table()


def bayes(x_NE, sigma_N):
    """log prior + log N(x; e, sigma^2), up to a constant: a Gaussian mixture. At sigma 0 the embedding itself."""
    square_NV = (x_NE[:, None] - TABLE.to(x_NE)).pow(2).sum(-1)
    return PRIOR.to(x_NE).log() - square_NV / (2 * sigma_N.clamp(min=1e-3)[:, None] ** 2)


def mixture_denoiser():
    """Without context, `Denoiser` is Bayes' rule on its prior: tokens 4 to 7 are the mixture's, 0 to 3 no text."""
    denoiser = Denoiser(ModelConfig(dim=8, layers=1, heads=1, hidden=8, embedding_dim=E), 8)
    with torch.no_grad():
        denoiser.embedding.weight.copy_(torch.cat([-TABLE, TABLE]))
        denoiser.prior.copy_(torch.cat([torch.full((4,), -30.0), PRIOR.log().float()]))
    return denoiser.eval()


def frequencies(ids):
    """Shares of four tokens, counted from 0."""
    return torch.bincount(ids.flatten(), minlength=4).double() / ids.numel()


def chi_square(share_V, law_V, count):
    return float(count * ((share_V - law_V) ** 2 / law_V).sum())


# --- three tokens of two words ----------------------------------------------------------------------------------------

SEQUENCES = torch.tensor(list(product((0, 1), repeat=3)))
LAW = torch.tensor(
    [(0.6 if a else 0.4) * (0.85 if b == a else 0.15) * (0.9 if c == a ^ b else 0.1) for a, b, c in SEQUENCES.tolist()],
    dtype=F64,
)
"""The second token mostly repeats the first, the third is mostly their exclusive or."""


@cache
def joint_denoiser():
    """The exact posterior of `LAW`; the embeddings of its words are -1 and 1."""
    table = torch.tensor([[1.0]] * REAL + [[-1.0], [1.0]])
    return Exact(Law(SEQUENCES.tolist(), LAW.tolist()), table=table)


def sample_jointly(path, solver, steps, rows, seed=0):
    """Frequencies of the eight sequences in `rows` samples of `steps` steps along a path, and the steps made."""
    denoiser, made, counts = joint_denoiser(), 0, torch.zeros(8, dtype=F64)
    loop = Loop(Network(denoiser, SPECIAL), Power(0.15, 8.0, rho=5.0), OBJECTIVES["score"].evaluator)
    settings = settings_for_steps(path, solver, steps)
    for first in range(seed * rows, (seed + 1) * rows, 250):  # packing takes time that grows as the square of the rows
        seeds = range(first, min(first + 250, (seed + 1) * rows))
        *_, record = generate(loop, [[BOS, None, None, None, EOS]] * len(seeds), seeds, settings)
        assert (record.sigma_BL == 0).all()
        made = max(made, record.step)
        codes_B = (record.ids_BL[:, 1:4] - REAL) @ torch.tensor([4, 2, 1])
        counts += torch.bincount(codes_B, minlength=8)
    denoiser.seen.clear()
    return counts / rows, made


def settings_for_steps(path, solver, steps, **options):
    """Settings whose path makes `steps` steps, whatever the solver's evaluations."""
    for evaluations in range(steps, 3 * steps + 1):
        settings = Settings.of(Generation.of(path=path, solver=solver, steps=evaluations, **options))
        if settings.path_steps == steps:
            return settings
    raise AssertionError(f"{solver} makes no {steps} steps on {path}")


def total_variation(share_V):
    return float((share_V - LAW).abs().sum() / 2)

"""Walking a path without a network: positions go exactly where it says, and it sees what a test lets it see."""

import math

import torch

from scorelm.model.prediction import Prediction
from scorelm.sampling.paths import make_path
from scorelm.sampling.state import Budget, start

from ..conftest import SPECIAL

INF, E = math.inf, 64
STATIC = (
    "shuffled", "uniform", "ramp", "ramp:0", "ramp:0.25", "ramp:1", "ramp:7", "ramp:1e9", "blocks", "blocks:1",
    "blocks:3",
)  # fmt: skip
ADAPTIVE = ("confidence", "confidence:0", "confidence:0.7", "entropy", "entropy:0.5", "entropy:1e9")


class Seen:
    """What paths read of a `Prediction`, with the entropies, rates and confidences [B, L] that a test has chosen.

    A rate is ``(E - |x0|^2) / 2`` nats per unit of sigma^-2, so that the estimates are as long as the rates say.
    """

    spread = Prediction.spread

    def __init__(self, open_BL, entropy_BL, rate_BL, confidence_BL):
        self.open_BL, self.table_VE = open_BL, torch.zeros(1, E)
        self.entropy_N, self.top_probability_N = entropy_BL[open_BL], confidence_BL[open_BL]
        length_N1 = (E - 2 * rate_BL[open_BL].double()).sqrt()[:, None]
        self.x0_NE = torch.cat([length_N1, torch.zeros(len(length_N1), E - 1)], 1)


class World:
    """What a path is shown at every look: functions of sigma [B, L] and of the number of the look, from 0."""

    def __init__(self, entropy=None, rate=None, confidence=None):
        self.shown = [function or constant([1.0]) for function in (entropy, rate, confidence)]

    def __call__(self, state, look):
        return Seen(state.open_BL, *(function(state.sigma_BL, look) for function in self.shown))


def constant(values):
    tensor = torch.tensor(values)
    return lambda sigma_BL, look: tensor.expand(sigma_BL.shape)


def begin(text, free_BL, steps, schedule, nats=None):
    """A path and the state before its first step, row b drawing from seed b; ``<s>`` stands in column 0 if given."""
    path = make_path(text)
    templates = [[None if free else 9 for free in row] for row in free_BL.tolist()]
    for template in templates:
        template[0] = SPECIAL.bos if template[0] else None
    budget = Budget(schedule, steps, nats)
    return path, start(torch.zeros(10, E), templates, range(len(templates)), SPECIAL, path.block, budget)


def follow(path, state, world=None):
    """All levels of a path, step by step, until every free position is at 0; an adaptive one looks once in each."""
    while state.open_BL.any():
        seen = world(state, state.step) if path.adaptive else None
        state.step += 1
        state.sigma_BL = path.next_levels(seen, state)
        yield state.sigma_BL


def walk(text, free_BL, steps, schedule, world=None, nats=None):
    """`follow` from `begin`, as a list."""
    path, state = begin(text, free_BL, steps, schedule, nats)
    before = [generator.get_state() for generator in state.rows.generators]
    levels = list(follow(path, state, world or World()))
    if path.adaptive:  # what is decided from the posterior is not drawn
        assert all(torch.equal(g.get_state(), b) for g, b in zip(state.rows.generators, before, strict=True))
    return levels

"""Models for tests of generation."""

import pytest
import torch

LENGTHS = (0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 1, 1)  # at most 15 tokens


@pytest.fixture(scope="session")
def lm(make_lm):
    """Documents of at most 15 tokens."""
    return make_lm(lengths=LENGTHS)


@pytest.fixture(scope="session")
def long_lm(make_lm):
    """Documents of at most 44 tokens."""
    return make_lm()


@pytest.fixture(scope="session")
def calm_lm(make_lm):
    """Positions see each other, but so little that a rounding stays one: whole texts can be compared."""
    lm = make_lm()
    with torch.no_grad():
        lm.denoiser.context.weight *= 0.1
    return lm

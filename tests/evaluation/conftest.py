"""What tests of evaluation share."""

import pytest
import torch

from scorelm.evaluation.walk import walk

from .exact import SCHEDULE


@pytest.fixture
def no_grad():
    """For tests of functions that leave this to their callers."""
    with torch.no_grad():
        yield


@pytest.fixture
def cost(loop_of, settings_of):
    """The price of a batch in some steps of a path."""

    def priced(denoiser, batch, path, steps, seed=0, schedule=SCHEDULE):
        return walk(loop_of(denoiser, schedule), batch, settings_of(path=path, steps=steps), seed)

    return priced

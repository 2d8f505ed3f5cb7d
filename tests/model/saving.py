"""A small model to be saved, and what is told of a directory that cannot be loaded."""

import pytest
import torch
from torch import nn

from scorelm import ScoreLM
from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError
from scorelm.model.directory import Provenance
from scorelm.model.layout import Layout
from scorelm.noise.schedule import Gumbel

LINES = ["in the beginning god created the heaven and the earth", "and god said let there be light 12"] * 5
CONFIG = ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=16)


def make(tokenizer, config=CONFIG, seed=0, schedule=None):
    torch.manual_seed(seed)
    schedule = schedule or Gumbel(0.7, 20.0, mu=0.9, beta=0.45)
    provenance = Provenance(data="four lines", steps=12, tokens=3456, heldout_loss=1.25)
    lm = ScoreLM(config, tokenizer, schedule, [0] * 4 + [1, 2, 3, 4, 5, 4, 3, 2, 1], provenance)
    for parameter in lm.denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return lm.eval()


def logits(lm):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 16, generator=gen)
    sigma = torch.tensor([0, 0.5, 1, 2, 4, 8, 16, torch.inf]).expand(2, 8)
    place = torch.arange(8).expand(2, 8)
    with torch.no_grad():
        return lm.denoiser.predict(x, sigma, Layout.one_stream(place * 0 + 1, place, (place > 0).long())).logits_NV


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        ScoreLM.from_pretrained(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)

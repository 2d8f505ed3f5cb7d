"""The backbone: FiLM at every noise level, and what a pass costs."""

import math

import torch
from torch import nn

from .denoisers import E, V, fresh, logits, noisy, trained_like, whole

INF = math.inf


def test_film_is_per_position():
    """A position's own level moves its own modulation: with attention cut off, no other position's logits change."""
    denoiser = trained_like("film")
    for block in denoiser.trunk.blocks:
        nn.init.zeros_(block.attention.out.weight)
    sigma = torch.tensor([[1.0, 2.0, 3.0, INF, 5.0]])
    other = torch.tensor([[1.0, 2.0, 9.0, INF, 5.0]])
    _, x = noisy(denoiser, sigma)
    x2 = x.clone()
    x2[0, 2] *= 9.0  # the same evidence
    one, two = logits(denoiser, x, sigma, whole(1, 5))[0], logits(denoiser, x2, other, whole(1, 5))[0]
    assert torch.equal(one[[0, 1, 3, 4]], two[[0, 1, 3, 4]])
    assert (one[2] - two[2]).abs().max() > 1e-4


def test_film_features_are_exact_at_both_ends():
    film = trained_like("film").trunk.film
    ends = film(torch.tensor([[0.0, INF]]))
    assert torch.isfinite(ends).all()
    k = torch.arange(film.FEATURES)
    expected = torch.stack([(-1.0) ** k, torch.ones(film.FEATURES)])  # cos(pi k), cos 0
    torch.testing.assert_close(ends[0], film.project(expected), rtol=1e-4, atol=1e-5)
    near = film(torch.tensor([[1e-6, 1e7]]))
    torch.testing.assert_close(near, ends, rtol=1e-3, atol=1e-3)


def test_flops_are_those_of_every_product():
    """Counted by hand for one stream of two documents: 2 FLOPs for each weight and position, and attention's pairs."""
    denoiser = fresh()
    noisy_count, live = 4, 6
    layer = 32 * 96 + 32 * 32 + 32 * 128 + 64 * 32  # queries, keys and values; their sum; SwiGLU up and down
    tokens = 2 * 2 * layer * 8
    pairs = 2 * 2 * 2 * 32 * (25 + 9)  # two layers, scores and sums of values
    vocabulary = 2 * (noisy_count * (V * E + V * 32) + live * 32 * V)
    assert denoiser.flops(8, 25 + 9, noisy_count, live) == tokens + pairs + vocabulary
    assert denoiser.flops(2 * 8, 2 * (25 + 9), noisy_count, live) == 2 * (tokens + pairs) + vocabulary

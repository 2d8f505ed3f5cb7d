"""What a step learns from: packed rows with their noise drawn, the same ones however many ranks share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from scorelm.config import Recipe
from scorelm.model.attention import Layout
from scorelm.model.denoiser import Places
from scorelm.noise.schedule import Schedule
from scorelm.text.packing import first_fit
from scorelm.training.data import Shard, TrainingData
from scorelm.training.loss import Batch, Draw

HELDOUT_BATCHES = 4
SHARED = 2**31
"""In the place of a shard's number: what is drawn for the whole step."""
MULTIPLE = 64
"""Of positions, that the width of narrowed rows is a multiple of: few widths are few shapes to prepare kernels for."""


def generator(*words: int) -> torch.Generator:
    """A CPU generator whose numbers depend on these words alone."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """A packed batch as tensors."""
    return Batch(*(torch.from_numpy(arrays[name]) for name in Batch._fields))


def draw_step(
    shards: Sequence[Shard], draw: Callable[..., Draw], recipe: Recipe, schedule: Schedule, step: int
) -> list[tuple[Batch, Draw]]:
    """This rank's rows of a step's batches, `accumulation` of them.

    A shard's noise comes from a generator seeded by (seed, step, shard), for all of its rows, so that a row's noise
    does not depend on who computes it.
    """
    rngs = [generator(recipe.training.seed, step, shard.index) for shard in shards]
    found = []
    for _ in range(recipe.training.accumulation):
        parts = []
        for shard, rng in zip(shards, rngs, strict=True):
            batch = to_batch(next(shard.batches))
            drawn = draw(batch, recipe.noise, schedule, rng).with_noise(recipe.model.embedding_dim, rng)
            parts.append(take(batch, drawn, shard.rows))
        found.append(joined(parts))
    return found


def draw_heldout(data: TrainingData, draw: Callable[..., Draw], recipe: Recipe, schedule: Schedule) -> list[Draw]:
    """A few held-out batches with noise that is always the same."""
    found = []
    for k, arrays in enumerate(islice(data.heldout_batches(recipe), HELDOUT_BATCHES)):
        rng = generator(1, k)
        drawn = draw(to_batch(arrays), recipe.noise, schedule, rng)
        found.append(drawn.with_noise(recipe.model.embedding_dim, rng))
    return found


def take(batch: Batch, draw: Draw, rows: slice) -> tuple[Batch, Draw]:
    """Some of the rows."""
    return Batch(*(t_BL[rows] for t_BL in batch)), draw.map(lambda t: t[rows])


def joined(parts: Sequence[tuple[Batch, Draw]]) -> tuple[Batch, Draw]:
    """The rows of all parts in one."""
    if len(parts) == 1:
        return parts[0]
    batches, draws = zip(*parts, strict=True)

    def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])

    ids, sigma, shared, layouts, weights, eps, _ = zip(*draws, strict=True)
    names = ("segment_BL", "position_BL", "block_BL", "stream_BL")
    segment, position, block, stream = (torch.cat([getattr(layout, name) for layout in layouts]) for name in names)
    layout = Layout(segment, position, block, stream)
    draw = Draw(torch.cat(ids), torch.cat(sigma), torch.cat(shared), layout, cat(weights), cat(eps))
    return Batch(*(torch.cat(t) for t in zip(*batches, strict=True))), draw


def sent(draw: Draw, device: torch.device) -> Draw:
    """The draw on a device, with its places, which are found here so that the device need not be waited for."""
    draw = narrowed(draw) if device.type == "cpu" else draw
    places = Places.of(draw.sigma_BS, draw.layout)

    def move(t: Tensor) -> Tensor:
        return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)

    return draw.map(move)._replace(places=Places(*map(move, places)))


def narrowed(draw: Draw) -> Draw:
    """The same documents in narrower rows, where the longest takes half of a row or less.

    A row's attention costs the square of its length, whoever sees whom in it, unless blocks of it are skipped.
    """
    segment_BS = draw.layout.segment_BL
    length = segment_BS.shape[1]
    document_P = (segment_BS + (segment_BS.amax() + 1) * torch.arange(len(segment_BS))[:, None]).flatten()
    place_N = (segment_BS.flatten() > 0).nonzero().squeeze(1)
    _, extent_D = torch.unique(document_P[place_N], return_counts=True)
    width = -(-int(extent_D.max()) // MULTIPLE) * MULTIPLE if len(extent_D) else length
    if 2 * width > length:
        return draw
    pieces = place_N[document_P[place_N].argsort(stable=True)].numpy()
    index_RW = torch.from_numpy(first_fit(np.split(pieces, extent_D.cumsum(0)[:-1].numpy()), width))
    real_RW, at_RW = index_RW >= 0, index_RW.clamp(min=0)

    def taken(t_BS: Tensor) -> Tensor:
        return t_BS.flatten(0, 1)[at_RW]

    found = draw.map(taken)
    layout = replace(found.layout, segment_BL=torch.where(real_RW, document_P[at_RW], 0))
    return found._replace(sigma_BS=found.sigma_BS.where(real_RW, 0.0), layout=layout)

"""Evaluators: how queries of several requests become passes of the network, and predictions come back.

`Dense` packs all rows that are asked about side by side; `Cached` evaluates only what is new on a path of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.device import pick_dtype, send
from scorelm.model.denoiser import Denoiser, Places
from scorelm.model.layout import CLEAN, NOISY, Layout, token_by_token
from scorelm.model.passes import MOST, ONE_AT_A_TIME, passes_of, round_up
from scorelm.model.prediction import Prediction
from scorelm.sampling.cache import BlockCache
from scorelm.sampling.query import Placed, Query, joined
from scorelm.sampling.state import side_by_side
from scorelm.text.tokenizer import Special


def rule_out(logits_NV: Tensor, closed: Tensor | bool, special: Special, allowed_NV: Tensor | None = None) -> Tensor:
    """The logits, in place, without what is never written: ``<s>``, ``<pad>``, ``<unk>``, and a second ``</s>``.

    Sampler and prices share this rule, so that a price is that of text that can be written.

    Args:
        logits_NV: of N positions.
        closed: whether the position's row has its ``</s>`` already, [N], or whether all have.
        special: ids of the special tokens.
        allowed_NV: what the request allows where, if it does not allow everything.
    """
    if allowed_NV is not None:
        logits_NV.masked_fill_(~allowed_NV, -torch.inf)
    for token in (special.bos, special.pad, special.unk):  # a list of them would be copied to a GPU each time
        logits_NV[:, token].fill_(-torch.inf)
    if isinstance(closed, Tensor):
        logits_NV[:, special.eos].masked_fill_(closed, -torch.inf)
    elif closed:
        logits_NV[:, special.eos].fill_(-torch.inf)
    return logits_NV


class Network:
    """A denoiser made ready for a generation: its precision, its table of embeddings, and what it never writes.

    Args:
        denoiser: the model.
        special: ids of the special tokens.
        precision: of matrix products.
        allowed_KV: which tokens may be written where there is a condition; see `scorelm.text.templates.tokens_for`.
    """

    def __init__(
        self, denoiser: Denoiser, special: Special, precision: str = "float32", allowed_KV: Tensor | None = None
    ) -> None:
        self.table_VE, self.special = denoiser.embedding.table(), special
        self.device = self.table_VE.device
        self.allowed_KV = None if allowed_KV is None else allowed_KV.to(self.device)
        self.dtype = pick_dtype(precision, self.device)
        self.denoiser = denoiser if self.dtype == torch.float32 else denoiser.lowered(self.dtype)
        self.passes = passes_of(self.denoiser) if self.device.type == "cuda" else None
        """What computes small batches in fixed shapes, where launches take the time."""

    @property
    def autocast(self) -> AbstractContextManager[None]:
        """The precision of matrix products."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def answer(self, logits_XV: Tensor, open_RW: Tensor, query: Query, placed: Placed) -> Tensor:
        """Logits [N, V] of the open positions of a query in reading order, without what is never written.

        Args:
            logits_XV: of those positions in the order of the placed rows; where these are fixed, of all positions.
            open_RW: which are open.
            query: that is answered.
            placed: where its positions stand.
        """
        order_N = placed.at_RW[open_RW].argsort()
        chosen_N = open_RW.flatten().nonzero().squeeze(1)[order_N] if placed.fixed else order_N
        if placed.fixed or (order_N.diff() < 0).any():
            logits_XV = logits_XV[send(chosen_N, self.device)]
        closed_N, hole_N, allowed_NV = query.closed_BL[query.open_BL], query.hole_BL[query.open_BL], None
        if self.allowed_KV is not None and hole_N.any():
            allowed_NV = self.allowed_KV[send(hole_N, self.device)]
        some, every = bool(closed_N.any()), bool(closed_N.all())
        closed = every if some == every else send(closed_N, self.device)
        return rule_out(logits_XV, closed, self.special, allowed_NV)

    def noisy(self, query: Query, placed: Placed) -> Tensor:
        """Logits [N, V] of the open positions of a query, in reading order; noisy embeddings are read."""
        sigma_RW = torch.where(placed.layout.segment_BL > 0, query.sigma_BL.flatten()[placed.at_RW], 0.0)
        if not placed.fixed:
            open_RW = sigma_RW > 0 if placed.asks_RW is None else (sigma_RW > 0) | placed.asks_RW
            return self.answer(self.exactly(query, placed, sigma_RW), open_RW, query, placed)
        with ONE_AT_A_TIME:
            return self.answer(self.in_pass(query, placed, sigma_RW), sigma_RW > 0, query, placed)

    def exactly(self, query: Query, placed: Placed, sigma_RW: Tensor) -> Tensor:
        """Logits [N, V] of the positions with `sigma_RW` above 0 and of what those placed ask for, and no others."""
        x_RWE, x0_RWE, ids_RW = (placed.take(t) for t in (query.x_BLE, query.x0_BLE, query.ids_BL))
        places = Places.of(sigma_RW, placed.layout, placed.asks_RW).to(self.device)
        asks_RW = None if placed.asks_RW is None else send(placed.asks_RW, self.device)
        sigma_RW = send(sigma_RW, self.device)
        self_cond_RWE = torch.where((sigma_RW > 0)[..., None], x0_RWE, 0.0)
        with self.autocast:
            return self.denoiser.predict(
                x_RWE, sigma_RW, placed.layout_there, self_cond_RWE, ids_RW, self.table_VE, places, asks_RW
            ).logits_NV

    def in_pass(self, query: Query, placed: Placed, sigma_RW: Tensor) -> Tensor:
        """Logits [R W, V] of all positions; those of the next evaluation take their place."""
        self.passes = passes_of(self.denoiser)  # weights may have moved
        rows, length = sigma_RW.shape
        one = self.passes.of_shape(rows, length, self.table_VE.shape[1], self.device)
        one.read(placed.at_there_RW, query.x_BLE, query.x0_BLE, query.ids_BL, sigma_RW, placed.layout_there)
        return one.logits(self.denoiser, self.dtype)

    def place(self, at_RW: Tensor, layout: Layout) -> Placed:
        """Rows of positions on the network's device, padded to one of a few shapes if they are to be a `Pass`."""
        rows, length = at_RW.shape
        more_rows, more_length = (new - old for new, old in zip(round_up(rows, length), at_RW.shape, strict=True))
        padding = (0, more_length, 0, more_rows)
        fixed = self.passes is not None and (rows + more_rows) * (length + more_length) * len(self.table_VE) <= MOST
        if fixed:
            at_RW, layout = F.pad(at_RW, padding), layout.map(lambda t_BL: F.pad(t_BL, padding))
        return Placed.of(at_RW, layout, self.device, fixed=fixed)


class Evaluator(Protocol):
    """Answers queries, all of them in as few passes as it can."""

    def __call__(self, queries: Sequence[Query]) -> list[Prediction]:
        """The predictions, one for each query, at its open positions."""


class Dense:
    """Rows of all queries side by side in rows of the network, which are as long as the longest of them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.packed: tuple[list[Tensor], tuple[int, ...], Placed] | None = None

    def __call__(self, queries: Sequence[Query]) -> list[Prediction]:
        """One pass for all of them."""
        query = joined(queries)
        logits_NV = self.network.noisy(query, self._pack(queries, query))
        return answers(queries, logits_NV, self.network.table_VE)

    def _pack(self, queries: Sequence[Query], query: Query) -> Placed:
        """Where the positions stand side by side; kept while rows stay as they are."""
        extents, rows = tuple(query.reach_BL.sum(1).tolist()), [q.position_BL for q in queries]
        kept = self.packed
        if kept is None or kept[1] != extents or not same(kept[0], rows):
            layout = Layout.one_stream(query.reach_BL.long(), query.position_BL, query.block_BL)
            kept = self.packed = rows, extents, self.network.place(*side_by_side(layout, extents))
        placed = kept[2]
        if not query.in_blocks:
            return placed
        layout = finish(placed.layout, query.finished_BL.flatten()[placed.at_RW])
        return Placed.of(placed.at_RW, layout, self.network.device, fixed=placed.fixed)


def finish(layout: Layout, finished_BL: Tensor) -> Layout:
    """The layout with some positions as in a clean copy, which later blocks read."""
    stream_BL = torch.where(finished_BL, CLEAN, layout.stream_BL)
    block_BL = torch.where(finished_BL, token_by_token(layout.position_BL, layout.block_BL), layout.block_BL)
    return replace(layout, block_BL=block_BL, stream_BL=stream_BL)


def same(requests: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two sets of requests are the same ones, by the identity of their tensors."""
    return len(requests) == len(others) and all(a is b for a, b in zip(requests, others, strict=True))


def answers(queries: Sequence[Query], logits_NV: Tensor, table_VE: Tensor) -> list[Prediction]:
    """Each query's part of the logits of all of them."""
    if len(queries) == 1:
        return [Prediction.of(logits_NV, queries[0].open_BL, table_VE)]
    parts = torch.split(logits_NV, [int(q.open_BL.sum()) for q in queries])
    return [Prediction.of(part, q.open_BL, table_VE) for part, q in zip(parts, queries, strict=True)]


Reader = Callable[[Query, Placed], Tensor]
"""``read(query, placed)``: logits [N, V] of the query's open positions, in reading order."""


class Cached:
    """On paths of blocks: what was just finished and the next block, behind the keys and values before them.

    A block of one token that the finished one before it can tell is not read.

    Args:
        network: that answers.
        window: how many positions back a block sees; 0 for all.
        read: what the network reads at a position.
        causal: whether every position is a clean block of its own, as in an autoregressive model.
    """

    def __init__(self, network: Network, window: int, read: Reader, causal: bool = False) -> None:
        self.network, self.read = network, read
        self.window, self.causal = window, causal
        self.cache: BlockCache | None = None
        self.held: list[Tensor] = []
        """Which rows the cache is of: the positions of each request."""

    def __call__(self, queries: Sequence[Query]) -> list[Prediction]:
        """One pass for all of them."""
        query = joined(queries)
        cache = self._cache(queries, query.sigma_BL.shape)
        told_BL = self._told(query, cache)
        row_R, column_RW = cache.place(query.reach_BL & ~told_BL)
        real_RW, at_RW = column_RW >= 0, row_R[:, None] * query.sigma_BL.shape[1] + column_RW.clamp(min=0)
        position_RW, block_RW = (t_BL.flatten()[at_RW] for t_BL in (query.position_BL, query.block_BL))
        noisy = Layout(real_RW.long(), position_RW, block_RW, torch.full_like(block_RW, NOISY))
        layout = finish(noisy, torch.tensor(True) if self.causal else query.finished_BL.flatten()[at_RW])
        past = cache.past(row_R, query.position_BL, query.block_BL, column_RW.amax(1))
        asks_RW = real_RW & told_BL.roll(-1, 1).flatten()[at_RW] if told_BL.any() else None
        logits_NV = self.read(query, Placed.of(at_RW, layout, self.network.device, past, asks_RW=asks_RW))
        cache.keep(past, row_R, column_RW, real_RW & (layout.stream_BL == CLEAN))
        return answers(queries, logits_NV, self.network.table_VE)

    def _told(self, query: Query, cache: BlockCache) -> Tensor:
        """Open positions whose token is told by the one before, which is to be computed, and which are left out."""
        if self.causal or not self.network.denoiser.tells_next_token:
            return torch.zeros_like(query.alone_BL)
        return query.alone_BL & query.reach_BL & ~cache.held_BL.roll(1, 1)

    def _cache(self, queries: Sequence[Query], shape: torch.Size) -> BlockCache:
        """The cache with a row for each row of the queries, in their order; requests have come and gone in between."""
        rows, network = [q.position_BL for q in queries], self.network
        if self.cache is None or not same(rows, self.held):
            cache = BlockCache(network.denoiser.backbone.kv_shape, self.window, shape, network.device, network.dtype)
            if self.cache is not None:
                cache.take_over(self.cache, places(self.held), places(rows))
            self.cache, self.held = cache, rows
        return self.cache


def places(requests: Sequence[Tensor]) -> dict[int, slice]:
    """Which rows are those of each request, by the identity of its tensor, where all stand one behind the other."""
    starts = [0, *accumulate(len(rows) for rows in requests)]
    return {id(rows): slice(*pair) for rows, pair in zip(requests, pairwise(starts), strict=True)}

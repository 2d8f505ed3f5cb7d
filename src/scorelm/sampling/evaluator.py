"""Evaluators: how queries of several requests become passes of the network, and predictions come back.

`Dense` packs all rows that are asked about side by side; `Cached` evaluates only what is new on a path of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from scorelm.device import pick_dtype
from scorelm.model.denoiser import Denoiser
from scorelm.model.layout import CLEAN, NOISY, Layout
from scorelm.model.prediction import Prediction
from scorelm.sampling.cache import BlockCache, finished_blocks
from scorelm.sampling.state import State, side_by_side
from scorelm.text.tokenizer import Special


def rule_out(logits_NV: Tensor, closed_N: Tensor, special: Special, allowed_NV: Tensor | None = None) -> Tensor:
    """The logits, in place, without what is never written: ``<s>``, ``<pad>``, ``<unk>``, and a second ``</s>``.

    Sampler and prices share this rule, so that a price is that of text that can be written.

    Args:
        logits_NV: of N positions.
        closed_N: whether the position's row has its ``</s>`` already.
        special: ids of the special tokens.
        allowed_NV: what the request allows where, if it does not allow everything.
    """
    if allowed_NV is not None:
        logits_NV.masked_fill_(~allowed_NV, -torch.inf)
    for token in (special.bos, special.pad, special.unk):  # a list of them would be copied to a GPU each time
        logits_NV[:, token] = -torch.inf
    logits_NV[:, special.eos].masked_fill_(closed_N, -torch.inf)
    return logits_NV


@dataclass(eq=False)
class Query:
    """Positions of the rows of a request whose tokens are to be predicted; tensors [B, L, ...]."""

    x_BLE: Tensor
    sigma_BL: Tensor
    x0_BLE: Tensor
    """The estimate that is fed back."""
    reach_BL: Tensor
    """Positions that the network reads; what is open among them is asked about."""
    ids_BL: Tensor
    """Tokens of the positions at sigma 0."""
    closed_BL: Tensor
    """Positions of rows whose ``</s>`` is given."""
    hole_BL: Tensor
    """The condition on what is written there: the value of a `Hole`, 0 for none."""
    position_BL: Tensor
    block_BL: Tensor
    finished_BL: Tensor
    """On a path of blocks, those without noise in the state, which later blocks may read."""
    in_blocks: bool

    @classmethod
    def of(cls, state: State, x_BLE: Tensor, sigma_BL: Tensor, x0_BLE: Tensor, reach_BL: Tensor, blocks: bool) -> Self:
        """What to ask of the rows of a state, were its positions at `x_BLE` and `sigma_BL`."""
        layout = state.rows.layout
        return cls(
            x_BLE, sigma_BL, x0_BLE, reach_BL, state.ids_BL, state.rows.closed_B[:, None].expand_as(reach_BL),
            state.rows.hole_BL, layout.position_BL, layout.block_BL,
            finished_blocks(layout.block_BL, state.sigma_BL) if blocks else torch.zeros_like(reach_BL), blocks,
        )  # fmt: skip

    @property
    def open_BL(self) -> Tensor:
        """Positions to be predicted."""
        return self.reach_BL & (self.sigma_BL > 0)


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

    @property
    def autocast(self) -> AbstractContextManager[None]:
        """The precision of matrix products."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def logits(self, prediction: Prediction, closed_N: Tensor, hole_N: Tensor) -> Tensor:
        """Logits [N, V] without what is never written."""
        with self.autocast:
            logits_NV = prediction.logits_NV
        allowed_NV = self.allowed_KV[hole_N] if self.allowed_KV is not None and hole_N.any() else None
        return rule_out(logits_NV, closed_N, self.special, allowed_NV)

    def noisy(
        self,
        x_BLE: Tensor,
        sigma_BL: Tensor,
        layout: Layout,
        x0_BLE: Tensor,
        ids_BL: Tensor,
        closed_BL: Tensor,
        hole_BL: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, V] of the noisy positions of a batch, and where they are."""
        self_cond_BLE = torch.where((sigma_BL > 0)[..., None], x0_BLE, 0.0)
        with self.autocast:
            found = self.denoiser.predict(x_BLE, sigma_BL, layout, self_cond_BLE, ids_BL, self.table_VE)
        return self.logits(found, closed_BL[found.open_BL], hole_BL[found.open_BL]), found.open_BL


class Evaluator(Protocol):
    """Answers queries, all of them in as few passes as it can."""

    def __call__(self, queries: Sequence[Query]) -> list[Prediction]:
        """The predictions, one for each query, at its open positions."""


class Dense:
    """Rows of all queries side by side in rows of the network, which are as long as the longest of them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.packed: tuple[list[Tensor], tuple[int, ...], Tensor, Layout] | None = None

    def __call__(self, queries: Sequence[Query]) -> list[Prediction]:
        """One pass for all of them."""
        query = joined(queries)
        at_RW, layout = self._pack(queries, query)

        def packed(t_BL: Tensor) -> Tensor:
            return t_BL.flatten(0, 1)[at_RW]

        sigma_RW = torch.where(layout.segment_BL > 0, packed(query.sigma_BL), 0.0)
        logits_NV, open_RW = self.network.noisy(
            packed(query.x_BLE), sigma_RW, layout, packed(query.x0_BLE), packed(query.ids_BL),
            packed(query.closed_BL), packed(query.hole_BL),
        )  # fmt: skip
        return answers(queries, logits_NV[at_RW[open_RW].argsort()], self.network.table_VE)

    def _pack(self, queries: Sequence[Query], query: Query) -> tuple[Tensor, Layout]:
        """Where each position of the packed rows comes from, and their layout; kept while rows stay as they are."""
        extents, rows = tuple(query.reach_BL.sum(1).tolist()), [q.position_BL for q in queries]
        kept = self.packed
        if kept is None or kept[1] != extents or not same(kept[0], rows):
            layout = Layout.one_stream(query.reach_BL.long(), query.position_BL, query.block_BL)
            kept = self.packed = rows, extents, *side_by_side(layout, extents)
        *_, at_RW, layout = kept
        if any(q.in_blocks for q in queries):
            finished_RW = query.finished_BL.flatten(0, 1)[at_RW]
            layout = replace(layout, stream_BL=torch.where(finished_RW, CLEAN, layout.stream_BL))
        return at_RW, layout


def same(requests: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two sets of requests are the same ones, by the identity of their tensors."""
    return len(requests) == len(others) and all(a is b for a, b in zip(requests, others, strict=True))


def joined(queries: Sequence[Query]) -> Query:
    """All queries in one, as long as the longest."""
    if len(queries) == 1:
        return queries[0]
    longest = max(q.sigma_BL.shape[1] for q in queries)

    def join(name: str) -> Tensor:
        parts = [getattr(q, name) for q in queries]
        padding = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
        return torch.cat([F.pad(part, pad) for part, pad in zip(parts, padding, strict=True)])

    tensors = {f.name: join(f.name) for f in fields(Query) if f.name != "in_blocks"}
    return Query(**tensors, in_blocks=any(q.in_blocks for q in queries))


def answers(queries: Sequence[Query], logits_NV: Tensor, table_VE: Tensor) -> list[Prediction]:
    """Each query's part of the logits of all of them."""
    if len(queries) == 1:
        return [Prediction.of(logits_NV, queries[0].open_BL, table_VE)]
    parts = torch.split(logits_NV, [int(q.open_BL.sum()) for q in queries])
    return [Prediction.of(part, q.open_BL, table_VE) for part, q in zip(parts, queries, strict=True)]


Reader = Callable[[Query, Tensor, Tensor, Layout], tuple[Tensor, Tensor]]
"""``read(query, row_R1, at_RW, layout)``: logits of the open positions at those places, and where they are, [R, W]."""


def read_noisy(network: Network) -> Reader:
    """Reads noisy embeddings, as a score model does."""

    def read(query: Query, row_R1: Tensor, at_RW: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        x_RWE, sigma_RW, x0_RWE, ids_RW, closed_RW, hole_RW = (
            t[row_R1, at_RW]
            for t in (query.x_BLE, query.sigma_BL, query.x0_BLE, query.ids_BL, query.closed_BL, query.hole_BL)
        )
        sigma_RW = sigma_RW.where(layout.segment_BL > 0, 0.0)
        return network.noisy(x_RWE, sigma_RW, layout, x0_RWE, ids_RW, closed_RW, hole_RW)

    return read


class Cached:
    """On paths of blocks: what a block has just finished and the next block, behind the keys and values before them.

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
        row_R, column_RW = cache.place(query.reach_BL)
        real_RW, row_R1, at_RW = column_RW >= 0, row_R[:, None], column_RW.clamp(min=0)
        position_RW = query.position_BL[row_R1, at_RW]
        past = cache.past(row_R, query.position_BL, query.block_BL, column_RW.amax(1))
        if self.causal:
            layout = replace(Layout.causal(real_RW.long(), position_RW), past=past)
        else:
            block_RW = query.block_BL[row_R1, at_RW]
            stream_RW = torch.where(query.finished_BL[row_R1, at_RW], CLEAN, NOISY)
            layout = Layout(real_RW.long(), position_RW, block_RW, stream_RW, past)
        logits_NV, _ = self.read(query, row_R1, at_RW, layout)
        cache.keep(past, row_R, column_RW, real_RW & (layout.stream_BL == CLEAN))
        return answers(queries, logits_NV, self.network.table_VE)

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

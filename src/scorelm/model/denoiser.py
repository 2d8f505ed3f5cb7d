"""The denoiser: evidence about each token in, posterior over each token out.

A position's evidence ``<x, e_v> / sigma^2`` is all that its noisy embedding says about its token, so the trunk reads
the soft token ``softmax(evidence + prior)`` and its output is a Bayesian update of the evidence: ``logits = evidence
+ prior + context`` (the output prior of Plaid, arXiv 2305.18619, and LangFlow, arXiv 2604.11748).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scorelm.config import ModelConfig
from scorelm.model.attention import Layout
from scorelm.model.embedding import Embedding, evidence, nearest_token
from scorelm.model.transformer import Transformer

CHUNK = 2**24
"""Most numbers of an array [N, V] that are held at a time where all of it is not asked for."""


class Places(NamedTuple):
    """Which of the B L positions, counted row after row, are of which kind."""

    noisy_U: Tensor
    """Sigma above 0 and finite."""
    blank_J: Tensor
    """Sigma inf: no evidence."""
    given_M: Tensor
    """Sigma 0, and padding."""
    live_N: Tensor
    """Noisy and blank ones together."""
    order_P: Tensor
    """For each position, its place where noisy, blank and given ones stand one kind after the other."""

    @classmethod
    def of(cls, sigma_BL: Tensor, layout: Layout) -> Places:
        """Found from noise levels and segments; on a GPU the host waits for it."""
        live_P, blank_P = ((sigma_BL > 0) & (layout.segment_BL > 0)).flatten(), (sigma_BL == torch.inf).flatten()
        kinds = (live_P & ~blank_P, live_P & blank_P, ~live_P, live_P)
        noisy_U, blank_J, given_M, live_N = (kind_P.nonzero().squeeze(1) for kind_P in kinds)
        return cls(noisy_U, blank_J, given_M, live_N, torch.cat([noisy_U, blank_J, given_M]).argsort())


class Posterior(NamedTuple):
    """What the denoiser says about the N live positions."""

    logits_NV: Tensor
    """Logits of the posterior, fp32."""
    context_free_NV: Tensor
    """The part that evidence and prior give without context."""
    live_BL: Tensor
    """Where the live positions are, in reading order."""


class Denoiser(nn.Module):
    """Posterior over tokens from noisy embeddings with a noise level of their own, with weights in fp32.

    Shape suffixes: B rows, L positions, E embedding size, D trunk width, V vocabulary, N live positions (those of
    real documents with sigma above 0).
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.size = config.size
        dim = self.size.dim
        self.embedding = Embedding(vocab_size, config.embedding_dim)
        self.token_in = nn.Parameter(torch.randn(vocab_size, dim))
        self.self_condition = nn.Linear(config.embedding_dim, dim, bias=False)
        self.trunk = Transformer(config, self.embedding.norm)
        self.context = nn.Linear(dim, vocab_size, bias=False)
        self.prior = nn.Parameter(torch.zeros(vocab_size))
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.self_condition.weight)

    def set_prior(self, counts_V: Tensor) -> None:
        """Start the unigram prior at smoothed log frequencies, so that the trunk need not learn them."""
        frequency_V = (counts_V.double() + 0.5) / (counts_V.sum() + 0.5 * len(counts_V))
        with torch.no_grad():
            self.prior.copy_(frequency_V.log())

    def live(
        self,
        x_BLE: Tensor,
        sigma_BL: Tensor,
        layout: Layout,
        self_cond_BLE: Tensor | None = None,
        ids_BL: Tensor | None = None,
        table_VE: Tensor | None = None,
    ) -> Posterior:
        """The posterior at the live positions alone: `forward` without the work for those that are given already.

        `ids_BL` are the tokens of given positions, where they are known and need not be read from `x_BLE`, and
        `table_VE` the embeddings of all tokens, where they are at hand.
        """
        table_VE = self.embedding.table() if table_VE is None else table_VE
        places, (x_PE, sigma_P) = Places.of(sigma_BL, layout), (x_BLE.flatten(0, 1), sigma_BL.flatten())
        h_ND = self.hidden(x_BLE, sigma_BL, layout, places, table_VE, self_cond_BLE, ids_BL)
        logits_NV, context_free_NV = self.read_out(h_ND, x_PE[places.live_N], sigma_P[places.live_N], table_VE)
        return Posterior(logits_NV, context_free_NV, (sigma_BL > 0) & (layout.segment_BL > 0))

    def hidden(
        self,
        x_BLE: Tensor,
        sigma_BL: Tensor,
        layout: Layout,
        places: Places,
        table_VE: Tensor,
        self_cond_BLE: Tensor | None = None,
        ids_BL: Tensor | None = None,
    ) -> Tensor:
        """The trunk's output at the live positions, [N, D], from every position's soft token.

        Positions without evidence have one soft token, the prior's, and given ones have their own token.
        """
        x_PE, sigma_P = x_BLE.flatten(0, 1), sigma_BL.flatten()

        def soft(x_UE: Tensor, sigma_U: Tensor) -> Tensor:
            return evidence(x_UE, sigma_U, table_VE, self.prior).softmax(-1) @ self.token_in

        noisy_UD = in_chunks(soft, len(table_VE), rows(x_PE, places.noisy_U), sigma_P[places.noisy_U])
        blank_JD = (self.prior.softmax(-1)[None] @ self.token_in).expand(len(places.blank_J), -1)
        at_M = places.given_M
        given_M = nearest_token(x_PE[at_M], table_VE) if ids_BL is None else ids_BL.flatten()[at_M]
        given_MD = self.token_in[given_M]
        soft_PD = torch.cat([part.float() for part in (noisy_UD, blank_JD, given_MD)])
        h_BLD = rows(soft_PD, places.order_P).view(*sigma_BL.shape, -1)
        if self_cond_BLE is not None:
            h_BLD = h_BLD + self.self_condition(self_cond_BLE)
        return rows(self.trunk(h_BLD, sigma_BL, layout).flatten(0, 1), places.live_N)

    def read_out(self, h_ND: Tensor, x_NE: Tensor, sigma_N: Tensor, table_VE: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the posterior, and the part of them without context, [N, V] each in fp32."""
        context_free_NV = evidence(x_NE, sigma_N, table_VE, self.prior)
        return context_free_NV + self.context(h_ND), context_free_NV

    def forward(self, x_BLE: Tensor, sigma_BL: Tensor, layout: Layout, self_cond_BLE: Tensor | None = None) -> Tensor:
        """Logits of the posterior over every position's token, [B, L, V] in fp32.

        Args:
            x_BLE: noisy embeddings ``e + sigma eps``; any finite value where sigma is inf, the token's embedding
                where sigma is 0.
            sigma_BL: noise levels in [0, inf]; 0 is a given token, inf is no evidence; a scalar or [B, 1] broadcasts.
            layout: segments, positions, blocks and streams.
            self_cond_BLE: an earlier estimate of x0 (Analog Bits, arXiv 2208.04202); zero or None for none.

        At given positions the logits are the (saturated) evidence alone.
        """
        sigma_BL = torch.as_tensor(sigma_BL, device=x_BLE.device).expand(x_BLE.shape[:2])
        table_VE = self.embedding.table()
        logits_NV, _, live_BL = self.live(x_BLE, sigma_BL, layout, self_cond_BLE, table_VE=table_VE)
        given_MV = evidence(x_BLE[~live_BL], sigma_BL[~live_BL], table_VE)
        logits_BLV = logits_NV.new_empty(*sigma_BL.shape, logits_NV.shape[1])
        return logits_BLV.masked_scatter(live_BL[..., None], logits_NV).masked_scatter(~live_BL[..., None], given_MV)

    def estimate(self, logits: Tensor) -> Tensor:
        """Score interpolation (CDCD, eq. 5): the posterior mean ``x0 = softmax(logits) @ table``, [..., E], fp32."""
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(-1) @ self.embedding.table()


def lowered(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """A copy, for inference under autocast, whose matrices are in `dtype` already and not converted in every pass.

    The other weights are shared with the original.
    """
    matrices = [module.weight for module in denoiser.modules() if isinstance(module, nn.Linear)] + [denoiser.token_in]
    kept = {id(p): p for p in denoiser.parameters()} | {id(p): nn.Parameter(p.to(dtype), False) for p in matrices}
    return deepcopy(denoiser, kept)


class DifferentRows(torch.autograd.Function):
    """``x[place]`` where every place is another: the gradient is copied back, not summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        """Rows of a matrix."""
        ctx.save_for_backward(place)
        ctx.rows = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """To the places that they came from."""
        (place,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).index_copy_(0, place, grads[0]), None


def rows(x: Tensor, place: Tensor) -> Tensor:
    """Rows `place` of a matrix, all different."""
    chosen: Tensor = DifferentRows.apply(x, place)  # type: ignore[no-untyped-call]
    return chosen


def in_chunks(function: Callable[..., Tensor], vocabulary: int, *rows_N: Tensor) -> Tensor:
    """A function of N rows, whose work has the size [N, V], in chunks of at most `CHUNK` numbers.

    Where there is more than one chunk, each is computed again for its gradient instead of kept.
    """
    size = max(1, CHUNK // vocabulary)
    if len(rows_N[0]) <= size:
        return function(*rows_N)
    chunks = zip(*(torch.split(t, size) for t in rows_N), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


def score(x_BLE: Tensor, x0_BLE: Tensor, sigma_BL: Tensor) -> Tensor:
    """Score of the noisy density, ``(x0 - x) / sigma^2`` (Tweedie), [B, L, E]; sigma must be positive and finite."""
    return (x0_BLE - x_BLE) / sigma_BL[..., None] ** 2

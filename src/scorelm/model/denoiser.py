"""The denoiser: evidence about each token in, posterior over each token out.

A position's evidence ``<x, e_v> / sigma^2`` is all that its noisy embedding says about its token, so the trunk reads
the soft token ``softmax(evidence + prior)`` and its output is a Bayesian update of the evidence: ``logits = evidence
+ prior + context`` (the output prior of Plaid, arXiv 2305.18619, and LangFlow, arXiv 2604.11748).
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scorelm.config import ModelConfig
from scorelm.model.attention import Layout
from scorelm.model.embedding import Embedding, evidence, nearest_token
from scorelm.model.transformer import Transformer


class Posterior(NamedTuple):
    """What the denoiser says about the N live positions."""

    logits_NV: Tensor
    """Logits of the posterior, fp32."""
    context_free_NV: Tensor
    """The part that evidence and prior give without context."""
    live_BL: Tensor
    """Where the live positions are, in reading order."""


class Denoiser(nn.Module):
    """Posterior over tokens from noisy embeddings with a noise level of their own.

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

    def live(self, x_BLE: Tensor, sigma_BL: Tensor, layout: Layout, self_cond_BLE: Tensor | None = None) -> Posterior:
        """The posterior at the live positions alone: `forward` without the work for those that are given already."""
        table_VE = self.embedding.table()
        live_BL = (sigma_BL > 0) & (layout.segment_BL > 0)
        context_free_NV = evidence(x_BLE[live_BL], sigma_BL[live_BL], table_VE, self.prior)
        soft_ND = (context_free_NV.softmax(-1) @ self.token_in).float()
        given_MD = self.token_in[nearest_token(x_BLE[~live_BL], table_VE)].float()
        h_BLD = in_reading_order(soft_ND, given_MD, live_BL)
        if self_cond_BLE is not None:
            h_BLD = h_BLD + self.self_condition(self_cond_BLE)
        h_BLD = self.trunk(h_BLD, sigma_BL, layout)
        context_NV = self.context(rows(h_BLD.flatten(0, 1), live_BL.flatten().nonzero().squeeze(1)))
        return Posterior(context_free_NV + context_NV, context_free_NV, live_BL)

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
        logits_NV, _, live_BL = self.live(x_BLE, sigma_BL, layout, self_cond_BLE)
        given_MV = evidence(x_BLE[~live_BL], sigma_BL[~live_BL], self.embedding.table())
        logits_BLV = logits_NV.new_empty(*sigma_BL.shape, logits_NV.shape[1])
        return logits_BLV.masked_scatter(live_BL[..., None], logits_NV).masked_scatter(~live_BL[..., None], given_MV)

    def estimate(self, logits: Tensor) -> Tensor:
        """Score interpolation (CDCD, eq. 5): the posterior mean ``x0 = softmax(logits) @ table``, [..., E], fp32."""
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(-1) @ self.embedding.table()


def lowered(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """A copy, for inference under autocast, whose matrices are in `dtype` already and not converted in every pass."""
    low = deepcopy(denoiser)
    for module in low.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    low.token_in.data = low.token_in.data.to(dtype)
    return low


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


def in_reading_order(live_ND: Tensor, given_MD: Tensor, live_BL: Tensor) -> Tensor:
    """What stands at the live positions and at the others, put together: [B, L, D]."""
    live = live_BL.flatten()
    place = torch.where(live, live.cumsum(0) - 1, len(live_ND) + (~live).cumsum(0) - 1)
    return rows(torch.cat([live_ND, given_MD]), place).view(*live_BL.shape, -1)


def score(x_BLE: Tensor, x0_BLE: Tensor, sigma_BL: Tensor) -> Tensor:
    """Score of the noisy density, ``(x0 - x) / sigma^2`` (Tweedie), [B, L, E]; sigma must be positive and finite."""
    return (x0_BLE - x_BLE) / sigma_BL[..., None] ** 2

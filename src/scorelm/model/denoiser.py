"""The denoiser: evidence about each token in, posterior over each token out.

A position's evidence ``<x, e_v> / sigma^2`` is all that its noisy embedding says about its token, so the trunk reads
the soft token ``softmax(evidence + prior)`` and its output is a Bayesian update of the evidence: ``logits = evidence
+ prior + context`` (the output prior of Plaid, arXiv 2305.18619, and LangFlow, arXiv 2604.11748).
"""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.config.recipe import ModelConfig
from scorelm.device import send
from scorelm.model.backbone import Backbone, Count, Transformer, matrices_of
from scorelm.model.embedding import Embedding, context_vectors, evidence, nearest_token
from scorelm.model.kernels import different_rows
from scorelm.model.layout import Layout
from scorelm.model.prediction import Prediction, in_chunks
from scorelm.model.pretrained import FAMILIES


class Places(NamedTuple):
    """Which of the B L positions, counted row after row, are computed as which kind.

    Exact places follow the noise levels, which is the least work. Fixed places depend on the shape only, so that a step
    can be compiled whole and the host never waits: every position that may be noisy is computed as noisy, and what it
    gives where it is not open is to be left out.
    """

    noisy_U: Tensor
    """Sigma above 0 and finite; where places are fixed, all that may be noisy."""
    blank_J: Tensor
    """Sigma inf: no evidence."""
    given_M: Tensor
    """Sigma 0, and padding."""
    open_N: Tensor
    """Those with logits: noisy and blank ones together, and given ones that are asked for the next token."""
    order_P: Tensor
    """For each position, its place where noisy, blank and given ones stand one kind after the other."""
    fixed: bool = False

    @classmethod
    def of(cls, sigma_BL: Tensor, layout: Layout, asks_next_BL: Tensor | None = None) -> Places:
        """Found from noise levels and segments; on a GPU the host waits for it."""
        open_P, blank_P = ((sigma_BL > 0) & (layout.segment_BL > 0)).flatten(), (sigma_BL == torch.inf).flatten()
        read_P = open_P if asks_next_BL is None else open_P | asks_next_BL.flatten()
        kinds = (open_P & ~blank_P, open_P & blank_P, ~open_P, read_P)
        noisy_U, blank_J, given_M, open_N = (kind_P.nonzero().squeeze(1) for kind_P in kinds)
        return cls(noisy_U, blank_J, given_M, open_N, torch.cat([noisy_U, blank_J, given_M]).argsort())

    @classmethod
    def of_shape(cls, rows: int, length: int, device: torch.device) -> Places:
        """Fixed places: all are computed as noisy, and the posterior of all is read."""
        noisy_U, open_N, order_P = (torch.arange(rows * length, device=device) for _ in range(3))
        return cls(noisy_U, noisy_U[:0], noisy_U[:0], open_N, order_P, fixed=True)

    def to(self, device: torch.device) -> Places:
        """The same places on a device, which does not wait for them."""
        kinds, fixed = self[:5], self.fixed
        noisy_U, blank_J, given_M, open_N, order_P = torch.split(send(torch.cat(kinds), device), [*map(len, kinds)])
        return Places(noisy_U, blank_J, given_M, open_N, order_P, fixed)


class Denoiser(nn.Module):
    """Posterior over tokens from noisy embeddings with a noise level of their own, with weights in fp32.

    `predict` is all that others need to know of it. Shape suffixes: B rows, L positions, E embedding size, D trunk
    width, V vocabulary, N open positions.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        dim = config.size.dim
        self.tells_next_token = False
        """Whether given tokens have learned to tell the next one."""
        self.embedding = Embedding(vocab_size, config.embedding_dim)
        self.token_in = nn.Parameter(torch.randn(vocab_size, dim))
        self.self_condition = nn.Linear(config.embedding_dim, dim, bias=False)
        network = config.network
        self.trunk: Backbone = (
            Transformer(config, self.embedding.norm) if network is None else FAMILIES[network.family](config, network)
        )
        self.context = nn.Linear(dim, vocab_size, bias=network is not None)
        self.prior = nn.Parameter(torch.zeros(vocab_size))
        for parameter in self.context.parameters():
            nn.init.zeros_(parameter)
        nn.init.zeros_(self.self_condition.weight)

    @property
    def backbone(self) -> Backbone:
        """The network between soft tokens and context."""
        return self.trunk

    def set_prior(self, counts_V: Tensor) -> None:
        """Start the unigram prior at smoothed log frequencies, so that the trunk need not learn them."""
        frequency_V = (counts_V.double() + 0.5) / (counts_V.sum() + 0.5 * len(counts_V))
        with torch.no_grad():
            self.prior.copy_(frequency_V.log())

    def set_embeddings(self, counts_SVC: Tensor) -> None:
        """Start tokens that stand beside the same others near to each other.

        Through much noise it can then be seen of what kind a token is. Training by cross-entropy does not bring tokens
        together by itself.

        Args:
            counts_SVC: how often a token has each of C others beside it, in S places beside it.
        """
        self.embedding.bring_together(context_vectors(counts_SVC, self.embedding.weight.shape[1]))

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of a model, or those that a pretrained network has; the rest stays.

        What such a network says of a position is then what is said of it where there is no evidence: its logits, if it
        has any, are without the prior that is added to them.
        """
        self.load_state_dict(weights, strict="prior" in weights)
        if "prior" not in weights and "context.weight" in weights:
            with torch.no_grad():
                self.context.bias.sub_(self.prior)

    def predict(
        self,
        x_BLE: Tensor,
        sigma_BL: Tensor,
        layout: Layout,
        self_cond_BLE: Tensor | None = None,
        ids_BL: Tensor | None = None,
        table_VE: Tensor | None = None,
        places: Places | None = None,
        asks_next_BL: Tensor | None = None,
    ) -> Prediction:
        """What the model says of every open position's token, and of the next one where that is asked for.

        Args:
            x_BLE: noisy embeddings ``e + sigma eps``; any finite value where sigma is inf, the token's embedding
                where sigma is 0.
            sigma_BL: noise levels in [0, inf]; 0 is a given token, inf is no evidence.
            layout: segments, positions, blocks and streams.
            self_cond_BLE: an earlier estimate of x0 (Analog Bits, arXiv 2208.04202); zero or None for none.
            ids_BL: the tokens of given positions, where they are known and need not be read from `x_BLE`.
            table_VE: the embeddings of all tokens, where they are at hand.
            places: where positions of each kind are, where that is known.
            asks_next_BL: given positions that are asked for the next token, which they don't see.
        """
        table_VE = self.embedding.table() if table_VE is None else table_VE
        places = Places.of(sigma_BL, layout, asks_next_BL) if places is None else places
        h_BLD = self._soft_tokens(x_BLE, sigma_BL, places, table_VE, ids_BL)
        if self_cond_BLE is not None:
            h_BLD = h_BLD + self.self_condition(self_cond_BLE)
        h_ND = different_rows(self.trunk(h_BLD, sigma_BL, layout).flatten(0, 1), places.open_N)
        x_NE = different_rows(x_BLE.flatten(0, 1), places.open_N)

        def read_out(h_ND: Tensor, x_NE: Tensor, sigma_N: Tensor) -> tuple[Tensor, Tensor]:
            context_free_NV = evidence(x_NE, sigma_N, table_VE, self.prior)
            return context_free_NV + self.context(h_ND), context_free_NV

        open_BL = torch.zeros_like(sigma_BL, dtype=torch.bool).flatten().index_fill(0, places.open_N, True)
        sigma_BL = sigma_BL if asks_next_BL is None else torch.where(asks_next_BL, torch.inf, sigma_BL)
        rows = h_ND, x_NE, sigma_BL.flatten()[places.open_N]
        return Prediction(open_BL.view_as(sigma_BL), table_VE, read_out, rows)

    def predict_next(
        self,
        before_BL: Tensor,
        layout: Layout,
        open_BL: Tensor,
        table_VE: Tensor | None = None,
        open_N: Tensor | None = None,
    ) -> Prediction:
        """What an autoregressive model says of open positions, from the token before every position.

        Args:
            before_BL: ids of the tokens before; ``<s>`` before the first.
            layout: a causal one.
            open_BL: positions to be predicted.
            table_VE: the embeddings of all tokens, where they are at hand.
            open_N: the places of the open positions, counted row after row, where they are known.
        """
        h_BLD = F.embedding(before_BL, self.token_in).float()
        h_BLD = self.trunk(h_BLD, torch.zeros(before_BL.shape, device=h_BLD.device), layout)
        open_N = open_BL.flatten().nonzero().squeeze(1) if open_N is None else open_N

        def read_out(h_ND: Tensor) -> tuple[Tensor, Tensor]:
            return self.context(h_ND).float() + self.prior, self.prior.expand(len(h_ND), -1)

        table_VE = self.embedding.table() if table_VE is None else table_VE
        return Prediction(open_BL, table_VE, read_out, (different_rows(h_BLD.flatten(0, 1), open_N),))

    def _soft_tokens(
        self, x_BLE: Tensor, sigma_BL: Tensor, places: Places, table_VE: Tensor, ids_BL: Tensor | None
    ) -> Tensor:
        """What the trunk reads, [B, L, D]: without evidence the prior's soft token, where given the token's own row."""
        x_PE, sigma_P = x_BLE.flatten(0, 1), sigma_BL.flatten()

        def soft(x_UE: Tensor, sigma_U: Tensor) -> Tensor:
            return evidence(x_UE, sigma_U, table_VE, self.prior).softmax(-1) @ self.token_in

        sigma_U = sigma_P[places.noisy_U]
        noisy_UD = in_chunks(soft, len(table_VE), different_rows(x_PE, places.noisy_U), sigma_U)
        if places.fixed:
            assert ids_BL is not None
            own_UD = F.embedding(ids_BL.flatten()[places.noisy_U], self.token_in)
            noisy_UD = torch.where((sigma_U > 0)[:, None], noisy_UD.float(), own_UD.float())
        blank_JD = (self.prior.softmax(-1)[None] @ self.token_in).expand(len(places.blank_J), -1)
        at_M = places.given_M
        given_M = nearest_token(x_PE[at_M], table_VE) if ids_BL is None else ids_BL.flatten()[at_M]
        given_MD = F.embedding(given_M, self.token_in)
        soft_PD = torch.cat([part.float() for part in (noisy_UD, blank_JD, given_MD)])
        return different_rows(soft_PD, places.order_P).view(*sigma_BL.shape, -1)

    def flops(self, tokens: Count, pairs: Count, noisy: Count, live: Count) -> Count:
        """FLOPs of a forward pass, padding not counted: 2 for each weight and position, and attention.

        Args:
            tokens: positions of all documents in all streams.
            pairs: pairs of positions in one stream of one document.
            noisy: positions with a soft token of their own: sigma above 0 and finite.
            live: positions with logits.
        """
        table = self.embedding.weight.numel()
        vocabulary = noisy * (table + self.token_in.numel()) + live * self.context.weight.numel()
        return self.trunk.flops(tokens, pairs) + 2.0 * vocabulary

    def lowered(self, dtype: torch.dtype) -> Denoiser:
        """A copy, for inference under autocast, whose matrices are in `dtype` already and not converted in every pass.

        The other weights are shared with the original.
        """
        matrices = [*matrices_of(self), self.token_in]
        kept = {id(p): p for p in self.parameters()} | {id(p): nn.Parameter(p.to(dtype), False) for p in matrices}
        return deepcopy(self, kept)

"""Guidance: what is done to the posterior's logits before a solver sees them; at its fixed point each does nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How to sharpen the posterior; the defaults leave it as it is.

    Attributes:
        weight: of classifier-free guidance (arXiv 2207.12598): the unconditional pass has the given tokens, all but
            the ends of the text, at sigma inf, so that the same model gives both. 1 is none; each further pass is an
            evaluation.
        self_weight: of self-conditioning guidance: the other pass has no earlier estimate fed back. 1 is none.
        temperature: divides the logits.
        top_k: keeps the likeliest tokens alone, and those as likely as the last; 0 keeps all.
        top_p: keeps the likeliest tokens that make up this probability alone; 1 keeps all (arXiv 1904.09751).
        score_temperature: divides the score, for solvers that follow it.

    Raises:
        ValueError: a value out of range.
    """

    weight: float = 1.0
    self_weight: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    score_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "score_temperature"):
            if not 1e-3 <= getattr(self, name) <= 1e3:
                raise ValueError(f"{name.replace('_', ' ')} must be from 0.001 to 1000, got {getattr(self, name):g}")
        for name in ("weight", "self_weight"):
            if not 0 <= getattr(self, name) <= 1e3:
                raise ValueError(
                    f"guidance {name.replace('_', ' ')} must be from 0 to 1000, got {getattr(self, name):g}"
                )
        keep_likeliest(torch.zeros(1, 1), self.top_k, self.top_p)

    @property
    def one_pass(self) -> bool:
        """Whether a step takes no further pass."""
        return self.weight == self.self_weight == 1

    def filtered(self, logits_NV: Tensor) -> Tensor:
        """Temperature, then top-k, then top-p."""
        tempered_NV = logits_NV if self.temperature == 1 else logits_NV / self.temperature
        return keep_likeliest(tempered_NV, self.top_k, self.top_p)


def guided(logits_NV: Tensor, other_NV: Tensor, weight: float) -> Tensor:
    """``other + weight (logits - other)``: away from `other` for weights above 1. Tokens ruled out stay so."""
    return torch.where(logits_NV.isfinite(), torch.lerp(other_NV, logits_NV, weight), logits_NV)


def keep_likeliest(logits_NV: Tensor, top_k: float, top_p: float) -> Tensor:
    """Rule out (logit -inf) all but the `top_k` likeliest tokens and those that make up `top_p`; one always stays.

    Raises:
        ValueError: a `top_k` that is no whole number of 0 or more, or a `top_p` outside (0, 1].
    """
    if not (top_k >= 0 and float(top_k).is_integer()):
        raise ValueError(f"top_k must be a whole number, 0 or more, got {top_k:g}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p:g}")
    if 0 < top_k < logits_NV.shape[-1]:
        least_N1 = logits_NV.topk(int(top_k), dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if top_p < 1:
        ordered_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
        probability_NV = ordered_NV.double().softmax(-1)
        beyond_NV = probability_NV.cumsum(-1) - probability_NV >= top_p
        logits_NV = logits_NV.masked_fill(torch.zeros_like(beyond_NV).scatter(-1, order_NV, beyond_NV), -torch.inf)
    return logits_NV

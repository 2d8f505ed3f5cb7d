"""Guidance: what is done to the posterior's logits before a solver sees them; each has a value that does nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from scorelm.errors import InputError


def guided(logits_NV: Tensor, other_NV: Tensor, weight: float) -> Tensor:
    """``other + weight (logits - other)``: away from `other` for weights above 1. Tokens ruled out stay so."""
    return torch.where(logits_NV.isfinite(), torch.lerp(other_NV, logits_NV, weight), logits_NV)


def keep_likeliest(logits_NV: Tensor, top_k: float, top_p: float) -> Tensor:
    """Rule out (logit -inf) all but the `top_k` likeliest tokens and those that make up `top_p`; one always stays.

    Raises:
        InputError: a `top_k` that is no whole number of 0 or more, or a `top_p` outside (0, 1].
    """
    if not (top_k >= 0 and float(top_k).is_integer()):
        raise InputError(f"top_k must be a whole number, 0 or more, got {top_k:g}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p:g}")
    if 0 < top_k < logits_NV.shape[-1]:
        least_N1 = logits_NV.topk(int(top_k), dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if top_p < 1:
        ordered_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
        probability_NV = ordered_NV.double().softmax(-1)
        beyond_NV = probability_NV.cumsum(-1) - probability_NV >= top_p
        logits_NV = logits_NV.masked_fill(torch.zeros_like(beyond_NV).scatter(-1, order_NV, beyond_NV), -torch.inf)
    return logits_NV

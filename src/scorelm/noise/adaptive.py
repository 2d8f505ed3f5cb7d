"""Adaptive paths: which position goes how far is decided from the posterior, in nats (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scorelm.noise.plan import Plan

Share = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``share(entropy_BL, open_BL, budget_B1)``: the nats of a row's budget that each open position may spend in a step."""


def informed_levels(plan: Plan, threshold: float, share: Share) -> Iterator[Tensor]:
    """Steps that remove equal amounts of information, as far as the posterior can tell.

    A row's budget is `plan.nats`, or with `left` steps to go its remaining entropy over `left`. Evidence removes
    entropy at a known rate, ``dH_i / dtau_i = -(E - |x0_i|^2) / 2``, so a position's share of the budget says how far
    its tau moves. A position whose entropy is within `threshold`, or within its share, finishes at once: that costs its
    entropy at most (docs/theory.md).

    Args:
        plan: where and in how many steps.
        threshold: nats.
        share: how a budget is shared out.
    """
    for left in range(plan.steps, 0, -1):
        seen = plan.observe()
        open_BL = plan.free_BL & (seen.sigma_BL > 0)
        if not open_BL.any():
            return
        entropy_BL = torch.where(open_BL, seen.entropy_BL.double(), 0.0)
        total_B1 = entropy_BL.sum(1, keepdim=True)
        budget_B1 = total_B1 / left if plan.nats is None else torch.full_like(total_B1, plan.nats)
        share_BL = share(entropy_BL, open_BL, budget_B1)
        tau_BL = seen.sigma_BL.double().pow(-2) + share_BL / seen.rate_BL.double().clamp(min=1e-9)
        sigma_BL = tau_BL.rsqrt()
        finished_BL = (entropy_BL <= share_BL.clamp(min=threshold)) | (sigma_BL < plan.schedule.sigma_min)
        yield torch.where(open_BL & ~finished_BL & (left > 1), sigma_BL.float(), 0.0)


def equal_share(entropy_BL: Tensor, open_BL: Tensor, budget_B1: Tensor) -> Tensor:
    """The row's budget in equal parts: a sure position has little to remove, so it goes fast and finishes early."""
    return (budget_B1 / open_BL.sum(1, keepdim=True).clamp(min=1)).expand_as(entropy_BL)


def proportional_share(entropy_BL: Tensor, open_BL: Tensor, budget_B1: Tensor) -> Tensor:
    """Parts in proportion to what each position has still to decide, so that all are finished at the same time."""
    return budget_B1 * entropy_BL / entropy_BL.sum(1, keepdim=True).clamp(min=1e-30)


def surest_levels(plan: Plan) -> Iterator[Tensor]:
    """Equally many positions finish in every step, those first whose likeliest token is likeliest (MaskGIT's order).

    A row with fewer positions than steps takes a step for each.
    """
    count_B1 = plan.free_BL.sum(1, keepdim=True)
    steps_B1 = count_B1.clamp(1, plan.steps)
    for k in range(1, int(steps_B1.max()) + 1):
        seen = plan.observe()
        open_BL = plan.free_BL & (seen.sigma_BL > 0)
        rank_BL = ascending_rank(torch.where(open_BL, 1 - seen.confidence_BL, torch.inf))
        keep_B1 = count_B1 * (steps_B1 - k).clamp(min=0) // steps_B1
        finished_BL = rank_BL < open_BL.sum(1, keepdim=True) - keep_B1
        yield torch.where(open_BL & ~finished_BL, seen.sigma_BL, 0.0)


def bounded_levels(plan: Plan, gamma: float | None) -> Iterator[Tensor]:
    """As many of the surest positions finish in a step as keep ``sum H_i - max H_i`` within `gamma` nats, one at least.

    That difference bounds what the step loses by drawing its tokens independently (arXiv 2505.24857, eq. 7). The
    number of steps is an outcome, and the last one finishes whatever is left; with `gamma` None it is the steps that
    are given, and a step's bound is the row's remaining entropy over the steps left.
    """
    for left in range(plan.steps, 0, -1):
        seen = plan.observe()
        open_BL = plan.free_BL & (seen.sigma_BL > 0)
        if not open_BL.any():
            return
        entropy_BL = torch.where(open_BL, seen.entropy_BL.double(), torch.inf)
        sorted_BL = entropy_BL.sort(1).values.nan_to_num(posinf=0.0)
        before_BL = sorted_BL.cumsum(1) - sorted_BL
        bound = sorted_BL.sum(1, keepdim=True) / left if gamma is None else gamma
        within_BL = (before_BL <= bound).gather(1, ascending_rank(entropy_BL))
        yield torch.where(open_BL & ~within_BL & (left > 1), seen.sigma_BL, 0.0)


def ascending_rank(value_BL: Tensor) -> Tensor:
    """Place of each value in its row, from 0 for the smallest."""
    return value_BL.argsort(dim=1, stable=True).argsort(1)

"""Fitting the adaptive schedule: cross-entropy against log sigma, observed while training, and its Gumbel curve."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scorelm.noise.schedule import Gumbel

CPU = torch.device("cpu")


def sum_by_bin(bin_N: Tensor, values_NK: Tensor, bins: int) -> Tensor:
    """Sums of the rows of each bin, [bins, K]: a product, so that a GPU sums in one order and nobody waits for it."""
    is_bin_KN = (bin_N == torch.arange(bins, device=bin_N.device)[:, None]).to(values_NK.dtype)
    return is_bin_KN @ values_NK


class EntropyCurve:
    """Running estimate of cross-entropy (nats) as a function of log sigma, from which `Gumbel` is fitted.

    Observations are averaged within bins of equal width in log sigma, so that the fit does not depend on how
    often each level was drawn (importance weighting by the sampling density), with exponential forgetting.
    """

    BINS = 64

    def __init__(self, schedule: Gumbel, device: torch.device = CPU, forget: float = 0.995) -> None:
        self.schedule = schedule
        self.forget = forget
        self.sums = torch.zeros(2, self.BINS, dtype=torch.float64, device=device)
        """Weight, and weight times cross-entropy."""

    def binned(self, sigma_N: Tensor, cross_entropy_N: Tensor, counts_N: Tensor) -> Tensor:
        """Observations as sums, [2, BINS], of those that count; their sigma is within the schedule's range."""
        low, high = math.log(self.schedule.sigma_min), math.log(self.schedule.sigma_max)
        place_N = (sigma_N.double().log() - low) / (high - low)
        bin_N = (place_N * self.BINS).clamp(0, self.BINS - 1).long()
        values_NK = torch.stack([torch.ones_like(place_N), cross_entropy_N.double()], 1)
        return sum_by_bin(bin_N, torch.where(counts_N[:, None], values_NK, 0.0), self.BINS).T

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Add the binned observations of one step and forget a little of those before, if the step counts."""
        self.sums = torch.where(counts, self.forget * self.sums + sums, self.sums)

    def fit(self) -> Gumbel:
        """The schedule refitted to the observations so far; the same schedule while they are too few."""
        sums = self.sums.cpu().numpy()
        seen = sums[0] > 1
        if seen.sum() < self.BINS // 4:
            return self.schedule
        low, high = math.log(self.schedule.sigma_min), math.log(self.schedule.sigma_max)
        centres = low + (np.arange(self.BINS) + 0.5) * (high - low) / self.BINS
        mean = sums[1, seen] / sums[0, seen]
        weight = sums[0, seen] / (sums[0, seen] + 50)
        mu, beta = fit_gumbel(centres[seen], mean, weight, start=(float(self.schedule.mu), float(self.schedule.beta)))
        self.schedule = Gumbel(self.schedule.sigma_min, self.schedule.sigma_max, mu, beta)
        return self.schedule


def fit_gumbel(
    g: np.ndarray, entropy: np.ndarray, weight: np.ndarray, start: tuple[float, float]
) -> tuple[float, float]:
    """Least-squares (mu, beta) of ``H exp(-exp(-(g - mu) / beta))`` by damped Gauss-Newton; H is eliminated.

    Args:
        g: log sigma, [N].
        entropy: cross-entropy in nats at each g, [N].
        weight: weight of each observation, [N].
        start: (mu, beta) to start from.
    """
    root = np.sqrt(weight)
    mu, log_beta, damping = start[0], math.log(start[1]), 1e-3

    def residual(mu: float, log_beta: float) -> np.ndarray:
        shape = np.exp(-np.exp(np.clip(-(g - mu) / math.exp(log_beta), -50, 50)))
        height = (weight * shape * entropy).sum() / max((weight * shape**2).sum(), 1e-12)
        error: np.ndarray = root * (height * shape - entropy)
        return error

    now = residual(mu, log_beta)
    for _ in range(50):
        step = 1e-5
        jacobian = np.stack([residual(mu + step, log_beta) - now, residual(mu, log_beta + step) - now], 1) / step
        normal = jacobian.T @ jacobian
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -jacobian.T @ now)
        move = np.clip(move, -0.5, 0.5)
        trial = residual(mu + move[0], log_beta + move[1])
        if (trial**2).sum() < (now**2).sum():
            mu, log_beta = mu + move[0], log_beta + move[1]
            now, damping = trial, damping / 3
        else:
            damping *= 5
    beta = min(max(math.exp(log_beta), 0.05), 3.0)
    return float(np.clip(mu, g.min(), g.max())), beta

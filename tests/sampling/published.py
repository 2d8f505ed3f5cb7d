"""The algorithms of the papers as they are printed there, and the library's solvers driven along the same grids."""

import math
from itertools import pairwise

import torch

from scorelm.sampling.solvers import Estimate, Step, tempered

from .draws import Given, normals
from .laws import F64, INF, TABLE, E, bayes
from .steps import whole_step


def denoised(x_NE, sigma):
    """D(x; sigma) = E[e | x], one level for all."""
    return bayes(x_NE, torch.full((len(x_NE),), float(sigma), dtype=F64)).softmax(-1) @ TABLE


def drive(solver, grid, x_NE, draws=None, churn=None, temperature=1.0, posterior=bayes, table=TABLE):
    """`x_NE` along one grid for all positions ([K + 1]) or one for each ([K + 1, N]), in float64.

    `draws[k]` are the draws of step k and `churn[k]` the normal that is added before it; NaN where left out.
    """
    levels = [torch.as_tensor(level, dtype=F64).expand(len(x_NE)) for level in grid]
    never = Given(torch.full_like(x_NE, math.nan))
    before = Estimate(torch.zeros_like(x_NE), torch.full((len(x_NE),), INF, dtype=F64))
    for k, (sigma_N, target_N) in enumerate(pairwise(levels)):
        moving_N = target_N < sigma_N
        if solver.churn is not None:
            raised_N = torch.where(moving_N, solver.churn(sigma_N, len(levels) - 1), sigma_N)
            scale_N = torch.where(sigma_N.isfinite(), (raised_N**2 - sigma_N**2).sqrt(), 0.0)
            added_NE = never.eps_NE if churn is None else churn[k]
            x_NE = torch.where(
                scale_N[:, None] > 0, x_NE + solver.churn_noise * scale_N[:, None] * added_NE, x_NE
            )  # fmt: skip
            sigma_N = raised_N
        logits_NV = posterior(x_NE, sigma_N)
        step = Step(x_NE, sigma_N, target_N, logits_NV, table, draws[k] if draws else never, before, temperature)
        x0_NE = tempered(step, logits_NV.softmax(-1) @ table, x_NE, sigma_N)
        before = Estimate(
            torch.where(moving_N[:, None], x0_NE, before.x0_NE), torch.where(moving_N, sigma_N, before.sigma_N)
        )
        moved_NE = whole_step(solver, step, posterior)
        x_NE = torch.where(target_N[:, None].isinf(), x_NE, moved_NE)  # those that wait are in no step
    return x_NE


def karras_grid(steps, low=0.25, high=8.0, rho=7):
    """EDM, eq. 5: t_0 > ... > t_N = 0."""
    share = torch.arange(steps, dtype=F64) / (steps - 1)
    inner = (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [*inner.tolist(), 0.0]


def edm_algorithm_1(x, t, D):
    """EDM (arXiv 2206.00364), Alg. 1, for sigma(t) = t and s(t) = 1."""
    for i in range(len(t) - 1):
        d_i = (x - D(x, t[i])) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d_i
        if t[i + 1] != 0:
            d_prime = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (d_i / 2 + d_prime / 2)
        x = x_next
    return x


def edm_algorithm_2(x, t, D, noise, S_churn, S_noise, S_tmin, S_tmax):
    """EDM, Alg. 2: `noise[i]` is standard normal."""
    N = len(t) - 1
    for i in range(N):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * S_noise * noise[i]
        d_i = (x_hat - D(x_hat, t_hat)) / t_hat
        x_next = x_hat + (t[i + 1] - t_hat) * d_i
        if t[i + 1] != 0:
            d_prime = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x_hat + (t[i + 1] - t_hat) * (d_i / 2 + d_prime / 2)
        x = x_next
    return x


def dpm_solver_pp_2m(x, t, D):
    """DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2), as in the paper for a variance-preserving process.

    ``alpha^2 + sigma^2 = 1``, lambda = log(alpha / sigma), and the state is alpha times ours; a last step to sigma 0 is
    of first order, its limit being the data prediction.
    """
    alpha = [1 / math.sqrt(1 + s**2) for s in t]
    sigma = [s / math.sqrt(1 + s**2) for s in t]
    lam = [math.log(a / s) if s else INF for a, s in zip(alpha, sigma, strict=True)]
    x = alpha[0] * x
    previous = None
    for i in range(1, len(t)):
        prediction = D(x / alpha[i - 1], t[i - 1])
        h = lam[i] - lam[i - 1]
        mixed = prediction
        if previous is not None and t[i] != 0:
            r = (lam[i - 1] - lam[i - 2]) / h
            mixed = (1 + 1 / (2 * r)) * prediction - 1 / (2 * r) * previous
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * mixed
        previous = prediction
    return x / alpha[-1]


def euler_ancestral(x, t, D, noise, eta):
    """k-diffusion's sample_euler_ancestral."""
    for i in range(len(t) - 1):
        up = min(t[i + 1], eta * (t[i + 1] ** 2 * (t[i] ** 2 - t[i + 1] ** 2) / t[i] ** 2) ** 0.5)
        down = (t[i + 1] ** 2 - up**2) ** 0.5
        x = x + (x - D(x, t[i])) / t[i] * (down - t[i])
        if t[i + 1] > 0:
            x = x + noise[i] * up
    return x


def flow_by_euler(x, t, D):
    """dx = -sigma score dsigma with Tweedie's score, step by step (EDM, eq. 1)."""
    for a, b in pairwise(t):
        score = (D(x, a) - x) / a**2
        x = x + (b - a) * (-a * score)
    return x


GRID = karras_grid(18)
START = TABLE[torch.arange(48) % 4] + 8 * normals(48, E, seed=1)
NOISE = normals(18, 48, E, seed=2)
CHURN = normals(18, 48, E, seed=3)
PUBLISHED = {
    "euler": flow_by_euler,
    "heun": edm_algorithm_1,
    "dpmpp_2m": dpm_solver_pp_2m,
    "ancestral": lambda x, t, D: euler_ancestral(x, t, D, NOISE, 1.0),
    "ancestral:0.3": lambda x, t, D: euler_ancestral(x, t, D, NOISE, 0.3),
    "ancestral:0": lambda x, t, D: euler_ancestral(x, t, D, NOISE, 0.0),
    "sde": lambda x, t, D: edm_algorithm_2(x, t, D, CHURN, 40, 1, 0, INF),
    "sde:0": edm_algorithm_1,
    "sde:4,1.1": lambda x, t, D: edm_algorithm_2(x, t, D, CHURN, 4, 1.1, 0, INF),
    "sde:6,0.9,0.5,5": lambda x, t, D: edm_algorithm_2(x, t, D, CHURN, 6, 0.9, 0.5, 5),
}

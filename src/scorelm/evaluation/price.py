"""What texts cost a model, in nats per token and bits per character: one function for every path and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from scorelm.evaluation.likelihood import Priced, autoregressive, bound, left_to_right, random_order, right_to_left
from scorelm.evaluation.rows import Batch, Rows, batches, cut, length_nats
from scorelm.evaluation.walk import walk
from scorelm.model.scorelm import ScoreLM
from scorelm.noise.path import PATHS, make_path
from scorelm.noise.schedule import Schedule
from scorelm.sampling.options import make_options

if TYPE_CHECKING:
    from scorelm.training.distributed import Ranks

ORDERS = ("ordered", "reverse", "random")
"""Left to right, right to left, and the mean over all orders: exact NLL of a model that writes token by token."""
SELF_CONDITIONING_PASSES = 2
"""Evaluations at a point of the bound or an order, each fed the estimate of the one before."""


@dataclass(frozen=True)
class Price:
    """What some texts cost.

    Attributes:
        path: that was priced.
        exact: whether this is the NLL itself rather than a bound on it.
        nats_per_token: total nats over total tokens, `<s>` (which costs nothing) and `</s>` included.
        bits_per_char: total bits over total characters of the texts.
        stderr_nats_per_token: standard error over texts.
        tokens: total.
        nfe: mean number of evaluations that a text took part in.
        terms: nats per token by term: reconstruction, diffusion, prior and length.
        integrand: [2, N] sigma and nats per token and unit of log sigma, where there was an integral.
        by_text: [T] nats of every text.
    """

    path: str
    exact: bool
    nats_per_token: float
    bits_per_char: float
    stderr_nats_per_token: float
    tokens: int
    nfe: float
    terms: dict[str, float]
    integrand: Tensor | None = None
    by_text: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures, without what a plot or a comparison needs."""
        return {name: value for name, value in asdict(self).items() if name not in ("integrand", "by_text")}


def price(
    lm: ScoreLM,
    texts: Sequence[str],
    path: str | None = None,
    *,
    steps: int | None = None,
    draws: int = 16,
    seed: int = 0,
    positions: int = 4096,
    watch: Callable[[float], object] | None = None,
    ranks: Ranks | None = None,
) -> Price:
    """Price texts along a path.

    Args:
        lm: the model.
        texts: what to price; one that is longer than the model's rows is cut into several.
        path: ``uniform`` (default), ``ramp:SLOPE`` or ``blocks:SIZE``: the variational bound in the limit of small
            steps; ``ordered`` (the default of an autoregressive model), ``reverse`` or ``random`` (of a masked one):
            exact NLL; any path with `steps`, adaptive ones always: the bound of the sampler that makes these steps.
        steps: evaluations of the sampler; 64 on adaptive paths if not given.
        draws: points of the integral, or of a random order, in each row.
        seed: of the noise.
        positions: most positions in a batch; the result does not depend on it.
        watch: called with the share of the rows that are done.
        ranks: who shares the rows out; each gets the whole result.

    Raises:
        ValueError: no text, or a path that the model cannot be priced on.
    """
    name = path or {"score": "uniform", "masked": "random", "autoregressive": "ordered"}[lm.objective]
    rows = cut(texts, lm.tokenizer, lm.max_length)
    method, known = pricing(lm, name, steps, draws, seed)
    nats: dict[str, Tensor] = {"reconstruction": torch.zeros(len(rows.ids), dtype=torch.float64)}
    evaluations, done, seen = torch.zeros(len(rows.ids)), 0, []
    for k, batch in enumerate(batches(rows.ids, next(lm.parameters()).device, positions)):
        if ranks is not None and k % ranks.world != ranks.rank:
            continue
        with torch.inference_mode():
            priced = method(batch)
        for term, value_B in priced.terms.items():
            total = nats.setdefault(term, torch.zeros(len(rows.ids), dtype=torch.float64))
            total[batch.index] = value_B.cpu()
        evaluations[batch.index] = priced.evaluations
        seen += [] if priced.integrand is None else [priced.integrand]
        done += len(batch.index)
        if watch is not None:
            watch(done / len(rows.ids))
    if ranks is not None:
        nats, evaluations, seen = together(ranks.gather((nats, evaluations, seen)))
    if known:
        nats["length"] = length_nats(lm.lengths, rows.ids)
    integrand = None
    if seen:
        integrand = curve(lm.schedule, torch.cat(seen, 1), float(nats["diffusion"].sum() / rows.tokens.sum()))
    return summary(name, name in ORDERS, rows, nats, evaluations, integrand)


Part: TypeAlias = tuple[dict[str, Tensor], Tensor, list[Tensor]]
"""Nats by term and evaluations, 0 for the rows of other ranks, and what was integrated."""


def together(parts: Sequence[Part]) -> Part:
    """What the ranks have found, in one."""
    names = dict.fromkeys(name for nats, _, _ in parts for name in nats)
    zero = torch.zeros(len(parts[0][1]), dtype=torch.float64)
    nats = {name: torch.stack([part.get(name, zero) for part, _, _ in parts]).sum(0) for name in names}
    evaluations = torch.stack([evaluations for _, evaluations, _ in parts]).sum(0)
    return nats, evaluations, [integrand for _, _, seen in parts for integrand in seen]


def pricing(lm: ScoreLM, name: str, steps: int | None, draws: int, seed: int) -> tuple[Callable[[Batch], Priced], bool]:
    """What prices a batch along a path, and whether it takes the length of a row as known.

    Raises:
        ValueError: a path that the model or the method does not allow.
    """
    denoiser, passes = lm.denoiser, SELF_CONDITIONING_PASSES if lm.objective == "score" else 1
    if draws < 1 or (steps is not None and steps < 1):
        raise ValueError(f"draws and steps must be 1 or more, got {draws} and {steps}")
    if name in ORDERS and steps is not None:
        raise ValueError(f"{name} is exact, token by token: it takes no steps")
    if lm.objective == "autoregressive":
        if name != "ordered":
            raise ValueError(f"an autoregressive model is priced left to right: use ordered, not {name}")
        return lambda batch: autoregressive(denoiser, batch), False
    jumps = name == "random" or (name.partition(":")[0] in PATHS and make_path(name).jumps)
    if lm.objective == "masked" and not jumps:
        raise ValueError(f"a masked model knows no noise but all or none: use random, shuffled or bounded, not {name}")
    if name == "ordered":
        return lambda batch: left_to_right(denoiser, batch), False
    if name == "reverse":
        return lambda batch: right_to_left(denoiser, batch, passes), True
    if name == "random":
        return lambda batch: random_order(denoiser, batch, draws, seed, passes), True
    if name.partition(":")[0] not in PATHS:
        raise ValueError(f"no path or order {name!r}: choose {', '.join((*PATHS, *ORDERS))}")
    chosen = make_path(name)
    if chosen.forgets:
        raise ValueError(f"{name} takes evidence back, so nothing bounds its likelihood: it has no price")
    if steps is None and chosen.slope is not None:
        return lambda batch: bound(denoiser, lm.schedule, batch, chosen, draws, seed, passes), chosen.block != 1
    options = make_options(name, steps=steps or 64)
    return lambda batch: walk(denoiser, lm.schedule, batch, options, seed), chosen.block != 1


def curve(schedule: Schedule, seen: Tensor, diffusion: float, bins: int = 24) -> Tensor:
    """Where along the noise levels a bound's nats are: [2, bins], sigma and nats per token and unit of log sigma.

    Args:
        schedule: that u belongs to.
        seen: [2, N] u of the draws, uniform on [0, 1], and the integrand over u.
        diffusion: the integral, in nats per token.
        bins: of equal width in u.
    """
    u_N, value_N = seen
    place_N = (u_N * bins).long().clamp(max=bins - 1)
    mean = torch.zeros(bins, dtype=torch.float64).index_add(0, place_N, value_N)
    mean /= torch.bincount(place_N, minlength=bins).clamp(min=1)
    centre = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    sigma = schedule.sigma(centre)
    return torch.stack([sigma, mean * diffusion / mean.mean() * sigma / schedule.derivative(centre)])


def summary(
    path: str, exact: bool, rows: Rows, nats: dict[str, Tensor], evaluations: Tensor, integrand: Tensor | None
) -> Price:
    """Totals over texts, with the standard error of their ratio to tokens."""
    tokens_T = rows.tokens
    by_text = rows.by_text(torch.stack(list(nats.values())).sum(0))
    tokens, total = float(tokens_T.sum()), float(by_text.sum())
    error = float((by_text - total / tokens * tokens_T).square().sum().sqrt()) / tokens
    terms = {name: float(value.sum()) / tokens for name, value in nats.items()}
    bits = total / math.log(2) / max(1, sum(rows.characters))
    nfe = float(rows.by_text(evaluations).mean())
    return Price(path, exact, total / tokens, bits, error, int(tokens), nfe, terms, integrand, by_text)

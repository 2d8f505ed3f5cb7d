"""What texts cost a model, in nats per token and bits per character: one function for every path and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scorelm.config.generation import Generation, Pricing, takes
from scorelm.errors import InputError, brief
from scorelm.evaluation.likelihood import Priced, bound, left_to_right, random_order, right_to_left
from scorelm.evaluation.rows import CutTexts, RowBatch, batches, cut, length_nats, most_positions
from scorelm.evaluation.walk import walk
from scorelm.lm import ScoreLM
from scorelm.noise.schedule import Gumbel, Schedule, easy_snr
from scorelm.parallel import ALONE, Ranks
from scorelm.sampling.paths import PATHS, Path, make_path
from scorelm.sampling.request import Settings

ORDERS = ("ordered", "reverse", "random")
"""Left to right, right to left, and the mean over all orders, of a model that writes token by token."""
SELF_CONDITIONING_PASSES = 2
"""Evaluations at a point of the bound or an order, each fed the estimate of the one before."""
BINS = 24
"""Parts of the noise levels, equal in u, by which nats are shown."""


@dataclass(frozen=True)
class Price:
    """What some texts cost.

    Attributes:
        path: that was priced.
        exact: whether this is the NLL itself rather than a bound on it.
        kind: the same in words: exact, upper bound, or upper bound (mean over N orders).
        nats_per_token: total nats over total tokens, `<s>` (which costs nothing) and `</s>` included.
        bits_per_char: total bits over total characters of the texts; over those that come back from the tokenizer if
            the price is lossy, and otherwise None where some don't; None of texts without a character.
        stderr_nats_per_token: standard error over texts.
        tokens: total.
        nfe: mean number of evaluations that a text took part in.
        unknown_characters: characters of the texts that don't come back from the tokenizer, and so have no price.
        terms: nats per token by term: reconstruction, diffusion, prior and length.
        integrand: [2, N] sigma and nats per token and unit of log sigma, where there was an integral.
        by_text: [T] nats of every text.
    """

    path: str
    exact: bool
    kind: str
    nats_per_token: float
    bits_per_char: float | None
    stderr_nats_per_token: float
    tokens: int
    nfe: float
    unknown_characters: int
    terms: dict[str, float]
    integrand: Tensor | None = None
    by_text: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures, without what a plot or a comparison needs."""
        return {name: value for name, value in asdict(self).items() if name not in ("integrand", "by_text")}


@takes(Pricing)
def price(
    lm: ScoreLM,
    texts: str | Sequence[str] | CutTexts,
    path: str | None = None,
    *,
    positions: int | None = None,
    watch: Callable[[float], object] | None = None,
    ranks: Ranks = ALONE,
    **options: Any,
) -> Price:
    """What texts cost a model along a path.

    Args:
        lm: the model.
        texts: a text or several; one that is longer than the model's rows is cut into several rows. Or rows of tokens
            that are cut already.
        path: as listed below, like the other options.
        positions: most positions in a batch, by default as many as a vocabulary of the model's size leaves memory for;
            the result does not depend on it.
        watch: called with the share of the rows that are done.
        ranks: who shares the rows out; each gets the whole result.
        **options: as listed below.

    Raises:
        InputError: no text, text that the tokenizer cannot spell (unless lossy), or a path that the model cannot be
            priced on.
    """
    request = Pricing.of(path=path, **options)
    name = request.path or lm.objective.priced_path
    rows = texts
    if not isinstance(rows, CutTexts):
        rows = cut([rows] if isinstance(rows, str) else rows, lm.tokenizer, lm.max_length, request.lossy)
    check_spelling(rows, lm)
    method, known = pricing(lm, name, request)
    nats: dict[str, Tensor] = {"reconstruction": torch.zeros(len(rows.ids), dtype=torch.float64)}
    evaluations, done, seen = torch.zeros(len(rows.ids)), 0, []
    positions = positions or most_positions(lm.tokenizer.vocab_size, lm.device)
    for k, batch in enumerate(batches(rows.ids, lm.device, lm.tokenizer.special, positions)):
        if k % ranks.world != ranks.rank:
            continue
        with torch.inference_mode():
            priced = method(batch)
        for term, value_B in priced.terms.items():
            total = nats.setdefault(term, torch.zeros(len(rows.ids), dtype=torch.float64))
            total[batch.index] = value_B.cpu()
        evaluations[batch.index] = priced.evaluations
        seen += [] if priced.integrand is None else [binned(priced.integrand)]
        done += len(batch.index)
        if watch is not None:
            watch(done / len(rows.ids))
    if ranks.world > 1:
        nats, evaluations, seen = together(ranks.gather((nats, evaluations, seen)))
    if known:
        nats["length"] = length_nats(lm.lengths, rows.ids)
    found = summary(name, request, rows, nats, evaluations)
    if not seen:
        return found
    return replace(found, integrand=curve(bound_levels(lm), torch.stack(seen).sum(0), found.terms["diffusion"]))


def check_spelling(rows: CutTexts, lm: ScoreLM) -> None:
    """Refuse texts that the model could never write.

    Raises:
        InputError: some have ``<unk>`` in them, so that their probability is 0.
    """
    unknown = rows.holding(lm.tokenizer.special.unk)
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(rows.characters)} texts (number {unknown[0] + 1} is the first) have characters "
            "that this model's tokenizer cannot spell, so their probability is 0: leave them out, price what it can "
            "spell of them with --lossy, or train with a tokenizer that can spell them, as one with --byte-fallback can"
        )


Part: TypeAlias = tuple[dict[str, Tensor], Tensor, list[Tensor]]
"""Nats by term and evaluations, 0 for the rows of other ranks, and what was integrated, in bins."""


def together(parts: Sequence[Part]) -> Part:
    """What the ranks have found, in one."""
    names = dict.fromkeys(name for nats, _, _ in parts for name in nats)
    zero = torch.zeros(len(parts[0][1]), dtype=torch.float64)
    nats = {name: torch.stack([part.get(name, zero) for part, _, _ in parts]).sum(0) for name in names}
    evaluations = torch.stack([evaluations for _, evaluations, _ in parts]).sum(0)
    return nats, evaluations, [integrand for _, _, seen in parts for integrand in seen]


def read_path(name: str) -> Path | None:
    """The path of that name; None for an order.

    Raises:
        InputError: neither a path nor an order.
    """
    if name in ORDERS:
        return None
    if name.partition(":")[0] not in PATHS:
        raise InputError(f"no path or order {brief(name)!r}: choose {', '.join((*PATHS, *ORDERS))}")
    return make_path(name)


def is_exact(name: str, steps: int | None = None) -> bool:
    """Whether the price of a path or order is the NLL itself, or a bound on it.

    It is the NLL where a text comes about in one way only: left to right, right to left, on paths that say so, and in
    one step on all, or one for each block.
    """
    path = read_path(name)
    if path is None:
        return name in ("ordered", "reverse")
    return path.exact or steps == 1


def kind_of(name: str, request: Pricing) -> str:
    """What a price of a path or order is, in words."""
    draws = request.draws
    if is_exact(name, request.steps):
        return "exact"
    return f"upper bound (mean over {draws} order{'s' if draws > 1 else ''})" if name == "random" else "upper bound"


def check_pricing(request: Pricing) -> None:
    """Refuse what no model could be priced on, before one is loaded.

    Raises:
        InputError: an unknown path, one without a price, or steps for an order.
    """
    if request.path is None:
        return
    path = read_path(request.path)
    if path is None and request.steps is not None:
        raise InputError(f"{request.path} goes token by token: it takes no steps")
    if path is not None and path.forgets:
        raise InputError(f"{path} takes evidence back, so nothing bounds its likelihood: it has no price")


def pricing(lm: ScoreLM, name: str, request: Pricing) -> tuple[Callable[[RowBatch], Priced], bool]:
    """What prices a batch along a path, and whether it takes the length of a row as known.

    Raises:
        InputError: a path that the model or the method does not allow.
    """
    check_pricing(request.model_copy(update={"path": name}))
    path, draws, seed = read_path(name), request.draws, request.seed
    lm.objective.allows_price(name, path)
    loop, passes = lm.loop(request.precision), SELF_CONDITIONING_PASSES if lm.objective.self_conditions else 1
    if name == "ordered":
        return lambda batch: left_to_right(lm.objective, loop.network, batch), False
    if name == "reverse":
        return lambda batch: right_to_left(loop.network, batch, passes), True
    if path is None:
        return lambda batch: random_order(loop.network, batch, draws, seed, passes), True
    if request.steps is None and path.slope is not None:
        levels = bound_levels(lm)
        return lambda batch: bound(loop.network, levels, batch, path, draws, seed, passes), path.block != 1
    settings = Settings.of(Generation.of(path=name, steps=request.steps or 64, temperature=1.0))
    return lambda batch: walk(loop, batch, settings, seed), path.block != 1


def bound_levels(lm: ScoreLM) -> Schedule:
    """The model's noise levels, from the one on at which telling a token is easy (`easy_snr`).

    A bound may begin at any level, with a draw from the posterior there. Below this one a model that is right has
    little to tell, while one that is wrong about a token in thousands makes a mean over a few levels jump. How often a
    level is drawn is free too: where a schedule was fitted so steep that some are next to never drawn, it is flatter.
    """
    schedule, least = lm.schedule, lm.norm / easy_snr(lm.tokenizer.vocab_size)
    if schedule.sigma_min < least < schedule.sigma_max:
        schedule = replace(schedule, sigma_min=least)
    return schedule.covering() if isinstance(schedule, Gumbel) else schedule


def binned(seen: Tensor) -> Tensor:
    """Sums of the integrand and numbers of draws in parts of the noise levels: [2, N] u and integrand to [2, BINS]."""
    u_N, value_N = seen
    place_N = (u_N * BINS).long().clamp(max=BINS - 1)
    return torch.zeros(2, BINS, dtype=torch.float64).index_add(1, place_N, torch.stack([value_N, value_N**0]))


def curve(schedule: Schedule, seen: Tensor, diffusion: float) -> Tensor:
    """Where along the noise levels a bound's nats are: [2, BINS], sigma and nats per token and unit of log sigma.

    Args:
        schedule: that u belongs to.
        seen: [2, BINS] sums of the integrand over u and numbers of draws, u uniform on [0, 1].
        diffusion: the integral, in nats per token.
    """
    mean = seen[0] / seen[1].clamp(min=1)
    centre = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    sigma = schedule.sigma(centre)
    return torch.stack([sigma, mean * diffusion / mean.mean() * sigma / schedule.derivative(centre)])


def summary(path: str, request: Pricing, rows: CutTexts, nats: dict[str, Tensor], evaluations: Tensor) -> Price:
    """Totals over texts, with the standard error of their ratio to tokens."""
    tokens_T = rows.tokens
    by_text = rows.by_text(torch.stack(list(nats.values())).sum(0))
    tokens, total, unknown = float(tokens_T.sum()), float(by_text.sum()), sum(rows.unknown)
    error = float((by_text - total / tokens * tokens_T).square().sum().sqrt()) / tokens
    terms = {name: float(value.sum()) / tokens for name, value in nats.items()}
    characters = 0 if unknown and not request.lossy else sum(rows.characters)
    bits = total / math.log(2) / characters if characters else None
    nfe = float(rows.by_text(evaluations).mean())
    return Price(
        path, is_exact(path, request.steps), kind_of(path, request), total / tokens, bits, error, int(tokens), nfe,
        unknown, terms, by_text=by_text,
    )  # fmt: skip

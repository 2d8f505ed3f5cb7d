"""Schedules: monotone maps from u in [0, 1] to a noise level sigma, with inverse and derivative.

u = 0 is the least noise and u = 1 the most. Forward process: ``x = e + sigma * eps`` (variance exploding),
with token embeddings e of norm sqrt(E), so that sqrt(E)/sigma is the signal-to-noise ratio of one embedding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from scorelm.config.recipe import ScheduleName
from scorelm.device import constant, send
from scorelm.errors import InputError, brief


@dataclass(frozen=True)
class Schedule(ABC):
    """What every schedule offers; all three maps work elementwise on tensors of any shape and float dtype."""

    sigma_min: float
    sigma_max: float

    @abstractmethod
    def sigma(self, u: Tensor) -> Tensor:
        """Noise level at u in [0, 1]."""

    @abstractmethod
    def u(self, sigma: Tensor) -> Tensor:
        """Inverse of `sigma`, for sigma in [sigma_min, sigma_max]."""

    @abstractmethod
    def derivative(self, u: Tensor) -> Tensor:
        """The slope d sigma / d u."""

    def on(self, device: torch.device) -> Schedule:
        """The same schedule for compiled code, which serves every fit: numbers that are fitted are tensors.

        It is only for its three maps: it can't be compared or saved.
        """
        return self


@dataclass(frozen=True)
class Power(Schedule):
    """``sigma^(1/rho)`` linear in u (Karras et al., arXiv 2206.00364, eq. 5); rho = 1 is linear in sigma."""

    rho: float = 7.0

    @property
    def _ends(self) -> tuple[float, float]:
        return math.pow(self.sigma_min, 1 / self.rho), math.pow(self.sigma_max, 1 / self.rho)

    def sigma(self, u: Tensor) -> Tensor:
        low, high = self._ends
        return (low + u * (high - low)).pow(self.rho)

    def u(self, sigma: Tensor) -> Tensor:
        low, high = self._ends
        return (sigma.pow(1 / self.rho) - low) / (high - low)

    def derivative(self, u: Tensor) -> Tensor:
        low, high = self._ends
        return (low + u * (high - low)).pow(self.rho - 1) * (self.rho * (high - low))


@dataclass(frozen=True)
class Log(Schedule):
    """log sigma linear in u."""

    def sigma(self, u: Tensor) -> Tensor:
        return self.sigma_min * (u * math.log(self.sigma_max / self.sigma_min)).exp()

    def u(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def derivative(self, u: Tensor) -> Tensor:
        return self.sigma(u) * math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class Cosine(Schedule):
    """The cosine schedule ``alpha_bar = cos^2`` (arXiv 2301.10972) in sigma form: ``sigma = tan(angle)``."""

    def _angle(self, u: Tensor) -> Tensor:
        return math.atan(self.sigma_min) + u * (math.atan(self.sigma_max) - math.atan(self.sigma_min))

    def sigma(self, u: Tensor) -> Tensor:
        return self._angle(u).tan()

    def u(self, sigma: Tensor) -> Tensor:
        return (sigma.atan() - math.atan(self.sigma_min)) / (math.atan(self.sigma_max) - math.atan(self.sigma_min))

    def derivative(self, u: Tensor) -> Tensor:
        return (math.atan(self.sigma_max) - math.atan(self.sigma_min)) / self._angle(u).cos() ** 2


@dataclass(frozen=True)
class Gumbel(Schedule):
    """u linear in a cross-entropy curve ``exp(-exp(-(log sigma - mu) / beta))`` (LangFlow, arXiv 2604.11748).

    With the curve fitted to a model's cross-entropy (`fit_gumbel`), equal steps of u remove equal amounts of it:
    the time warping of CDCD (arXiv 2211.15089, section 3.3) in closed form. Computed in float64.
    """

    mu: float | Tensor
    beta: float | Tensor

    def on(self, device: torch.device) -> Gumbel:
        mu, beta = send(torch.tensor([self.mu, self.beta], dtype=torch.float64), device).unbind()
        return replace(self, mu=mu, beta=beta)

    def covering(self) -> Gumbel:
        """The schedule no steeper than lets a mean over a few levels see those at both ends.

        The curve is at least ``exp(-4)`` at the lowest level and ends ``exp(-6)`` below 1, so that both are drawn.
        """
        mu, low, high = float(self.mu), math.log(self.sigma_min), math.log(self.sigma_max)
        return replace(self, beta=max(float(self.beta), (mu - low) / math.log(4), (high - mu) / 6))

    def _curve(self, log_sigma: Tensor) -> Tensor:
        return (-((self.mu - log_sigma) / self.beta).exp()).exp()

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._curve(constant([math.log(self.sigma_min), math.log(self.sigma_max)], like, torch.float64))
        return low, high

    def _log_sigma(self, u: Tensor) -> Tensor:
        low, high = self._ends(u)
        g = self.mu - self.beta * (-(low + u.double() * (high - low)).log()).log()
        return g.clamp(math.log(self.sigma_min), math.log(self.sigma_max))

    def sigma(self, u: Tensor) -> Tensor:
        return self._log_sigma(u).exp().clamp(self.sigma_min, self.sigma_max).to(u.dtype)

    def u(self, sigma: Tensor) -> Tensor:
        low, high = self._ends(sigma)
        return ((self._curve(sigma.double().log()) - low) / (high - low)).clamp(0, 1).to(sigma.dtype)

    def derivative(self, u: Tensor) -> Tensor:
        low, high = self._ends(u)
        g = self._log_sigma(u)
        hazard = ((self.mu - g) / self.beta).exp().clamp(max=30)  # a curve below e^-30 is flat: bound its inverse
        slope = hazard * (-hazard).exp() / self.beta  # d curve / d log sigma
        return (g.exp() * (high - low) / slope).to(u.dtype)


def easy_snr(vocab_size: int) -> float:
    """Signal-to-noise ratio sqrt(E)/sigma above which telling a token from V - 1 random others is easy.

    The evidence of the true token exceeds another's by snr^2 on average, so that all the others together have odds
    of about ``(V - 1) exp(-snr^2 / 2)`` against it; here those odds are 1 : 20 (5.2 at V = 32,768).
    """
    return math.sqrt(2 * math.log(20 * (max(vocab_size, 2) - 1)))


def make_schedule(
    name: str, embedding_dim: int, vocab_size: int, sigma_min: float | None = None, sigma_max: float | None = None
) -> Schedule:
    """The schedule called `name`, over the given range or the range that suits E and V.

    The default range spans signal-to-noise ratios from 1.4 times `easy_snr`, where nothing is left to decide, down
    to 0.25, where next to nothing is known. Presets: ``ddlm`` linear on 1..10 (arXiv 2305.10818), ``cdcd`` linear
    on 1..300 (arXiv 2211.15089).

    Raises:
        InputError: unknown name, or an empty range.
    """
    norm = math.sqrt(embedding_dim)
    low, high = {"ddlm": (1.0, 10.0), "cdcd": (1.0, 300.0)}.get(
        name, (norm / (1.4 * easy_snr(vocab_size)), norm / 0.25)
    )
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise InputError(f"sigma must rise from sigma_min to sigma_max, got {low:g} to {high:g}")
    match name:
        case "linear" | "ddlm" | "cdcd":
            return Power(low, high, rho=1.0)
        case "karras":
            return Power(low, high, rho=7.0)
        case "log":
            return Log(low, high)
        case "cosine":
            return Cosine(low, high)
        case "adaptive":  # until it is fitted: the shape that a first fit on English text had
            return Gumbel(low, high, mu=math.log(norm / (0.66 * easy_snr(vocab_size))), beta=0.5)
    raise InputError(f"no schedule {name!r}: choose {', '.join(get_args(ScheduleName))}")


SHAPES: dict[str, type[Schedule]] = {shape.__name__.lower(): shape for shape in Schedule.__subclasses__()}


def schedule_to_dict(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain values, for `schedule_from_dict`."""
    return {"shape": type(schedule).__name__.lower(), **vars(schedule)}


def schedule_from_dict(values: dict[str, Any]) -> Schedule:
    """The schedule that `schedule_to_dict` wrote.

    Raises:
        InputError: unknown shape, missing or unknown values, or values that give no rising levels.
    """
    numbers = {k: v for k, v in values.items() if k != "shape"}
    shape = SHAPES.get(brief(values.get("shape")))
    if shape is None or set(numbers) != {f.name for f in fields(shape)}:
        raise InputError(f"not a noise schedule: {brief(values)}")
    if not all(type(v) in (int, float) and (v > 0 or name == "mu") for name, v in numbers.items()):
        raise InputError(f"a noise schedule needs numbers, all but mu above 0, got {brief(values)}")
    try:
        schedule = shape(**{name: float(v) for name, v in numbers.items()})
        sigma = schedule.sigma(torch.linspace(0, 1, 9, dtype=torch.float64))
        rises = bool(sigma.isfinite().all() and (sigma.diff() > 0).all())
    except (ArithmeticError, ValueError):  # a number too large or small for its formula
        rises = False
    if not rises:
        raise InputError(f"a noise schedule must rise from sigma_min to sigma_max, both finite, got {brief(values)}")
    return schedule

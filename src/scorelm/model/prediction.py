"""What a model says of the open positions of a batch: logits, and what follows from them, computed when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scorelm.device import send

CHUNK = 2**24
"""Most numbers of an array [N, V] that are held at a time where all of it is not asked for, on a CPU."""
CHUNK_ON_GPU = 2**28
"""The same elsewhere: 1 GiB in float32, of which a training step holds a few."""


Value = TypeVar("Value")


class once(Generic[Value]):
    """A property that is computed when first asked for: `functools.cached_property`, but open to torch.compile.

    A compiled graph computes equal things once by itself, and cannot trace the lock that Python 3.11 has there.
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Value:
        if torch.compiler.is_compiling():
            return self.function(instance)
        value = instance.__dict__[self.function.__name__] = self.function(instance)
        return value


@dataclass(frozen=True)
class Prediction:
    """The posterior over the tokens of N open positions, in reading order.

    Those are the positions with sigma above 0, without padding, and given ones that are asked for the next token.

    Nothing of size [N, V] exists before it is asked for.
    """

    open_BL: Tensor
    """Where the open positions are, bool; generation keeps it on the host, so that it waits for nothing."""
    table_VE: Tensor
    """Embeddings of all tokens."""
    read_out: Callable[..., tuple[Tensor, Tensor]]
    """From `rows`: the logits, and the part of them that evidence and prior give without context, [N, V] each."""
    rows: tuple[Tensor, ...]
    """What the logits of each position are read from; the trunk's output [N, D] comes first."""

    @classmethod
    def of(cls, logits_NV: Tensor, open_BL: Tensor, table_VE: Tensor) -> Prediction:
        """One with these logits."""
        return cls(open_BL, table_VE, lambda logits_NV: (logits_NV, logits_NV), (logits_NV,))

    @once
    def _logits(self) -> tuple[Tensor, Tensor]:
        return self.read_out(*self.rows)

    @property
    def logits_NV(self) -> Tensor:
        """Logits of the posterior, fp32."""
        return self._logits[0]

    @property
    def context_free_NV(self) -> Tensor:
        """The part of the logits that evidence and prior give without context."""
        return self._logits[1]

    @property
    def hidden_ND(self) -> Tensor:
        """The trunk's output."""
        return self.rows[0]

    @once
    def probability_NV(self) -> Tensor:
        """The posterior, fp32."""
        return self.logits_NV.softmax(-1)

    @once
    def x0_NE(self) -> Tensor:
        """Score interpolation (CDCD, arXiv 2211.15089, eq. 5): the posterior mean of the embedding, fp32."""
        probability_NV = self.probability_NV  # in the precision around, unlike the mean
        with torch.autocast(self.table_VE.device.type, enabled=False):
            return probability_NV @ self.table_VE

    @once
    def entropy_N(self) -> Tensor:
        """Entropy of the posterior in nats: the log-partition function less the mean logit."""
        log_partition_N = self.logits_NV.amax(-1) - self.probability_NV.amax(-1).log()
        mean_N: Tensor = torch.linalg.vecdot(self.probability_NV, self.logits_NV.clamp(min=-1e30))
        return (log_partition_N - mean_N).clamp(min=0)

    @property
    def top_probability_N(self) -> Tensor:
        """Probability of the likeliest token."""
        return self.probability_NV.amax(-1)

    @once
    def ids_N(self) -> Tensor:
        """The likeliest tokens."""
        return self.logits_NV.argmax(-1)

    @once
    def places_N(self) -> Tensor:
        """The open positions, counted row after row, where the logits are."""
        return places_of(self.open_BL, self.table_VE.device)

    def at(self, mask_BL: Tensor) -> Tensor:
        """Logits [M, V] of the positions of a mask, all of them open."""
        return self.logits_NV[places_of(mask_BL[self.open_BL], self.logits_NV.device)]

    def spread(self, value_N: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the open positions where they stand, [B, L, ...], and `fill` elsewhere; where `open_BL` is."""
        value_N = value_N.to(self.open_BL.device)
        spread_BL = value_N.new_full((*self.open_BL.shape, *value_N.shape[1:]), fill)
        spread_BL[self.open_BL] = value_N
        return spread_BL

    def in_chunks(self, function: Callable[..., Tensor], *rows_N: Tensor) -> Tensor:
        """``function(prediction, *rows)`` of a few positions at a time, so that no array [N, V] is held; joined."""

        def of_chunk(*rows: Tensor) -> Tensor:
            own, given = rows[: len(self.rows)], rows[len(self.rows) :]
            return function(Prediction(self.open_BL, self.table_VE, self.read_out, own), *given)

        return in_chunks(of_chunk, len(self.table_VE), *self.rows, *rows_N)


def places_of(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask is true, counted row after row, on a device, which is not waited for if the mask is on the host."""
    return send(mask.flatten().nonzero().squeeze(1), device)


def in_chunks(function: Callable[..., Tensor], vocabulary: int, *rows_N: Tensor) -> Tensor:
    """A function of N rows, whose work has the size [N, V], in chunks of at most `CHUNK` or `CHUNK_ON_GPU` numbers.

    Where there is more than one chunk, each is computed again for its gradient instead of kept.
    """
    size = max(1, (CHUNK if rows_N[0].device.type == "cpu" else CHUNK_ON_GPU) // vocabulary)
    if len(rows_N[0]) <= size:
        return function(*rows_N)
    chunks = zip(*(torch.split(t, size) for t in rows_N), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])

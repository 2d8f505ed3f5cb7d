"""What a run measures: sums over the steps since the last line of metrics.jsonl, and what such a line says.

Everything is summed on the run's device, so that no step waits for it; who reads it waits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from scorelm.device import constant
from scorelm.model.denoiser import Denoiser
from scorelm.noise.fit import sum_by_bin
from scorelm.noise.levels import runs
from scorelm.objectives.objective import Batch, Draw, Outcome
from scorelm.parallel import gather_tensor

BANDS = (6.0, 4.0, 3.0, 2.0, 1.0, 0.0)
"""Lower edges of the bands of sqrt(E)/sigma that the loss is reported by; one more is for no evidence, next tokens
that clean ones are asked for included."""


class Sums(NamedTuple):
    """What is summed over batches, steps and ranks: tensors without axes, and two [bands]."""

    loss: Tensor
    tokens: Tensor
    positions: Tensor
    flops: Tensor
    live: Tensor
    """Positions that the loss was computed at, where all of a batch's cross-entropies are finite."""
    correct: Tensor
    """Those whose likeliest token is right."""
    live_by_band: Tensor
    cross_entropy_by_band: Tensor

    @classmethod
    def of(cls, denoiser: Denoiser, batch: Batch, draw: Draw, outcome: Outcome, passes: Tensor) -> Self:
        """Of a batch of this rank; of its cross-entropies nothing where one of them is not finite.

        A training step costs as much as so many forward passes: three, and one more where it takes a first pass.
        """
        real_BL = batch.segment > 0
        streams, tokens = draw.ids_BS.shape[1] // batch.ids.shape[1], real_BL.sum()
        pairs = (runs(batch.segment).length_BL * real_BL).sum()  # as if each position saw all of its document
        forward = denoiser.flops(streams * tokens, streams * pairs, draw.noisy, draw.live)
        open_N, cross_entropy_N = outcome.open_N, outcome.cross_entropy_N.double()
        counts_N = open_N & (cross_entropy_N.isfinite() | ~open_N).all()
        edges = constant(BANDS[::-1], real_BL)
        band_N = len(BANDS) - torch.bucketize(denoiser.embedding.norm / outcome.sigma_N.float(), edges)
        values_NK = torch.stack([torch.ones_like(cross_entropy_N), cross_entropy_N], 1)
        by_band = sum_by_bin(band_N, torch.where(counts_N[:, None], values_NK, 0.0), len(BANDS) + 1)
        found = (
            outcome.loss.detach(), tokens, torch.full_like(tokens, real_BL.numel()), forward * passes,
            counts_N.sum(), (outcome.correct_N & counts_N).sum(), *by_band.T,
        )  # fmt: skip
        return cls(*(value.double() for value in found))

    @classmethod
    def unflatten(cls, values: Tensor) -> Self:
        """From what `flatten` gave."""
        *single, bands = torch.split(values, [1] * (len(cls._fields) - 2) + [2 * (len(BANDS) + 1)])
        return cls(*(value.squeeze(0) for value in single), *bands.chunk(2))

    def flatten(self) -> Tensor:
        """All of them in one vector."""
        return torch.cat([value.reshape(-1) for value in self])


class Window:
    """Sums over the steps since the last line of metrics.jsonl, kept on a device."""

    def __init__(self, device: torch.device) -> None:
        numbers = len(Sums._fields) - 2 + 2 * (len(BANDS) + 1)
        self.total = torch.zeros(numbers, dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)
        """Those whose loss is finite."""
        self.seconds = 0.0

    def add(self, found: Sums) -> None:
        """Count a step of all ranks together; its loss only if it is finite."""
        counts = found.loss.isfinite()
        self.total += found._replace(loss=torch.where(counts, found.loss, 0.0)).flatten()
        self.steps += counts

    def read(self) -> Sums:
        """The sums, on the CPU, which waits for the device."""
        return Sums.unflatten(self.total.cpu())

    def summary(self, peak: float) -> dict[str, object]:
        """What a line of metrics.jsonl says of these steps; `peak` is the FLOP/s of all ranks together at best."""
        sums, steps = self.read(), int(self.steps)
        names = [f">{BANDS[0]:g}", *(f"{low:g}-{high:g}" for high, low in pairwise(BANDS)), "none"]
        bands = zip(names, sums.live_by_band.tolist(), sums.cross_entropy_by_band.tolist(), strict=True)
        return {
            "loss": float(sums.loss) / steps if steps else None,
            "accuracy": float(sums.correct) / max(1.0, float(sums.live)),
            "loss_by_snr": {name: total / count if count else None for name, count, total in bands},
            "tokens_per_second": float(sums.tokens) / self.seconds,
            "packing_efficiency": float(sums.tokens / sums.positions),
            "mfu": float(sums.flops) / self.seconds / peak,
        }


def parameter_norm(denoiser: Denoiser) -> float:
    """Norm of all weights together; every rank must call it."""
    return float(gather_tensor(nn.utils.get_total_norm([p.detach() for p in denoiser.parameters()])))


def anisotropy(denoiser: Denoiser) -> float:
    """Mean cosine between the embeddings of two different tokens; 0 for directions spread evenly."""
    unit = gather_tensor(denoiser.embedding.table().detach()).float() / denoiser.embedding.norm
    count = len(unit)
    return float((unit.sum(0).pow(2).sum() - count) / (count * (count - 1)))

"""What a run measures: sums over the steps since the last line of metrics.jsonl, and what such a line says."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from scorelm.model.denoiser import Denoiser
from scorelm.noise.levels import runs
from scorelm.objectives.objective import Batch, Draw, Outcome
from scorelm.parallel import Ranks, gather_tensor

BANDS = (6.0, 4.0, 3.0, 2.0, 1.0, 0.0)
"""Lower edges of the bands of sqrt(E)/sigma that the loss is reported by; one more is for no evidence."""


class Window:
    """Sums over the steps since the last line of metrics.jsonl."""

    def __init__(self) -> None:
        self.loss = self.flops = self.seconds = 0.0
        self.steps = self.tokens = self.positions = self.live = self.correct = 0
        self.bands = torch.zeros(2, len(BANDS) + 1, dtype=torch.float64)

    def add(self, denoiser: Denoiser, batch: Batch, draw: Draw, outcome: Outcome, first_pass: bool) -> None:
        """Count a batch of this rank; without its cross-entropies where one of them is not finite.

        A training step costs three times the FLOPs of its forward pass, and one time more with a first pass.
        """
        document = runs(batch.segment)
        lengths = document.length_BL[(document.offset_BL == 0) & (batch.segment > 0)]
        streams = draw.ids_BS.shape[1] // batch.ids.shape[1]
        forward = denoiser.flops(lengths, streams=streams, noisy=int(draw.noisy), live=int(draw.live))
        self.flops += forward * (4 if first_pass else 3)
        self.positions += batch.segment.numel()
        if not outcome.cross_entropy_N.isfinite().all():
            return
        self.live += len(outcome.sigma_N)
        self.correct += int(outcome.correct_N.sum())
        edges = torch.tensor(BANDS[::-1], dtype=torch.float32)
        band = len(BANDS) - torch.bucketize(denoiser.embedding.norm / outcome.sigma_N.float(), edges)
        count = torch.bincount(band, minlength=len(BANDS) + 1)
        total = torch.bincount(band, outcome.cross_entropy_N.double(), minlength=len(BANDS) + 1)
        self.bands += torch.stack([count.double(), total])

    def count_step(self, loss: float, tokens: int) -> None:
        """Count a step of all ranks together; its loss only if it is finite."""
        self.tokens += tokens
        if math.isfinite(loss):
            self.loss += loss
            self.steps += 1

    def sum_over(self, ranks: Ranks) -> None:
        """Sum over ranks what each has counted for itself."""
        own = [self.flops, self.positions, self.live, self.correct, *self.bands.flatten().tolist()]
        flops, positions, live, correct, *bands = ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        self.flops, self.positions, self.live, self.correct = flops, int(positions), int(live), int(correct)
        self.bands = torch.tensor(bands, dtype=torch.float64).view_as(self.bands)

    def by_band(self) -> dict[str, float | None]:
        """Mean cross-entropy, nats, by band of sqrt(E)/sigma."""
        names = [f">{BANDS[0]:g}", *(f"{low:g}-{high:g}" for high, low in pairwise(BANDS)), "none"]
        counts, totals = self.bands.tolist()
        return {name: t / n if n else None for name, n, t in zip(names, counts, totals, strict=True)}

    def summary(self, peak: float) -> dict[str, object]:
        """What a line of metrics.jsonl says of these steps; `peak` is the FLOP/s of all ranks together at best."""
        return {
            "loss": self.loss / self.steps if self.steps else None,
            "accuracy": self.correct / max(1, self.live),
            "loss_by_snr": self.by_band(),
            "tokens_per_second": self.tokens / self.seconds,
            "packing_efficiency": self.tokens / self.positions,
            "mfu": self.flops / self.seconds / peak,
        }


def parameter_norm(denoiser: Denoiser) -> float:
    """Norm of all weights together; every rank must call it."""
    return float(torch.stack([gather_tensor(p.detach().norm()) for p in denoiser.parameters()]).norm())


def anisotropy(denoiser: Denoiser) -> float:
    """Mean cosine between the embeddings of two different tokens; 0 for directions spread evenly."""
    unit = gather_tensor(denoiser.embedding.table().detach()).double() / denoiser.embedding.norm
    count = len(unit)
    return float((unit.sum(0).pow(2).sum() - count) / (count * (count - 1)))

"""Evaluations of fixed shapes: on CUDA recorded as a graph of kernels, which the host launches all at once.

A small network spends more time on launches than on work. So its inputs stand in tensors that stay where they are, all
positions are computed alike, and what the first evaluations of a shape have launched is repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from scorelm.device import send
from scorelm.model.denoiser import Denoiser, Places
from scorelm.model.layout import Layout

MOST = 2**23
"""Most logits of an evaluation that is recorded; of more, launches are a small part."""
KEPT = 8
"""Shapes whose evaluations are kept at a time."""
EAGER = 2
"""Evaluations of a shape before it is recorded, which takes as long as several of them."""


def round_up(rows: int, length: int) -> tuple[int, int]:
    """What rows of some length are padded to, so that there are few shapes: a power of 2, and a multiple of 16."""
    return 1 << (rows - 1).bit_length(), -(-length // 16) * 16


class Pass:
    """The evaluation of a denoiser at one shape, [R, W] positions in rows of one stream, and what it reads."""

    def __init__(self, rows: int, length: int, size: int, device: torch.device) -> None:
        self.x_RWE, self.x0_RWE = torch.zeros(2, rows, length, size, device=device).unbind()
        self.sigma_RW = torch.zeros(rows, length, device=device)
        self.ids_RW = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.marks_4RW = torch.zeros(4, rows, length, dtype=torch.long, device=device)
        self.places = Places.of_shape(rows, length, device)
        self.layout: Layout | None = None
        """Whose marks these are."""
        self.turns = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_PV: Tensor | None = None
        """What the graph writes, in each replay."""

    def read(
        self, at_RW: Tensor, x_BLE: Tensor, x0_BLE: Tensor, ids_BL: Tensor, sigma_RW: Tensor, layout: Layout
    ) -> None:
        """Take the inputs in: positions of the tensors [B, L, ...] at those places, and levels of the host."""
        pairs = (self.x_RWE, x_BLE), (self.x0_RWE, x0_BLE), (self.ids_RW, ids_BL)
        for own, t_BL in pairs:
            torch.index_select(t_BL.flatten(0, 1), 0, at_RW.flatten(), out=own.flatten(0, 1))
        self.sigma_RW.copy_(send(sigma_RW, self.sigma_RW.device))
        if layout is not self.layout:
            torch.stack(layout.fields, out=self.marks_4RW)
            self.layout = layout

    def compute(self, denoiser: Denoiser, dtype: torch.dtype) -> Tensor:
        """Logits [R W, V] of all positions, in kernels that are the same every time."""
        self_cond_RWE = torch.where((self.sigma_RW > 0)[..., None], self.x0_RWE, 0.0)
        segment_RW, position_RW, block_RW, stream_RW = self.marks_4RW.unbind()
        layout = Layout(segment_RW, position_RW, block_RW, stream_RW)
        with torch.autocast(self.sigma_RW.device.type, dtype, enabled=dtype != torch.float32):
            return denoiser.predict(
                self.x_RWE, self.sigma_RW, layout, self_cond_RWE, self.ids_RW, places=self.places
            ).logits_NV

    def logits(self, denoiser: Denoiser, dtype: torch.dtype) -> Tensor:
        """The same by a graph where there can be one; the next evaluation then writes its own over them."""
        self.turns += 1
        if self.sigma_RW.device.type != "cuda" or self.turns <= EAGER:
            return self.compute(denoiser, dtype)
        with torch.cuda.device(self.sigma_RW.device):  # graphs are of the current one
            if self.graph is None:
                self.record(denoiser, dtype)
            assert self.graph is not None and self.logits_PV is not None
            self.graph.replay()
        return self.logits_PV

    def record(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        """Make the graph, on a stream on which everything has run once."""
        stream, graph = recording_stream(self.sigma_RW.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.compute(denoiser, dtype)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.logits_PV = self.compute(denoiser, dtype)
        self.graph = graph


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """What graphs are recorded on, one for a device: each has working memory of its own, which it keeps."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Passes:
    """The passes of a denoiser by their shape, those used last, as long as its weights stay where they are."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = weights
        self.kept: OrderedDict[tuple[int, int], Pass] = OrderedDict()

    def of_shape(self, rows: int, length: int, size: int, device: torch.device) -> Pass:
        """The pass of a shape, new or used before."""
        found = self.kept.pop((rows, length), None)
        if found is None and len(self.kept) == KEPT:
            self.kept.popitem(last=False)
        found = self.kept[rows, length] = found or Pass(rows, length, size, device)
        return found


PASSES: WeakKeyDictionary[Denoiser, Passes] = WeakKeyDictionary()
"""Of every denoiser that is there."""
ONE_AT_A_TIME = Lock()
"""Held while an evaluation goes through a pass, from its inputs until its logits are copied: threads share them."""


def passes_of(denoiser: Denoiser) -> Passes:
    """The passes of a denoiser; none of those before its weights have moved, or its layers were changed."""
    weights = (int(denoiser.training), *(parameter.data_ptr() for parameter in denoiser.parameters()))
    kept = PASSES.get(denoiser)
    if kept is None or kept.weights != weights:
        kept = PASSES[denoiser] = Passes(weights)
    return kept

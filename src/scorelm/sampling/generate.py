"""Generation as an iterator of step records: a path says where to go, a solver goes there, the model says how.

Progress bars, films, streaming and tests all consume the one iterator of `generate`; `sample` and `infill` run it to
its end and return text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.model.denoiser import Denoiser
from scorelm.noise.path import Path
from scorelm.noise.schedule import Schedule
from scorelm.sampling.solver import Solver, Step
from scorelm.text.conditioning import Template
from scorelm.text.tokenizer import BOS, EOS, PAD, UNK


@dataclass(frozen=True)
class Options:
    """How to generate."""

    path: Path
    solver: Solver
    steps: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, got {self.temperature:g}")


@dataclass(frozen=True)
class StepRecord:
    """The state after a step; tensors are [B, L] on the CPU, rows padded to the longest."""

    step: int
    """Evaluations of the denoiser so far."""
    sigma_BL: Tensor
    """Noise level of every position now: 0 is given or finished, inf not begun."""
    ids_BL: Tensor
    """Given and finished tokens, and the likeliest token elsewhere."""
    entropy_BL: Tensor
    """Entropy of the posterior in nats; 0 where the token was known before the step."""
    change_BL: Tensor
    """How far the estimate of x0 moved since the last step, in units of an embedding's norm."""
    length_B: Tensor
    """Length of each row; it falls when an open-ended row writes ``</s>``."""
    nfe_B: Tensor
    """Evaluations that each row has taken part in."""


class RowDraws:
    """Random numbers for a set of positions, each row's from its own generator, whatever its neighbours are."""

    def __init__(self, generators: list[torch.Generator], mask_BL: Tensor, dim: int) -> None:
        self.generators, self.mask_BL, self.dim = generators, mask_BL.cpu(), dim
        self.device = mask_BL.device

    def _rows(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        counts = self.mask_BL.sum(1).tolist()
        parts = [draw(n, g) for n, g in zip(counts, self.generators, strict=True) if n]
        return torch.cat(parts).to(self.device)

    def normal(self) -> Tensor:
        return self._rows(lambda n, g: torch.randn(n, self.dim, generator=g))

    def token(self, logits_NV: Tensor) -> Tensor:
        """Inverse-transform draws in float64."""
        u_N = self._rows(lambda n, g: torch.rand(n, dtype=torch.float64, generator=g))
        total_NV = logits_NV.double().softmax(-1).cumsum(-1)
        ids_N = torch.searchsorted(total_NV, u_N[:, None] * total_NV[:, -1:], right=True).squeeze(1)
        return ids_N.clamp(max=logits_NV.shape[1] - 1)


@dataclass
class State:
    """Everything that a step changes; tensors [B, L, ...]."""

    x_BLE: Tensor
    sigma_BL: Tensor
    ids_BL: Tensor
    x0_BLE: Tensor
    length_B: Tensor
    nfe_B: Tensor
    closed_B: Tensor
    """Whether the row's end is given; only an open row may write ``</s>``."""


@torch.inference_mode()
def generate(
    denoiser: Denoiser, schedule: Schedule, templates: Sequence[Template], seeds: Sequence[int], options: Options
) -> Iterator[StepRecord]:
    """Denoise the free positions of every template along a path, yielding a record after every evaluation.

    Args:
        denoiser: the model, in evaluation mode.
        schedule: maps the path's u to sigma; u = 1 becomes sigma inf and u = 0 sigma 0.
        templates: one document each, ids with None where free.
        seeds: one for each row; a row's draws depend on nothing else.
        options: path, solver, number of steps (evaluations; `blocks` takes at least one a block), temperature.
    """
    device = denoiser.prior.device
    state, free_BL, layout = start(denoiser, templates, options.path, device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    levels = options.path.levels(free_BL, layout.block_BL, options.steps)
    record: StepRecord | None = None
    step = 0
    while True:
        try:
            u_BL = next(levels) if record is None else levels.send(record)
        except StopIteration:
            return
        target_BL = to_sigma(u_BL, schedule).to(device)
        moving_BL = (target_BL < state.sigma_BL) & free_BL
        if not moving_BL.any():
            continue
        step += 1
        record = advance(denoiser, state, layout, target_BL, moving_BL, generators, options, step)
        finish_rows(state, free_BL, layout.segment_BL)
        yield replace(record, length_B=state.length_B.cpu())


def to_sigma(u_BL: Tensor, schedule: Schedule) -> Tensor:
    """Generation's levels: sigma(u) between, inf at u = 1 (no evidence) and 0 at u = 0 (finished)."""
    sigma_BL = schedule.sigma(u_BL.clamp(0, 1))
    return torch.where(u_BL >= 1, torch.inf, torch.where(u_BL <= 0, 0.0, sigma_BL)).float()


def start(
    denoiser: Denoiser, templates: Sequence[Template], path: Path, device: torch.device
) -> tuple[State, Tensor, Layout]:
    """The state before the first step: given tokens at sigma 0, free positions at sigma inf."""
    longest = max(map(len, templates))
    ids_BL = torch.full((len(templates), longest), PAD)
    free_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for row, template in enumerate(templates):
        ids_BL[row, : len(template)] = torch.tensor([PAD if token is None else token for token in template])
        free_BL[row, : len(template)] = torch.tensor([token is None for token in template])
    length_B = torch.tensor([len(t) for t in templates])
    position_BL = torch.arange(longest).expand_as(ids_BL)
    first = int(ids_BL[0, 0] == BOS)
    size = path.block or longest
    block_BL = torch.where(position_BL < first, 0, 1 + (position_BL - first) // size)
    segment_BL = (position_BL < length_B[:, None]).long()
    layout = Layout(segment_BL, position_BL, block_BL, torch.where(position_BL < first, CLEAN, NOISY)).to(device)
    ids_BL, free_BL, length_B = ids_BL.to(device), free_BL.to(device), length_B.to(device)
    x_BLE = torch.where(free_BL[..., None], 0.0, denoiser.embedding(ids_BL))
    sigma_BL = torch.where(free_BL, torch.inf, 0.0)
    closed_B = torch.tensor([t[-1] is not None for t in templates], device=device)
    state = State(x_BLE, sigma_BL, ids_BL, torch.zeros_like(x_BLE), length_B, torch.zeros_like(length_B), closed_B)
    return state, free_BL, layout


def advance(
    denoiser: Denoiser,
    state: State,
    layout: Layout,
    target_BL: Tensor,
    moving_BL: Tensor,
    generators: list[torch.Generator],
    options: Options,
    step: int,
) -> StepRecord:
    """One evaluation of the denoiser and one step of the solver, on the rows and columns that need it."""
    rows_R = moving_BL.any(1).nonzero().squeeze(1)
    reach_BL = within_reach(layout, moving_BL, options.path)
    width = int(reach_BL[rows_R].any(0).nonzero().max()) + 1
    reachable = replace(layout, segment_BL=torch.where(reach_BL, layout.segment_BL, 0))
    logits_NV, live_RW = evaluate(denoiser, state, reachable, rows_R, width, options)
    table_VE = denoiser.embedding.table()
    x0_NE = logits_NV.softmax(-1) @ table_VE

    entropy_BL, change_BL = torch.zeros_like(state.sigma_BL), torch.zeros_like(state.sigma_BL)
    live_BL = torch.zeros_like(moving_BL)
    live_BL[rows_R, :width] = live_RW
    log_NV = logits_NV.log_softmax(-1)
    entropy_BL[live_BL] = -(log_NV.exp() * log_NV).nan_to_num(nan=0.0).sum(-1)
    change_BL[live_BL] = (x0_NE - state.x0_BLE[live_BL]).norm(dim=-1) / denoiser.embedding.norm
    state.x0_BLE[live_BL] = x0_NE
    state.ids_BL[live_BL] = logits_NV.argmax(-1)

    moves_N = moving_BL[live_BL]
    draws = RowDraws(generators, moving_BL, table_VE.shape[1])
    finishing_M = target_BL[moving_BL] == 0
    now = Step(
        state.x_BLE[moving_BL], state.sigma_BL[moving_BL], target_BL[moving_BL], logits_NV[moves_N], table_VE, draws
    )
    x_ME = options.solver.move(now)
    ids_M = draws.token(now.logits_NV) if options.solver.stochastic else now.logits_NV.argmax(-1)
    ids_M = torch.where(finishing_M, ids_M, state.ids_BL[moving_BL])
    state.x_BLE[moving_BL] = torch.where(finishing_M[:, None], table_VE[ids_M], x_ME)
    state.ids_BL[moving_BL] = ids_M
    state.sigma_BL[moving_BL] = target_BL[moving_BL]
    state.nfe_B[rows_R] += 1
    shown = (
        t.cpu().clone() for t in (state.sigma_BL, state.ids_BL, entropy_BL, change_BL, state.length_B, state.nfe_B)
    )
    return StepRecord(step, *shown)


def evaluate(
    denoiser: Denoiser, state: State, layout: Layout, rows_R: Tensor, width: int, options: Options
) -> tuple[Tensor, Tensor]:
    """Tempered logits of the live positions among `rows_R` and the first `width` columns: ([N, V], [R, W] bool)."""
    part = Layout(
        *(t[rows_R, :width] for t in (layout.segment_BL, layout.position_BL, layout.block_BL, layout.stream_BL))
    )
    x_RWE, sigma_RW, x0_RWE = (t[rows_R, :width] for t in (state.x_BLE, state.sigma_BL, state.x0_BLE))
    if options.path.block:
        part = replace(part, stream_BL=finished_blocks(part.block_BL, sigma_RW))
    self_cond = torch.where((sigma_RW > 0)[..., None], x0_RWE, 0.0)
    logits_NV, _, live_RW = denoiser.live(x_RWE, sigma_RW, part, self_cond)
    closed_N = state.closed_B[rows_R, None].expand_as(live_RW)[live_RW]
    logits_NV[:, [BOS, PAD, UNK]] = -torch.inf
    logits_NV[closed_N, EOS] = -torch.inf
    return logits_NV / options.temperature, live_RW


def within_reach(layout: Layout, moving_BL: Tensor, path: Path) -> Tensor:
    """Positions that a step of a row must see: all of it, or on a path of blocks up to the one that moves."""
    real_BL = layout.segment_BL > 0
    if not path.block:
        return real_BL
    return real_BL & (layout.block_BL <= torch.where(moving_BL, layout.block_BL, 0).amax(1, keepdim=True))


def finished_blocks(block_BL: Tensor, sigma_BL: Tensor) -> Tensor:
    """Streams of a row that stands once: blocks without noise are CLEAN, the others NOISY."""
    noisy_BK = torch.zeros(block_BL.shape[0], int(block_BL.max()) + 1, device=block_BL.device)
    noisy_BK = noisy_BK.scatter_add(1, block_BL, (sigma_BL > 0).float())
    return torch.where(noisy_BK.gather(1, block_BL) > 0, NOISY, CLEAN)


def finish_rows(state: State, free_BL: Tensor, segment_BL: Tensor) -> None:
    """End open rows at the ``</s>`` they have written: what follows becomes padding."""
    column_L = torch.arange(free_BL.shape[1], device=free_BL.device)
    ended_BL = free_BL & (state.sigma_BL == 0) & (state.ids_BL == EOS)
    end_B = torch.where(ended_BL, column_L + 1, state.length_B[:, None]).amin(1)
    beyond_BL = column_L >= end_B[:, None]
    state.length_B.copy_(end_B)
    state.ids_BL[beyond_BL] = PAD
    state.sigma_BL[beyond_BL] = 0
    free_BL &= ~beyond_BL
    segment_BL[beyond_BL] = 0

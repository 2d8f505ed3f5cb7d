"""Generation as an iterator of step records: a path says where to go, a solver goes there, the model says how.

Progress bars, films, streaming and tests all consume the one iterator of `generate`; `sample` and `infill` run it to
its end and return text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scorelm.device import pick_dtype
from scorelm.model.attention import CLEAN, Layout
from scorelm.model.denoiser import Denoiser, lowered
from scorelm.noise.plan import Observation, Plan, to_sigma
from scorelm.noise.schedule import Schedule
from scorelm.sampling.cache import BlockCache, finished_blocks
from scorelm.sampling.guidance import guided, keep_likeliest
from scorelm.sampling.halting import Mind, entropy_of
from scorelm.sampling.options import Options
from scorelm.sampling.solver import Estimate, Step, tempered
from scorelm.sampling.state import RowDraws, shuffle, side_by_side, start
from scorelm.text.conditioning import Template
from scorelm.text.tokenizer import BOS, EOS, PAD, UNK


@dataclass(frozen=True)
class StepRecord:
    """The state after a step; tensors are [B, L] on the CPU, rows padded to the longest."""

    step: int
    """Steps so far."""
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


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    schedule: Schedule,
    templates: Sequence[Template],
    seeds: Sequence[int],
    options: Options,
    sampler: type[Sampler] | None = None,
) -> Iterator[StepRecord]:
    """Denoise the free positions of every template along a path, yielding a record after every step.

    Args:
        denoiser: the model, in evaluation mode.
        schedule: maps the path's u to sigma; u = 1 becomes sigma inf and u = 0 sigma 0.
        templates: one document each, ids with None where free.
        seeds: one for each row; a row's draws depend on nothing else.
        options: path, solver, number of evaluations, guidance, halting.
        sampler: what makes the steps, `Sampler` by default.
    """
    yield from (sampler or Sampler)(denoiser, schedule, templates, seeds, options).records()


class Sampler:
    """The loop of `generate` and what it evaluates; suffixes as in `Denoiser`, M the positions that a step moves."""

    never: Sequence[int] = [BOS, PAD, UNK]
    """Tokens that are not written."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        templates: Sequence[Template],
        seeds: Sequence[int],
        options: Options,
    ) -> None:
        self.table_VE, self.options = denoiser.embedding.table(), options
        device = self.table_VE.device
        dtype = pick_dtype(options.precision, device)
        self.denoiser = denoiser if dtype == torch.float32 else lowered(denoiser, dtype)
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.state, self.layout = start(denoiser.embedding, templates, options.path)
        self.prompt_BL = ~self.state.free_BL & self.state.real_BL & (self.layout.block_BL > 0)
        self.prompt_BL &= self.state.ids_BL != EOS
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if options.repair is not None:
            sigma = to_sigma(torch.tensor(options.repair, dtype=torch.float64), schedule)
            self.state.soften(self.prompt_BL, sigma, self.draws(self.prompt_BL).normal())
        self.closed_B = torch.tensor([t[-1] is not None for t in templates], device=self.table_VE.device)
        self.plan = Plan(
            self.state.free_BL, self.layout.block_BL, options.path_steps, schedule, self.observe,
            lambda: shuffle(self.generators, self.state.free_BL), options.nats_per_step,
            1.0 if options.repair is None else options.repair,
        )  # fmt: skip
        self.halts = options.halting.start() if options.halting else None
        self.seen: Mind | None = None
        self.entropy_BL = self.change_BL = self.confidence_BL = torch.zeros_like(self.state.sigma_BL)
        self.packed: tuple[tuple[int, ...], Tensor, Layout] = ((), self.prompt_BL, self.layout)
        self.cache: BlockCache | None = None
        if options.path.block and options.guidance.one_pass:
            dim, layers, heads, _ = denoiser.size
            shape = self.prompt_BL.shape
            self.cache = BlockCache(layers, heads, dim // heads, options.window, shape, device, dtype)

    def records(self) -> Iterator[StepRecord]:
        """Step along the path to its end."""
        state, step = self.state, 0
        for target_BL in self.options.path.levels(self.plan):
            if self.options.path.forgets:
                state.forget((target_BL > state.sigma_BL) & state.free_BL)
            moving_BL = (target_BL < state.sigma_BL) & state.free_BL
            if not moving_BL.any():
                continue
            step += 1
            self.step(target_BL, moving_BL)
            state.end_rows()
            shown = (state.sigma_BL, state.ids_BL, self.entropy_BL, self.change_BL, state.length_B, state.nfe_B)
            yield StepRecord(step, *(t.cpu().clone() for t in shown))

    def step(self, target_BL: Tensor, moving_BL: Tensor) -> None:
        """Evaluate the rows that move, unless the path has, let rows halt, and move."""
        if self.options.solver.churn is not None:
            self.add_noise(moving_BL)
        mind = self.seen or self.evaluate(moving_BL)
        if self.halts is not None:
            halted_BL = mind.open_BL & self.halts(mind)[:, None]
            target_BL, moving_BL = torch.where(halted_BL, 0.0, target_BL), moving_BL | halted_BL
        self.move(target_BL, moving_BL & (target_BL > 0), mind)
        self.finish(moving_BL & (target_BL == 0), mind)
        self.seen = None

    def move(self, target_BL: Tensor, moving_BL: Tensor, mind: Mind) -> None:
        """Take positions to a level above 0."""
        state = self.state
        if not moving_BL.any():
            return
        now = Step(
            state.x_BLE[moving_BL], state.sigma_BL[moving_BL], target_BL[moving_BL],
            mind.logits_NV[moving_BL[mind.open_BL]], self.table_VE, self.draws(moving_BL),
            lambda x_ME, sigma_M: self.evaluate_elsewhere(moving_BL, x_ME, sigma_M),
            Estimate(state.before_x0_BLE[moving_BL], state.before_sigma_BL[moving_BL]),
            self.options.guidance.score_temperature,
        )  # fmt: skip
        state.before_x0_BLE[moving_BL] = tempered(now, state.x0_BLE[moving_BL], now.x_NE, now.sigma_N)
        state.before_sigma_BL[moving_BL] = now.sigma_N
        state.x_BLE[moving_BL] = self.options.solver.move(now)
        state.sigma_BL[moving_BL] = now.target_N

    def finish(self, finishing_BL: Tensor, mind: Mind) -> None:
        """Write tokens: drawn from the posterior by a stochastic solver, else the likeliest."""
        state, solver = self.state, self.options.solver
        if not finishing_BL.any():
            return
        if solver.stochastic:
            logits_MV = keep_likeliest(mind.logits_NV[finishing_BL[mind.open_BL]], solver.top_k, solver.top_p)
            state.ids_BL[finishing_BL] = self.draws(finishing_BL).token(logits_MV)
        state.x_BLE[finishing_BL] = self.table_VE[state.ids_BL[finishing_BL]]
        state.sigma_BL[finishing_BL] = 0

    def draws(self, mask_BL: Tensor) -> RowDraws:
        """Random numbers for the positions of a mask."""
        return RowDraws(self.generators, mask_BL, self.table_VE.shape[1])

    def add_noise(self, moving_BL: Tensor) -> None:
        """Raise the level of the positions that are about to move, as the solver says (EDM, Alg. 2)."""
        state, solver = self.state, self.options.solver
        assert solver.churn is not None
        sigma_M = state.sigma_BL[moving_BL]
        raised_M = solver.churn(sigma_M, self.options.path_steps)
        scale_M = torch.where(sigma_M.isfinite(), (raised_M**2 - sigma_M**2).clamp(min=0).sqrt(), 0.0)
        state.x_BLE[moving_BL] += solver.churn_noise * scale_M[:, None] * self.draws(moving_BL).normal()
        state.sigma_BL[moving_BL] = raised_M
        if (raised_M > sigma_M).any():
            self.seen = None

    def observe(self) -> Observation:
        """What an adaptive path sees: the posterior at every open position."""
        state = self.state
        open_BL = state.free_BL & (state.sigma_BL > 0)
        if not open_BL.any():
            nothing_BL = torch.zeros_like(state.sigma_BL)
            return Observation(state.sigma_BL, nothing_BL, nothing_BL, nothing_BL)
        mind = self.seen or self.evaluate(open_BL)
        rate_BL = (self.table_VE.shape[1] - state.x0_BLE.square().sum(-1)) / 2
        return Observation(state.sigma_BL, mind.entropy_BL, rate_BL, self.confidence_BL)

    def evaluate(self, moving_BL: Tensor) -> Mind:
        """The posterior at the open positions that the rows with `moving_BL` see; remembered until the next step."""
        state = self.state
        reach_BL = self.reach(moving_BL)
        open_BL = reach_BL & (state.sigma_BL > 0)
        logits_NV = self.posterior(state.x_BLE, state.sigma_BL, reach_BL)
        probability_NV = logits_NV.softmax(-1)
        x0_NE = probability_NV @ self.table_VE
        self.entropy_BL, self.change_BL, self.confidence_BL = (torch.zeros_like(state.sigma_BL) for _ in range(3))
        self.confidence_BL[open_BL] = probability_NV.amax(-1)
        self.entropy_BL[open_BL] = entropy_of(logits_NV, probability_NV)
        self.change_BL[open_BL] = (x0_NE - state.x0_BLE[open_BL]).norm(dim=-1) / self.denoiser.embedding.norm
        state.x0_BLE[open_BL] = x0_NE
        state.ids_BL[open_BL] = logits_NV.argmax(-1)
        self.seen = Mind(open_BL, state.ids_BL.clone(), self.entropy_BL, logits_NV)
        return self.seen

    def evaluate_elsewhere(self, moving_BL: Tensor, x_ME: Tensor, sigma_M: Tensor) -> Tensor:
        """Logits at the moving positions, were they at another place and level; 0 in rows where all stay."""
        x_BLE, sigma_BL = self.state.x_BLE.clone(), self.state.sigma_BL.clone()
        x_BLE[moving_BL], sigma_BL[moving_BL] = x_ME, sigma_M
        reach_BL = self.reach(moving_BL & (sigma_BL < self.state.sigma_BL))
        logits_MV = x_ME.new_zeros(len(x_ME), len(self.table_VE))
        logits_MV[reach_BL[moving_BL]] = self.posterior(x_BLE, sigma_BL, reach_BL)[moving_BL[reach_BL & (sigma_BL > 0)]]
        return logits_MV

    def reach(self, moving_BL: Tensor) -> Tensor:
        """Positions that the rows which move must see: whole rows, or on a path of blocks up to the one that moves."""
        reach_BL = self.state.real_BL & moving_BL.any(1, keepdim=True)
        if not self.options.path.block:
            return reach_BL
        block_BL = self.layout.block_BL
        return reach_BL & (block_BL <= torch.where(moving_BL, block_BL, 0).amax(1, keepdim=True))

    def posterior(self, x_BLE: Tensor, sigma_BL: Tensor, reach_BL: Tensor) -> Tensor:
        """Guided and filtered logits of the noisy positions within reach, [N, V] in reading order."""
        guidance, open_BL = self.options.guidance, reach_BL & (sigma_BL > 0)
        logits_NV = self.once(x_BLE, sigma_BL, reach_BL, self.state.x0_BLE)
        told_BL = reach_BL & (self.prompt_BL & reach_BL).any(1, keepdim=True)
        if guidance.weight != 1 and told_BL.any():
            nothing_BL = torch.where(self.prompt_BL, torch.inf, sigma_BL)
            other_NV = self.once(x_BLE, nothing_BL, told_BL, self.state.x0_BLE)
            other_NV = other_NV[open_BL[told_BL & (nothing_BL > 0)]]
            at_N = told_BL[open_BL]
            logits_NV[at_N] = guided(logits_NV[at_N], other_NV, guidance.weight)
        if guidance.self_weight != 1:
            other_NV = self.once(x_BLE, sigma_BL, reach_BL, torch.zeros_like(x_BLE))
            logits_NV = guided(logits_NV, other_NV, guidance.self_weight)
        return guidance.filtered(logits_NV)

    def once(self, x_BLE: Tensor, sigma_BL: Tensor, reach_BL: Tensor, x0_BLE: Tensor) -> Tensor:
        """One evaluation of the rows within reach, densely packed: logits [N, V] of the noisy positions."""
        self.state.nfe_B += reach_BL.any(1)
        if self.cache is not None:
            return self.once_cached(x_BLE, sigma_BL, reach_BL, x0_BLE)
        extents = tuple(reach_BL.sum(1).tolist())
        if extents != self.packed[0]:
            self.packed = extents, *side_by_side(self.layout, extents)
        _, at_RW, layout = self.packed

        def packed(t_BL: Tensor) -> Tensor:
            return t_BL.flatten(0, 1)[at_RW]

        if self.options.path.block:
            stream_BL = finished_blocks(self.layout.block_BL, self.state.sigma_BL)
            layout = replace(layout, stream_BL=packed(stream_BL))
        sigma_RW = torch.where(layout.segment_BL > 0, packed(sigma_BL), 0.0)
        closed_RW, ids_RW = self.closed_B[at_RW // reach_BL.shape[1]], packed(self.state.ids_BL)
        logits_NV, live_RW = self.live(packed(x_BLE), sigma_RW, layout, packed(x0_BLE), closed_RW, ids_RW)
        return logits_NV[at_RW[live_RW].argsort()]

    def once_cached(self, x_BLE: Tensor, sigma_BL: Tensor, reach_BL: Tensor, x0_BLE: Tensor) -> Tensor:
        """The same from the positions that are not cached: those that a block has just finished, and the next block."""
        cache = self.cache
        assert cache is not None
        row_R, column_RW = cache.place(reach_BL)
        real_RW, row_RW, at_RW = column_RW >= 0, row_R[:, None], column_RW.clamp(min=0)
        stream_RW = finished_blocks(self.layout.block_BL, sigma_BL)[row_RW, at_RW]
        past = cache.past(row_R, self.layout, column_RW.amax(1))
        layout = Layout(
            real_RW.long(), self.layout.position_BL[row_RW, at_RW], self.layout.block_BL[row_RW, at_RW], stream_RW, past
        )
        sigma_RW = torch.where(real_RW, sigma_BL[row_RW, at_RW], 0.0)
        closed_RW = self.closed_B[row_RW].expand_as(at_RW)
        x_RWE, x0_RWE, ids_RW = (t[row_RW, at_RW] for t in (x_BLE, x0_BLE, self.state.ids_BL))
        logits_NV, _ = self.live(x_RWE, sigma_RW, layout, x0_RWE, closed_RW, ids_RW)
        cache.keep(past, row_R, column_RW, real_RW & (stream_RW == CLEAN))
        return logits_NV

    def live(
        self, x_RWE: Tensor, sigma_RW: Tensor, layout: Layout, x0_RWE: Tensor, closed_RW: Tensor, ids_RW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of the noisy positions and where they are."""
        self_cond_RWE = torch.where((sigma_RW > 0)[..., None], x0_RWE, 0.0)
        with self.autocast:
            logits_NV, _, live_RW = self.denoiser.live(x_RWE, sigma_RW, layout, self_cond_RWE, ids_RW, self.table_VE)
        return self.ruled_out(logits_NV, closed_RW[live_RW]), live_RW

    def ruled_out(self, logits_NV: Tensor, closed_N: Tensor) -> Tensor:
        """The logits, in place, without the tokens that are never written; closed rows have their ``</s>`` already."""
        logits_NV[:, self.never] = -torch.inf
        logits_NV[closed_N, EOS] = -torch.inf
        return logits_NV

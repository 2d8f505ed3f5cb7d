"""The way of a request's rows along its path: levels, predict, move, record.

`denoise` is written as a coroutine: it yields a `Query` whenever the network has to be asked, is sent the prediction,
and yields a `StepRecord` after every step. `scorelm.sampling.loop` drives it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scorelm.device import send
from scorelm.model.prediction import Prediction, places_of
from scorelm.sampling.guidance import guided, keep_likeliest
from scorelm.sampling.query import Query
from scorelm.sampling.request import Settings
from scorelm.sampling.solvers import Estimate, Solver, Step, bends, far_end, tempered
from scorelm.sampling.state import State


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
    before: Before
    """What the step began with."""
    candidates: Candidates | None = None
    """What the model held likely, where the request asked for it."""


class Before(NamedTuple):
    """The state before a step: levels, and tokens where they are finite; [B, L] on the CPU."""

    sigma_BL: Tensor
    ids_BL: Tensor

    @classmethod
    def of(cls, state: State) -> Before:
        """The state as it is now, copied."""
        return cls(copied(state.sigma_BL), copied(state.ids_BL))


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens at every position in a step, the likeliest first; on the CPU."""

    judged_BL: Tensor
    """Where the step made a posterior; elsewhere the other tensors are 0."""
    ids_BLK: Tensor
    probability_BLK: Tensor
    """Of each of them in the posterior, temperature and guidance included."""
    logprob_BL: Tensor
    """Log-probability of the token that the position has now."""


class Transition(Protocol):
    """What becomes of positions that move: tokens are drawn, or the true ones are told and priced."""

    def move(self, step: Step, moving_BL: Tensor) -> Tensor:
        """The new x [N, E] of positions that go to a level above 0; masks are on the host."""

    def write(self, logits_NV: Tensor, finishing_BL: Tensor, state: State) -> Tensor:
        """The tokens [N] of positions that finish."""


class Draw:
    """The transition of generation: the solver moves, and tokens are drawn, or the likeliest are taken."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver

    def move(self, step: Step, moving_BL: Tensor) -> Tensor:
        return self.solver.move(step)

    def write(self, logits_NV: Tensor, finishing_BL: Tensor, state: State) -> Tensor:
        if not self.solver.stochastic:
            return logits_NV.argmax(-1)
        return state.draws(finishing_BL).token(keep_likeliest(logits_NV, self.solver.top_k, self.solver.top_p))


def denoise(
    state: State, settings: Settings, transition: Transition, recorded: bool = True
) -> Generator[Query | StepRecord, Prediction, None]:
    """Take the rows of a request along its path, step by step, until every free position is finished.

    Records of the steps are only made where they are wanted (`recorded`).
    """
    path, halts, steps = settings.path, settings.halting.start() if settings.halting else None, 0
    while state.open_BL.any():
        state.step += 1
        before = Before.of(state) if recorded else None
        seen = (yield from judge(state, settings, state.open_BL, recorded)) if path.adaptive else None
        target_BL = path.next_levels(seen, state)
        if path.forgets:
            state.forget((target_BL > state.sigma_BL) & state.free_BL)
        moving_BL = (target_BL < state.sigma_BL) & state.free_BL
        if not moving_BL.any():
            continue
        if add_churn(state, settings, moving_BL) or seen is None:
            seen = yield from judge(state, settings, moving_BL, recorded)
        if halts is not None:
            halted_BL = seen.open_BL & halts(seen)[:, None]
            target_BL, moving_BL = torch.where(halted_BL, 0.0, target_BL), moving_BL | halted_BL
        yield from move(state, settings, transition, seen, moving_BL & (target_BL > 0), target_BL)
        finish(state, transition, seen, moving_BL & (target_BL == 0))
        state.end_rows()
        steps += 1
        if before is not None:
            guess(state, seen)
            yield record(state, seen, steps, before, settings.candidates)


def judge(
    state: State, settings: Settings, moving_BL: Tensor, recorded: bool
) -> Generator[Query, Prediction, Prediction]:
    """Ask about the open positions of the rows with `moving_BL`; the state takes the new estimate."""
    reach_BL = within_reach(state, settings, moving_BL)
    logits_NV = yield from ask(state, settings, state.x_BLE, state.sigma_BL, reach_BL)
    seen = Prediction.of(logits_NV, reach_BL & (state.sigma_BL > 0), state.rows.table_VE)
    if recorded:
        norm = state.x_BLE.shape[-1] ** 0.5
        state.change_BL = seen.spread((seen.x0_NE - state.x0_PE[seen.places_N]).norm(dim=-1) / norm)
    state.x0_PE[seen.places_N] = seen.x0_NE
    return seen


def ask(
    state: State, settings: Settings, x_BLE: Tensor, sigma_BL: Tensor, reach_BL: Tensor
) -> Generator[Query, Prediction, Tensor]:
    """Logits [N, V] of the open positions within reach, were they at `x_BLE` and `sigma_BL`; guided and filtered."""
    options, prompt_BL = settings.options, state.rows.prompt_BL

    def query(sigma_BL: Tensor, x0_BLE: Tensor, reach_BL: Tensor) -> Query:
        state.nfe_B += reach_BL.any(1)
        return Query.of(state, x_BLE, sigma_BL, x0_BLE, reach_BL, settings.path.block)

    open_BL = reach_BL & (sigma_BL > 0)
    logits_NV = (yield query(sigma_BL, state.x0_BLE, reach_BL)).logits_NV
    told_BL = reach_BL & (prompt_BL & reach_BL).any(1, keepdim=True)
    if options.guidance != 1 and told_BL.any():
        other = yield query(torch.where(prompt_BL, torch.inf, sigma_BL), state.x0_BLE, told_BL)
        at_N = places_of(told_BL[open_BL], logits_NV.device)
        logits_NV[at_N] = guided(logits_NV[at_N], other.at(open_BL & told_BL), options.guidance)
    if options.self_guidance != 1:
        other = yield query(sigma_BL, torch.zeros_like(x_BLE), reach_BL)
        logits_NV = guided(logits_NV, other.logits_NV, options.self_guidance)
    tempered_NV = logits_NV if options.temperature == 1 or settings.greedy else logits_NV / options.temperature
    return keep_likeliest(tempered_NV, options.top_k, options.top_p)


def within_reach(state: State, settings: Settings, moving_BL: Tensor) -> Tensor:
    """Positions that the rows which move must see: whole rows, or on a path of blocks up to the one that moves."""
    reach_BL = state.real_BL & moving_BL.any(1, keepdim=True)
    if not settings.path.block:
        return reach_BL
    block_BL = state.rows.layout.block_BL
    return reach_BL & (block_BL <= torch.where(moving_BL, block_BL, 0).amax(1, keepdim=True))


def add_churn(state: State, settings: Settings, moving_BL: Tensor) -> bool:
    """Raise the level of the positions that are about to move, as the solver says (EDM, Alg. 2); whether any rose."""
    solver = settings.solver
    if solver.churn is None:
        return False
    sigma_M = state.sigma_BL[moving_BL]
    raised_M = solver.churn(sigma_M, settings.path_steps)
    scale_M = torch.where(sigma_M.isfinite(), (raised_M**2 - sigma_M**2).clamp(min=0).sqrt(), 0.0)
    x_ME, noise_ME = state.x_PE[state.places(moving_BL)], state.draws(moving_BL).normal()
    state.put(moving_BL, x_ME + solver.churn_noise * send(scale_M, x_ME.device)[:, None] * noise_ME, raised_M)
    return bool((raised_M > sigma_M).any())


def move(
    state: State, settings: Settings, transition: Transition, seen: Prediction, moving_BL: Tensor, target_BL: Tensor
) -> Generator[Query, Prediction, None]:
    """Take positions to a level above 0, with a look at the far end where the solver corrects its step there."""
    if not moving_BL.any():
        return
    at_N, device = state.places(moving_BL), state.x_BLE.device
    x_NE, x0_NE, before_NE = (t[at_N] for t in (state.x_PE, state.x0_PE, state.before_x0_PE))
    levels = [sigma_BL[moving_BL] for sigma_BL in (state.sigma_BL, target_BL, state.before_sigma_BL)]
    sigma_N, target_N, before_N = send(torch.stack(levels), device).unbind()
    step = Step(
        x_NE, sigma_N, target_N, seen.at(moving_BL), state.rows.table_VE, state.draws(moving_BL),
        Estimate(before_NE, before_N), settings.options.score_temperature,
    )  # fmt: skip
    state.before_x0_PE[at_N] = tempered(step, x0_NE, x_NE, sigma_N)
    state.before_sigma_BL[moving_BL] = levels[0]
    moved_NE = transition.move(step, moving_BL)
    inner_BL = moving_BL & bends(state.sigma_BL, target_BL)
    if settings.solver.correct is not None and inner_BL.any():
        far_NV = yield from ask_elsewhere(state, settings, moving_BL, far_end(step, moved_NE)[1], inner_BL, target_BL)
        moved_NE = settings.solver.correct(step, moved_NE, far_NV)
    state.put(moving_BL, moved_NE, levels[1])


def ask_elsewhere(
    state: State, settings: Settings, moving_BL: Tensor, x_ME: Tensor, inner_BL: Tensor, target_BL: Tensor
) -> Generator[Query, Prediction, Tensor]:
    """Logits at the moving positions, were they at `x_ME` and the inner ones at their target; 0 in rows without any."""
    x_BLE, sigma_BL = state.x_BLE.clone(), torch.where(inner_BL, target_BL, state.sigma_BL)
    x_BLE.view(-1, x_ME.shape[1])[state.places(moving_BL)] = x_ME
    reach_BL = within_reach(state, settings, inner_BL)
    found_NV = yield from ask(state, settings, x_BLE, sigma_BL, reach_BL)
    logits_MV, device = found_NV.new_zeros(len(x_ME), found_NV.shape[1]), found_NV.device
    from_N = places_of(moving_BL[reach_BL & (sigma_BL > 0)], device)
    logits_MV[places_of(reach_BL[moving_BL], device)] = found_NV[from_N]
    return logits_MV


def finish(state: State, transition: Transition, seen: Prediction, finishing_BL: Tensor) -> None:
    """Write the tokens of positions that go to level 0."""
    if not finishing_BL.any():
        return
    state.write(finishing_BL, transition.write(seen.at(finishing_BL), finishing_BL, state))


def guess(state: State, seen: Prediction) -> None:
    """Put the likeliest tokens where the rows are still open: nothing but a record reads them."""
    open_BL = state.open_BL & seen.open_BL
    among_N = places_of(open_BL[seen.open_BL], seen.logits_NV.device)
    state.ids_BL.view(-1)[state.places(open_BL)] = seen.ids_N[among_N]


def record(state: State, seen: Prediction, steps: int, before: Before, candidates: int = 0) -> StepRecord:
    """The state as it is now, copied to the CPU."""
    return StepRecord(
        steps, copied(state.sigma_BL), copied(state.ids_BL), copied(seen.spread(seen.entropy_N)),
        copied(state.change_BL), copied(state.length_B), copied(state.nfe_B), before,
        likeliest(state, seen, candidates) if candidates else None,
    )  # fmt: skip


def copied(t: Tensor) -> Tensor:
    """A tensor of its own on the CPU."""
    return t.cpu().clone()


def likeliest(state: State, seen: Prediction, count: int) -> Candidates:
    """The `count` likeliest tokens of every position that was judged, of all tokens if there are fewer."""
    log_NV = seen.logits_NV.log_softmax(-1)
    top = log_NV.topk(min(count, log_NV.shape[1]))
    now_N = log_NV.gather(1, state.ids_BL.view(-1)[seen.places_N][:, None]).squeeze(1)
    spread = (seen.spread(t) for t in (top.indices, top.values.exp(), now_N))
    return Candidates(seen.open_BL.cpu().clone(), *(t.cpu() for t in spread))

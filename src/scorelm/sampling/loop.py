"""The loop of generation: requests of every kind join and leave it, and share evaluations of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from scorelm.model.prediction import Prediction
from scorelm.noise.schedule import Schedule
from scorelm.sampling.denoise import Draw, StepRecord, Transition, denoise
from scorelm.sampling.evaluator import Evaluator, Network
from scorelm.sampling.query import Query
from scorelm.sampling.request import Settings
from scorelm.sampling.state import Budget, State, start
from scorelm.text.templates import Template

Watch = Callable[[StepRecord], object]
"""Called with the record of every step."""


class Job:
    """The rows of one request under way; steps are only recorded if somebody watches."""

    def __init__(
        self, state: State, settings: Settings, evaluator: Evaluator, transition: Transition, watch: Watch | None
    ) -> None:
        self.state, self.evaluator, self.watch = state, evaluator, watch
        self.query: Query | None = None
        self._way = denoise(state, settings, transition, recorded=watch is not None)
        self._go(next(self._way, None))

    @property
    def finished(self) -> bool:
        """Whether every free position is written."""
        return self.query is None

    def answer(self, prediction: Prediction) -> None:
        """Go on to the next query, or to the end."""
        try:
            self._go(self._way.send(prediction))
        except StopIteration:
            self.query = None

    def _go(self, item: Query | StepRecord | None) -> None:
        while isinstance(item, StepRecord):
            if self.watch is not None:
                self.watch(item)
            item = next(self._way, None)
        self.query = item

    def rows(self) -> list[tuple[list[int], int]]:
        """Token ids of each row up to its end, and the evaluations that it took."""
        ids, lengths, nfe = self.state.ids_BL.cpu().tolist(), self.state.length_B.tolist(), self.state.nfe_B.tolist()
        return [(row[:length], count) for row, length, count in zip(ids, lengths, nfe, strict=True)]


EvaluatorFor = Callable[[Network, int | None], Evaluator]
"""``evaluator_for(network, window)``: what answers queries; see `scorelm.objectives.objective.Objective.evaluator`."""


class Loop:
    """Requests of any paths, solvers, lengths and steps that share evaluations; each joins and leaves by itself.

    Args:
        network: that answers.
        schedule: maps a path's u to sigma; u = 1 becomes sigma inf and u = 0 sigma 0.
        evaluator_for: makes what queries are answered by, one for each window on paths of blocks and one for the rest.
    """

    def __init__(self, network: Network, schedule: Schedule, evaluator_for: EvaluatorFor) -> None:
        self.network, self.schedule, self.evaluator_for = network, schedule, evaluator_for
        self.evaluators: dict[int | None, Evaluator] = {}
        self.jobs: list[Job] = []

    @torch.inference_mode()
    def join(
        self,
        templates: Sequence[Template],
        seeds: Sequence[int],
        settings: Settings,
        transition: Transition | None = None,
        watch: Watch | None = None,
    ) -> Job:
        """Add the rows of a request.

        Args:
            templates: one document each, ids with None where free.
            seeds: one for each row; a row's draws depend on nothing else.
            settings: path, solver, number of evaluations, guidance, halting.
            transition: what becomes of positions that move; by default tokens are drawn.
            watch: called with the record of every step.
        """
        start_at = 1.0 if settings.repair is None else settings.repair
        budget = Budget(self.schedule, settings.path_steps, settings.options.nats_per_step, start_at)
        network = self.network
        state = start(network.table_VE, templates, seeds, network.special, settings.path.block, budget, settings.greedy)
        window = settings.window if settings.path.block and settings.one_pass else None
        if window not in self.evaluators:
            self.evaluators[window] = self.evaluator_for(network, window)
        job = Job(state, settings, self.evaluators[window], transition or Draw(settings.solver), watch)
        self.jobs += [] if job.finished else [job]
        return job

    def leave(self, job: Job) -> None:
        """Take the rows of a request out before they are finished."""
        self.jobs.remove(job)

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Take all rows one evaluation further; the requests that this has finished."""
        groups: dict[int, list[Job]] = {}
        for job in self.jobs:
            groups.setdefault(id(job.evaluator), []).append(job)
        for jobs in groups.values():
            queries = [job.query for job in jobs if job.query is not None]
            for job, prediction in zip(jobs, jobs[0].evaluator(queries), strict=True):
                job.answer(prediction)
        finished = [job for job in self.jobs if job.finished]
        self.jobs = [job for job in self.jobs if not job.finished]
        return finished


def generate(
    loop: Loop,
    templates: Sequence[Template],
    seeds: Sequence[int],
    settings: Settings,
    transition: Transition | None = None,
) -> Iterator[StepRecord]:
    """Denoise the free positions of every template, yielding a record after every step; see `Loop.join`."""
    records: list[StepRecord] = []
    job = loop.join(templates, seeds, settings, transition, records.append)
    while True:
        yield from records
        records.clear()
        if job.finished:
            return
        loop.step()


LOGITS = 2**23
"""Most logits of rows that are written together on a CPU: 32 MiB in float32, of which a step holds about ten. More rows
at a time are no faster there."""
LOGITS_ON_GPU = 2**27
"""The same elsewhere, where only many rows make good use of the machine."""


def generate_in_batches(
    loop: Loop,
    templates: Sequence[Template],
    seeds: Sequence[int],
    settings: Settings,
    watch: Watch | None = None,
    progress: Callable[[float], object] | None = None,
) -> Iterator[tuple[list[int], int]]:
    """Write any number of rows in as much memory as a batch of them takes.

    Args:
        loop: that writes them.
        templates: one document each, ids with holes where free.
        seeds: one for each row.
        settings: of all of them.
        watch: called with the record of every step of every batch; its step is 1 where a batch begins.
        progress: called after every step with the share that is done, from 0 to 1.

    Yields:
        Token ids of each row up to its end, and the evaluations that it took, in order.
    """
    table_VE = loop.network.table_VE
    most = (LOGITS if table_VE.device.type == "cpu" else LOGITS_ON_GPU) // len(table_VE)
    for batch in cut_batches([len(template) for template in templates], most):
        job = loop.join(templates[batch], seeds[batch], settings, watch=watch)
        noise = noise_left(job.state.sigma_BL, loop.schedule)
        while not job.finished:
            loop.step()
            if progress is not None:
                done = 1 - noise_left(job.state.sigma_BL, loop.schedule) / noise
                progress((batch.start + done * (batch.stop - batch.start)) / len(templates))
        yield from job.rows()


def cut_batches(lengths: Sequence[int], positions: int) -> Iterator[slice]:
    """Rows one after another in batches of at most `positions` positions with padding, at least one row each."""
    begin = longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > begin and (row + 1 - begin) * longest > positions:
            yield slice(begin, row)
            begin, longest = row, length
    if begin < len(lengths):
        yield slice(begin, len(lengths))


def noise_left(sigma_BL: Tensor, schedule: Schedule) -> float:
    """The noise on all positions together, each from 0 where it is finished to 1 where it has not begun."""
    u_BL = schedule.u(sigma_BL.clamp(schedule.sigma_min, schedule.sigma_max))
    return float(torch.where(sigma_BL > 0, u_BL.clamp(0, 1), 0.0).sum())

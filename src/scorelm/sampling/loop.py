"""The loop of generation: requests of every kind join and leave it, and share evaluations of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from scorelm.model.prediction import Prediction
from scorelm.noise.schedule import Schedule
from scorelm.sampling.denoise import Draw, StepRecord, Transition, denoise
from scorelm.sampling.evaluator import Evaluator, Network, Query
from scorelm.sampling.request import Settings
from scorelm.sampling.state import Budget, State, start
from scorelm.text.templates import Template


class Job:
    """The rows of one request under way; `records` are those of the steps that it has made and nobody has taken."""

    def __init__(self, state: State, settings: Settings, evaluator: Evaluator, transition: Transition) -> None:
        self.state, self.evaluator = state, evaluator
        self.records: list[StepRecord] = []
        self.query: Query | None = None
        self._way = denoise(state, settings, transition)
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
            self.records.append(item)
            item = next(self._way, None)
        self.query = item

    def take_records(self) -> list[StepRecord]:
        """The records of the steps made since the last call."""
        records, self.records = self.records, []
        return records

    def rows(self) -> list[tuple[list[int], int]]:
        """Token ids of each row up to its end, and the evaluations that it took."""
        ids, lengths, nfe = self.state.ids_BL.tolist(), self.state.length_B.tolist(), self.state.nfe_B.tolist()
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
    ) -> Job:
        """Add the rows of a request.

        Args:
            templates: one document each, ids with None where free.
            seeds: one for each row; a row's draws depend on nothing else.
            settings: path, solver, number of evaluations, guidance, halting.
            transition: what becomes of positions that move; by default tokens are drawn.
        """
        start_at = 1.0 if settings.repair is None else settings.repair
        budget = Budget(self.schedule, settings.path_steps, settings.options.nats_per_step, start_at)
        state = start(self.network.table_VE, templates, seeds, self.network.special, settings.path.block, budget)
        window = settings.window if settings.path.block and settings.one_pass else None
        if window not in self.evaluators:
            self.evaluators[window] = self.evaluator_for(self.network, window)
        job = Job(state, settings, self.evaluators[window], transition or Draw(settings.solver))
        self.jobs += [] if job.finished else [job]
        return job

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
    job = loop.join(templates, seeds, settings, transition)
    while True:
        yield from job.take_records()
        if job.finished:
            return
        loop.step()

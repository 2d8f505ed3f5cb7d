"""The thread that owns the model: requests of every kind join its loops, share evaluations, and leave."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Thread
from typing import Any, TypeAlias

from scorelm.errors import InputError
from scorelm.lm import ScoreLM
from scorelm.sampling.denoise import StepRecord
from scorelm.sampling.loop import LOGITS, LOGITS_ON_GPU, Job, Loop
from scorelm.sampling.plan import Plan
from scorelm.sampling.sample import Sample
from scorelm.serving.metrics import Metrics


class Refusal(Exception):
    """A request that cannot be answered, with what the client is told.

    Args:
        status: of HTTP.
        kind: of error, for programs.
        message: for people.
        retry: seconds after which it makes sense to try again, if it does.
    """

    def __init__(self, status: int, kind: str, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.retry = status, kind, retry


@dataclass(frozen=True)
class Queued:
    """A request waits behind so many others."""

    ahead: int


@dataclass(frozen=True)
class Done:
    """A request is answered: with samples, or with what its work has returned."""

    result: Any


Event: TypeAlias = Queued | StepRecord | Done | Refusal
Work: TypeAlias = Plan | Callable[[Callable[[], object]], Any]
"""Texts to be written; or anything else that needs the model, and calls its argument now and then to let others in."""


@dataclass(eq=False)
class Ticket:
    """A request on its way through the worker.

    Attributes:
        work: what is asked for.
        send: called with every event, from the worker's thread; the last one is `Done` or a `Refusal`.
        seconds: that it may take, waiting included.
        steps: whether it wants the record of every step.
    """

    work: Work
    send: Callable[[Event], object]
    seconds: float
    steps: bool = False
    cancelled: bool = False
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        """Whether no one waits for it any more."""
        return self.cancelled or time.monotonic() > self.deadline


def late() -> Refusal:
    """What a request is told that takes too long."""
    return Refusal(504, "timeout", "this took too long: ask for fewer steps or texts, or try again later")


class Worker(Thread):
    """Runs until `drain`; a request joins in the order of arrival, as soon as its rows fit beside those under way.

    Args:
        lm: the model; nobody else may evaluate it meanwhile.
        queue: most requests that wait.
        metrics: are told of what it does.
    """

    def __init__(self, lm: ScoreLM, queue: int, metrics: Metrics) -> None:
        super().__init__(name="scorelm", daemon=True)
        self.lm, self.queue, self.metrics = lm, queue, metrics
        self.most = (LOGITS if lm.device.type == "cpu" else LOGITS_ON_GPU) // lm.tokenizer.vocab_size
        """Most positions that are evaluated together."""
        self.waiting: deque[Ticket] = deque()
        self.under_way: dict[Job, Ticket] = {}
        self.loops: dict[str, Loop] = {}
        """By precision."""
        self.changed = Condition()
        self.draining = False
        metrics.waiting.set_function(lambda: len(self.waiting))
        metrics.rows.set_function(lambda: sum(len(job.state.length_B) for job in list(self.under_way)))

    def submit(self, ticket: Ticket) -> None:
        """Take a request on.

        Raises:
            Refusal: the queue is full, or the server is about to stop.
            InputError: its texts together are more than can be evaluated at a time.
        """
        if isinstance(ticket.work, Plan) and self._positions(ticket.work) > self.most:
            raise InputError(f"these texts have more than {self.most:,} tokens together: ask for fewer at a time")
        with self.changed:
            if self.draining or not self.is_alive():
                raise Refusal(503, "overloaded", "the server is about to stop: try again in a moment", 5)
            if len(self.waiting) >= self.queue:
                raise Refusal(429, "overloaded", f"{self.queue:,} requests are waiting already: try again later", 2)
            self.waiting.append(ticket)
            if ticket.steps and len(self.waiting) > 1:
                ticket.send(Queued(len(self.waiting) - 1))
            self.changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Drop a request whose client has gone."""
        ticket.cancelled = True
        with self.changed:
            self.changed.notify()

    def drain(self) -> None:
        """Answer what is under way, tell what waits to try again, take nothing on, then stop."""
        with self.changed:
            self.draining = True
            self.changed.notify()

    def run(self) -> None:
        """Admit, evaluate, deliver, until drained."""
        while True:
            with self.changed:
                while not (self.waiting or self.under_way or self.draining):
                    self.changed.wait()
                if self.draining:
                    for ticket in self.waiting:
                        ticket.send(Refusal(503, "overloaded", "the server is about to stop: try again", 5))
                    self.waiting.clear()
                    if not self.under_way:
                        return
            self._turn()

    def _turn(self, plans_only: bool = False) -> None:
        """One evaluation of all that is under way."""
        self._drop()
        self._admit(plans_only)
        for precision in list(self.loops):
            self._step(precision)

    def _positions(self, plan: Plan) -> int:
        """Positions that the rows of a plan take, padding included."""
        return len(plan.drafts) * max((len(template) for template in plan.templates), default=0)

    def _drop(self) -> None:
        """End what was cancelled or takes too long."""
        for job, ticket in list(self.under_way.items()):
            if ticket.over:
                next(loop for loop in self.loops.values() if job in loop.jobs).leave(job)
                self._end(self.under_way.pop(job), late())
        with self.changed:
            for ticket in [one for one in self.waiting if one.over]:
                self.waiting.remove(ticket)
                self._end(ticket, late())

    def _admit(self, plans_only: bool) -> None:
        """Let requests join in their order, as long as they fit."""
        while True:
            used = sum(job.state.ids_BL.numel() for job in self.under_way)
            with self.changed:
                if not self.waiting:
                    return
                work = self.waiting[0].work
                if used and isinstance(work, Plan) and used + self._positions(work) > self.most:
                    return
                if plans_only and not isinstance(work, Plan):
                    return
                ticket = self.waiting.popleft()
                for ahead, other in enumerate(self.waiting):
                    if other.steps and ahead:
                        other.send(Queued(ahead))
            self._guard([ticket], partial(self._begin, ticket))

    def _begin(self, ticket: Ticket) -> None:
        work = ticket.work
        if not isinstance(work, Plan):
            self._end(ticket, Done(work(lambda: self._pause(ticket))))
            return
        precision = work.settings.options.precision
        if precision not in self.loops:
            self.loops[precision] = self.lm.loop(precision)
        loop = self.loops[precision]
        watch = ticket.send if ticket.steps else None
        job = loop.join(work.templates, work.seeds, work.settings, watch=watch)
        self.under_way[job] = ticket
        if job.finished:
            self._finish(job)

    def _pause(self, ticket: Ticket) -> None:
        """Let the texts of others go on in the middle of a long piece of work."""
        if ticket.over:
            raise late()
        self._turn(plans_only=True)

    def _step(self, precision: str) -> None:
        """One evaluation of what shares a precision."""
        loop = self.loops[precision]
        if not loop.jobs:
            return
        own = list(loop.jobs)
        with self.metrics.evaluation.time():
            whole = self._guard([self.under_way[job] for job in own], loop.step)
        if not whole:  # no one knows what state its rows are in
            del self.loops[precision]
            for job in own:
                self.under_way.pop(job)
            return
        for job in own:
            if job.finished:
                self._guard([self.under_way[job]], partial(self._finish, job))

    def _finish(self, job: Job) -> None:
        ticket = self.under_way.pop(job)
        assert isinstance(ticket.work, Plan)
        samples: list[Sample] = ticket.work.read(job.rows())
        self.metrics.tokens.inc(sum(len(sample.ids) for sample in samples))
        self._end(ticket, Done(samples))

    def _guard(self, tickets: list[Ticket], act: Callable[[], object]) -> bool:
        """Do it, and whether it went well; an error ends the requests that it is about, and never the worker."""
        try:
            act()
        except Refusal as error:
            refusal = error
        except InputError as error:
            refusal = Refusal(400, "invalid_request_error", str(error))
        except Exception:
            traceback.print_exc()
            refusal = Refusal(500, "server_error", "something went wrong here; the server's log says what")
        else:
            return True
        for ticket in tickets:
            self._end(ticket, refusal)
        return False

    def _end(self, ticket: Ticket, event: Done | Refusal) -> None:
        if not ticket.cancelled:
            ticket.send(event)

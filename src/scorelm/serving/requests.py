"""From a request of HTTP to the worker and back: one answer, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import anyio
from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import JSONResponse, Response

from scorelm.config.generation import Continuation, Infilling
from scorelm.config.serving import Serving
from scorelm.errors import InputError, brief
from scorelm.lm import ScoreLM
from scorelm.sampling.denoise import StepRecord
from scorelm.sampling.paths import make_path
from scorelm.sampling.plan import Plan
from scorelm.sampling.request import MOST_STEPS
from scorelm.serving.worker import Done, Event, Refusal, Ticket, Work, Worker
from scorelm.text.reading import say_reading
from scorelm.text.tokenizer import Tokenizer

SLOWEST = 30.0
"""Seconds after which a client that does not read its stream counts as gone; what it has not read takes memory."""


class Desk:
    """Takes requests to the worker, and sees that none outlives its client.

    Args:
        worker: that answers.
        limits: what a request may take.
    """

    def __init__(self, worker: Worker, limits: Serving) -> None:
        self.worker, self.limits = worker, limits

    def plan(self, lm: ScoreLM, texts: str | list[str], n: int, request: Continuation | Infilling) -> Plan:
        """A request made ready, if it is within the limits; they are asked first, since plans take memory.

        One that does not say how many steps it wants takes no more of them than the server allows.

        Raises:
            InputError: it is not, and says where the limit is; or it is bad in itself.
        """
        limits, count = self.limits, 1 if isinstance(texts, str) else len(texts)
        if request.steps is None:
            usual = request.path or lm.default_path(request)
            if request.path is None and lm.max_length > limits.most_steps:
                usual = lm.objective.default_path  # left to right might take more
            if make_path(usual).block != 1:
                request = request.model_copy(update={"steps": min(MOST_STEPS, limits.most_steps)})
        lengths = (request.length, request.max_length) if isinstance(request, Continuation) else ()
        for what, asked, most in (
            ("texts", count * n * request.best_of, limits.most_texts),
            ("steps", request.steps or 0, limits.most_steps),
            ("tokens in a text", max((length for length in lengths if length), default=0), limits.most_length),
        ):
            if asked > most:
                raise InputError(f"{brief(f'{asked:,}', 40)} {what} are too many: this server allows {most:,}")
        return lm.plan(texts, n, request)

    def submit(self, work: Work, steps: bool = False) -> tuple[Ticket, asyncio.Queue[Event]]:
        """Hand work to the worker; its events come in the queue.

        Raises:
            Refusal: the worker takes nothing on.
            InputError: it is too much.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = Ticket(work, send, self.limits.timeout, steps)
        self.worker.submit(ticket)
        return ticket, events

    async def answer(self, request: Request, work: Work, watch: Callable[[StepRecord], object] | None = None) -> Any:
        """What the work comes to; `watch` is called with the record of every step.

        Raises:
            Refusal: it came to nothing, or the client has gone.
        """
        ticket, events = self.submit(work, steps=watch is not None)
        gone = asyncio.create_task(wait_until_gone(request))
        try:
            while True:
                coming = asyncio.create_task(events.get())
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    raise Refusal(499, "gone", "the client has gone")
                match coming.result():
                    case StepRecord() as record if watch is not None:
                        watch(record)
                    case Done(result):
                        return result
                    case Refusal() as refusal:
                        raise refusal
        finally:
            gone.cancel()
            self.worker.cancel(ticket)

    def stream(self, plan: Plan, tell: Callable[[Event], Iterable[ServerSentEvent]]) -> Response:
        """Every event of a plan as the server-sent events that `tell` makes of it.

        Raises:
            Refusal: the worker takes nothing on.
            InputError: it is too much.
        """
        ticket, events = self.submit(plan, steps=True)

        async def told() -> AsyncIterator[ServerSentEvent]:
            try:
                while True:
                    event = await events.get()
                    for one in tell(event):
                        yield one
                    if isinstance(event, Done | Refusal):
                        return
            finally:
                self.worker.cancel(ticket)

        return EventSourceResponse(
            told(), ping=10, send_timeout=SLOWEST, shutdown_event=anyio.Event(),
            shutdown_grace_period=self.limits.timeout,
        )  # fmt: skip


def notes_on(texts: str | Iterable[str], tokenizer: Tokenizer, sign: str | None = None) -> list[str]:
    """What a client is told of texts that the model reads otherwise than they were typed; see `say_reading`."""
    said = (say_reading(text, tokenizer, sign) for text in ([texts] if isinstance(texts, str) else texts))
    return list(dict.fromkeys(note for note in said if note is not None))


async def wait_until_gone(request: Request) -> None:
    """Wait until the client has closed the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(name: str, data: Any) -> ServerSentEvent:
    """A server-sent event with JSON in it."""
    return ServerSentEvent(json.dumps(data, ensure_ascii=False, allow_nan=False), event=name)


def error_body(message: str, kind: str) -> dict[str, Any]:
    """What every error looks like."""
    return {"error": {"message": message, "type": kind}}


def refuse(refusal: Refusal) -> JSONResponse:
    """A refusal as an answer."""
    headers = {} if refusal.retry is None else {"Retry-After": str(refusal.retry)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(str(refusal), refusal.kind), refusal.status, headers)

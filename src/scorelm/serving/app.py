"""The application: routes, limits, and the page. It speaks ASGI, so any server for that can run it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from scorelm import __version__
from scorelm.config import Options, explain_problem, unknown
from scorelm.config.generation import Pricing
from scorelm.config.serving import Serving
from scorelm.errors import InputError
from scorelm.evaluation.price import check_pricing, price
from scorelm.lm import ScoreLM
from scorelm.sampling.sample import Sample
from scorelm.serving import completions
from scorelm.serving.describe import describe
from scorelm.serving.gate import Gate
from scorelm.serving.metrics import Metrics
from scorelm.serving.requests import Desk, error_body, event, notes_on, refuse
from scorelm.serving.schema import ERRORS, GenerateRequest, InfillRequest, ScoreRequest
from scorelm.serving.steps import Steps
from scorelm.serving.worker import Done, Event, Queued, Refusal, Worker

OPTIONS: dict[str, type[Options]] = {
    "/v1/generate": GenerateRequest, "/v1/infill": InfillRequest, "/v1/score": ScoreRequest,
}  # fmt: skip
"""What a request to each route may say."""
KINDS = ("str", "list[str]")
"""Names of the kinds that a text may be of, which stand in the place of a problem, too."""
MOST_DRAWS = 64
"""Noise levels or orders that a price averages over."""
PRICED_AT_A_TIME = 256
"""Positions; between two such parts of a price the texts of others go on."""


def make_app(lm: ScoreLM, limits: Serving | None = None, name: str = "scorelm") -> FastAPI:
    """The application that serves a model.

    Args:
        lm: the model, on its device.
        limits: what a request may take, and who may send one.
        name: of the model, as clients see it.
    """
    limits = limits or Serving()
    metrics = Metrics()
    worker = Worker(lm, limits.queue, metrics)
    desk = Desk(worker, limits)

    @asynccontextmanager
    async def run_worker(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.drain()
        await asyncio.to_thread(worker.join, limits.timeout)

    app = FastAPI(
        title="scorelm", version=__version__, summary="A diffusion language model.", lifespan=run_worker,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.worker = worker
    add_errors(app)
    app.add_middleware(Gate, limits=limits, metrics=metrics)
    if limits.origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=limits.origin, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    add_model(app, lm, desk, name)
    completions.add(app, lm, desk, name)
    add_page(app, metrics)
    return app


def add_model(app: FastAPI, lm: ScoreLM, desk: Desk, name: str) -> None:
    """The routes that run the model."""
    described = describe(lm, name, desk.limits)

    async def write(request: Request, asked: GenerateRequest | InfillRequest, texts: str | list[str]) -> Any:
        sign = asked.blank if isinstance(asked, InfillRequest) else None
        plan = await asyncio.to_thread(desk.plan, lm, texts, asked.n, asked)
        notes = await asyncio.to_thread(notes_on, texts, lm.tokenizer, sign)

        def whole(samples: list[Sample]) -> dict[str, Any]:
            return {"samples": [asdict(sample) for sample in samples], "notes": notes}

        if not asked.stream:
            return whole(await desk.answer(request, plan))
        steps = Steps(lm.tokenizer)

        def tell(seen: Event) -> list[Any]:
            match seen:
                case Queued(ahead):
                    return [event("queued", {"ahead": ahead})]
                case Done(samples):
                    return [event("done", whole(samples))]
                case Refusal():
                    return [event("error", error_body(str(seen), seen.kind))]
            return [event("step", state) for state in steps.read(seen)]

        return desk.stream(plan.recording(asked.candidates), tell)

    @app.post("/v1/generate", responses=ERRORS)
    async def generate(request: Request, asked: GenerateRequest) -> Any:
        """Write texts, from prompts or from nothing."""
        return await write(request, asked, asked.prompt)

    @app.post("/v1/infill", responses=ERRORS)
    async def infill(request: Request, asked: InfillRequest) -> Any:
        """Fill in the blanks of texts."""
        return await write(request, asked, asked.text)

    @app.post("/v1/score", responses=ERRORS)
    async def score(request: Request, asked: ScoreRequest) -> Any:
        """What texts cost the model."""
        check_pricing(asked)
        texts = [asked.text] if isinstance(asked.text, str) else asked.text
        if not 0 < len(texts) <= desk.limits.most_texts:
            raise InputError(f"give 1 to {desk.limits.most_texts:,} texts, not {len(texts):,}")
        if asked.draws > MOST_DRAWS or (asked.steps or 0) > desk.limits.most_steps:
            raise InputError(f"this server allows {MOST_DRAWS} draws and {desk.limits.most_steps:,} steps")
        options = {option: getattr(asked, option) for option in Pricing.model_fields}

        def work(pause: Callable[[], object]) -> list[dict[str, Any]]:
            return [
                price(lm, text, positions=PRICED_AT_A_TIME, watch=lambda share: pause(), **options).to_json()
                for text in texts
            ]

        return {"prices": await desk.answer(request, work)}

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What the model is, and what may be asked of it."""
        return described


def add_page(app: FastAPI, metrics: Metrics) -> None:
    """The page, and what machines ask for."""
    static = files("scorelm.serving").joinpath("static")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(static.joinpath("index.html").read_bytes())

    @app.get("/film.html", include_in_schema=False)
    async def film() -> Response:
        return PlainTextResponse(files("scorelm.viz").joinpath("film.html").read_bytes())

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the server takes requests on."""
        worker: Worker = app.state.worker
        if worker.draining or not worker.is_alive():
            raise Refusal(503, "overloaded", "the server is about to stop", 5)
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counts() -> Response:
        """Counters for Prometheus."""
        return PlainTextResponse(generate_latest(metrics.registry))

    app.mount("/static", StaticFiles(packages=[("scorelm.serving", "static")]), "static")


def say(problem: dict[str, Any], request: Request) -> str:
    """What is wrong with a body, in one line."""
    place = tuple(part for part in problem["loc"][1:] if part not in KINDS)
    if not is_json(request):
        return "the body must be JSON and say so: send the header Content-Type: application/json"
    match problem["type"]:
        case "json_invalid":
            return f"the body is not JSON: {problem['ctx']['error']} at character {place[0]}"
        case "extra_forbidden":
            return unknown(str(place[0]), sorted(OPTIONS[request.url.path].model_fields))
    return explain_problem(problem | {"loc": place})


def is_json(request: Request) -> bool:
    """Whether a body says that it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def add_errors(app: FastAPI) -> None:
    """Every error as JSON of one form."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return refuse(error)

    @app.exception_handler(InputError)
    async def bad(request: Request, error: InputError) -> Response:
        return refuse(Refusal(400, "invalid_request_error", " ".join(str(error).split())))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(Refusal(400, "invalid_request_error", say(error.errors()[0], request)))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return refuse(Refusal(500, "server_error", "something went wrong here; the server's log says what"))

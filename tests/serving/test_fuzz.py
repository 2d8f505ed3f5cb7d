"""Whatever the schema allows, and what it does not, is answered without a fault of the server."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scorelm.serving.completions import CompletionRequest
from scorelm.serving.schema import GenerateRequest, InfillRequest, ScoreRequest

from .conftest import serving

schemathesis = pytest.importorskip("schemathesis", reason="the extra ci brings it")

pytestmark = pytest.mark.slow


BODIES = {
    "/v1/generate": GenerateRequest,
    "/v1/infill": InfillRequest,
    "/v1/score": ScoreRequest,
    "/v1/completions": CompletionRequest,
}
ROUTES = (*BODIES, "/v1/model", "/v1/models", "/healthz", "/metrics")


@pytest.fixture(scope="module")
def client(make_lm):
    """A client of a server whose limits keep a request short."""
    with serving(make_lm(), most_steps=64, most_texts=8, most_length=40, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def schema(client):
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def test_every_route_is_tried(schema):
    assert {operation.ok().path for operation in schema.get_all_operations()} == set(ROUTES)


LIKELY = {
    "model": st.just("small"),
    "path": st.sampled_from(["bounded", "bounded:0.5", "uniform", "blocks:1", "blocks:3", "remask", "ramp:2"]),
    "solver": st.sampled_from(["posterior", "heun", "ancestral:0.5", "dpmpp_2m", "renoise", "euler"]),
    "halt": st.none() | st.sampled_from(["entropy:0.1", "patience:2", "kl:0.01"]),
    "steps": st.integers(1, 25), "n": st.integers(1, 3), "max_tokens": st.none() | st.integers(1, 30),
    "length": st.none() | st.integers(1, 45), "max_length": st.none() | st.integers(1, 60),
    "best_of": st.integers(1, 2), "nats_per_step": st.none() | st.floats(0.1, 9), "logprobs": st.none() | st.just(2),
    "guidance": st.sampled_from([1.0, 1.0, 2.0]), "score_temperature": st.sampled_from([1.0, 1.0, 0.5]),
    "blank_tokens": st.none() | st.integers(1, 9), "blank_words": st.none() | st.integers(1, 4),
    "repair": st.none() | st.floats(0.1, 0.9), "draws": st.integers(1, 4), "choose": st.just("vote"),
    "precision": st.sampled_from(["float32", "auto"]),
    "text": st.just("and god ____ be") | st.text("and ____\\gode", max_size=40),
    "prompt": st.text("and gode", max_size=40), "suffix": st.none() | st.text("and gode", max_size=20),
}  # fmt: skip
"""Values that have a chance of being right; those of the schema alone nearly never are."""


@st.composite
def likely(draw, operation):
    """A case whose options are mostly likely ones."""
    case = draw(operation.as_strategy())
    if isinstance(case.body, dict):
        options = sorted(set(LIKELY) & set(BODIES[operation.path].model_fields) - {"text", "model"})
        chosen = draw(st.sets(st.sampled_from(options), max_size=5)) | ({"text", "model"} & set(case.body))
        case.body = {name: draw(LIKELY[name]) for name in sorted(chosen)}
    return case


@pytest.mark.parametrize("route", ROUTES)
def test_no_request_is_a_fault_of_the_server(schema, client, route):
    (operation,) = (found.ok() for found in schema.get_all_operations() if found.ok().path == route)
    wrong = [operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)] if route in BODIES else []
    seen = Counter()

    @given(st.one_of(operation.as_strategy(), likely(operation), *wrong))
    @settings(max_examples=300, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def fuzz(case):
        response = case.call()
        seen[response.status_code] += 1
        case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])

    fuzz()
    print(route, dict(seen))
    assert seen[200] > 0
    assert client.get("/healthz").status_code == 200

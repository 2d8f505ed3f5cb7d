"""The server over real HTTP: every request gets what the library gives, whoever else is there."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import httpx
import pytest

from scorelm import price
from scorelm.cli.entry import main
from scorelm.config.generation import Continuation
from scorelm.config.serving import Serving
from scorelm.errors import InputError
from scorelm.model.directory import Provenance
from scorelm.serving.describe import trained

from .conftest import serving, wait_for

BLANKS = "and god said ____ there be ____"


def events(response: httpx.Response) -> list[tuple[str, dict]]:
    """Name and data of every server-sent event."""
    found, name = [], ""
    for line in response.iter_lines():
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        if key == "data":
            found.append((name, json.loads(value)))
    return found


def stream(client: httpx.Client, route: str, **body) -> list[tuple[str, dict]]:
    with client.stream("POST", route, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def test_texts_are_those_of_the_library(client, lm):
    options = {"path": "uniform", "steps": 5, "temperature": 0.7, "seed": 9}
    answer = client.post("/v1/generate", json={"prompt": ["and", "in the"], "n": 2, **options}).json()
    assert answer["samples"] == json.loads(
        json.dumps([asdict(s) for s in lm.generate(["and", "in the"], 2, **options)])
    )
    answer = client.post("/v1/infill", json={"text": BLANKS, "blank_words": 1, "seed": 3}).json()
    assert answer["samples"] == json.loads(json.dumps([asdict(s) for s in lm.infill(BLANKS, blank_words=1, seed=3)]))
    assert answer["samples"][0]["spans"]


def test_says_what_is_read_otherwise_than_it_was_typed(client):
    """The small model has no capitals; what it has not is read as unknown."""
    said = "the model reads 'and  ⁇ ____ be' for 'and GOD ____ be'"
    body = {"text": "and GOD ____ be", "steps": 2}
    assert client.post("/v1/infill", json=body).json()["notes"] == [said]
    assert stream(client, "/v1/infill", **body)[-1][1]["notes"] == [said]
    twice = {"prompt": ["and GOD", "and god", "and GOD"], "steps": 2}
    assert client.post("/v1/generate", json=twice).json()["notes"] == ["the model reads 'and  ⁇' for 'and GOD'"]
    assert client.post("/v1/generate", json={"prompt": "and  god", "steps": 2}).json()["notes"] == []


def test_prices_are_those_of_the_library(client, lm):
    texts = ["and god said let there be light", "in the beginning"]
    answer = client.post("/v1/score", json={"text": texts, "path": "bounded", "steps": 7}).json()
    assert answer["prices"] == [price(lm, text, "bounded", steps=7).to_json() for text in texts]


def mixed(k: int) -> dict:
    """Options of request k: of every length, path and number of steps."""
    paths = ("bounded", "uniform", "blocks:3", "surest", "ramp:0.5", "blocks:1", "shuffled")
    return {"path": paths[k % 7], "steps": 2 + k % 9, "seed": 10 * k, "length": 8 + k % 20, "n": 1 + k % 3}


def test_requests_that_share_evaluations_each_get_what_they_get_alone(client, lm):
    """Up to rounding, which can move a draw now and then, and does so in few of them."""
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda k: client.post("/v1/generate", json=mixed(k)).json(), range(36)))
    alone = [[s.ids for s in lm.generate(**mixed(k))] for k in range(36)]
    assert sum([s["ids"] for s in answer["samples"]] == ids for answer, ids in zip(answers, alone, strict=True)) >= 34


def test_a_stream_has_every_step_and_ends_with_the_same_texts(client):
    body = {"prompt": "and", "n": 2, "path": "bounded", "steps": 6, "length": 12, "seed": 5}
    told = stream(client, "/v1/generate", **body, candidates=3)
    names, data = zip(*told, strict=True)
    assert names == ("step",) * (len(told) - 1) + ("done",)
    assert [state["step"] for state in data[:-1]] == list(range(len(told) - 1))
    first, last = data[0]["rows"][0], data[-2]["rows"][0]
    assert 0 in first["sigma"] and None in first["sigma"]
    assert {token["kind"] for token, sigma in zip(first["tokens"], first["sigma"], strict=True) if sigma is None} == {
        "blank"
    }
    assert set(last["sigma"]) == {0} and set(last["certainty"]) == {1}
    for state in data[1:-1]:
        for row in state["rows"]:
            for tokens in row["candidates"]:
                shares = [share for _, share in tokens]
                assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.002 and len(shares) <= 3
    assert any(data[1]["rows"][0]["candidates"])
    assert data[-1]["samples"] == client.post("/v1/generate", json=body).json()["samples"]


def test_a_client_that_leaves_frees_its_place(client):
    worker = client.app.state.worker
    with client.stream("POST", "/v1/generate", json={"path": "uniform", "steps": 1000, "stream": True}) as response:
        next(response.iter_lines())
        assert worker.under_way
    wait_for(lambda: not worker.under_way)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/generate", json={"path": "uniform", "steps": 1000, "n": 8}, timeout=0.2)
    wait_for(lambda: not worker.under_way)
    assert client.post("/v1/generate", json={"steps": 2}).status_code == 200


def test_a_full_queue_says_when_to_come_back_and_a_slow_request_ends(lm):
    long = {"path": "uniform", "steps": 1000, "n": 64, "length": 40}
    with serving(lm, queue=1, timeout=1.5) as client, ThreadPoolExecutor(8) as pool:
        client.app.state.worker.most = 64 * 40
        answers = [pool.submit(client.post, "/v1/generate", json=long)]
        wait_for(lambda: client.app.state.worker.under_way)  # and so out of the queue
        answers += [pool.submit(client.post, "/v1/generate", json=long) for _ in range(5)]
        codes = sorted(answer.result().status_code for answer in answers)
        assert codes == [429] * 4 + [504] * 2
        refused = next(a.result() for a in answers if a.result().status_code == 429)
        assert int(refused.headers["retry-after"]) > 0 and refused.json()["error"]["type"] == "overloaded"
        assert client.get("/healthz").json() == {"status": "ok"}


def test_a_waiting_stream_is_told_how_many_are_before_it(lm):
    with serving(lm) as client:
        worker = client.app.state.worker
        worker.most = 64 * 40
        leave = threading.Event()

        def hold():
            body = {"path": "uniform", "steps": 1000, "n": 64, "length": 40, "stream": True}
            with client.stream("POST", "/v1/generate", json=body) as response:
                next(response.iter_lines())
                leave.wait(20)

        threads = [threading.Thread(target=hold) for _ in range(2)]
        threads[0].start()
        wait_for(lambda: worker.under_way)
        threads[1].start()
        wait_for(lambda: worker.waiting)
        waiting = threading.Thread(target=lambda: told.extend(stream(client, "/v1/generate", steps=2, length=8)))
        told: list = []
        waiting.start()
        wait_for(lambda: len(worker.waiting) == 2)
        leave.set()
        for thread in (*threads, waiting):
            thread.join()
    assert told[0] == ("queued", {"ahead": 1}) and told[-1][0] == "done"


def test_a_server_that_is_about_to_stop_finishes_what_it_has_begun(lm):
    body = {"path": "uniform", "steps": 150, "n": 8, "length": 40}
    with serving(lm) as client, ThreadPoolExecutor(2) as pool:
        worker = client.app.state.worker
        worker.most = 8 * 40
        begun = pool.submit(client.post, "/v1/generate", json=body)
        wait_for(lambda: worker.under_way)
        waits = pool.submit(client.post, "/v1/generate", json=body)
        wait_for(lambda: worker.waiting)
        worker.drain()
        assert waits.result().status_code == 503
        refused = client.post("/v1/generate", json={})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert client.get("/healthz").status_code == 503
        assert len(begun.result().json()["samples"]) == 8
        wait_for(lambda: not worker.is_alive())


def test_a_fault_ends_the_requests_it_is_about_and_not_the_server(lm, monkeypatch, capsys):
    with serving(lm) as client:
        client.post("/v1/generate", json={"steps": 1})
        loop = client.app.state.worker.loops["float32"]
        monkeypatch.setattr(loop, "step", lambda: 1 / 0)
        failed = client.post("/v1/generate", json={"steps": 3})
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in capsys.readouterr().err
        assert client.post("/v1/generate", json={"steps": 3}).status_code == 200


@pytest.mark.parametrize(
    ("route", "body", "words"),
    [
        ("generate", {"step": 3}, "no option 'step': did you mean steps?"),
        ("generate", {"steps": "many"}, "steps: Input should be a valid integer"),
        ("generate", {"path": "nowhere"}, "no path 'nowhere'"),
        ("generate", {"steps": 2000}, "2,000 steps are too many: this server allows 1,024"),
        ("generate", {"n": 65}, "65 texts are too many"),
        ("generate", {"n": 10**15}, "texts are too many"),
        ("generate", {"path": "blocks:1", "max_length": 10**15}, "tokens in a text are too many"),
        ("infill", {"text": "a ____", "blank_tokens": 10**15}, "tokens"),
        ("infill", {"text": "a ____", "blank_words": 10**15}, "tokens"),
        ("infill", {"text": "____", "n": 10**15}, "texts are too many"),
        ("generate", {"n": 33, "best_of": 2}, "66 texts are too many"),
        ("generate", {"path": "blocks:1", "max_length": 5000}, "5,000 tokens in a text are too many"),
        ("generate", {"length": 60}, "length 60 does not fit"),
        ("infill", {"text": "no blank"}, "no blank"),
        ("generate", {"text": "a"}, "no option 'text': choose best_of"),
        ("generate", {"prompt": [["a"]]}, "prompt: Input should be a valid string"),
        ("infill", {}, "text: Field required"),
        ("score", {"text": []}, "give 1 to 64 texts"),
        ("score", {"text": "and", "draws": 65}, "allows 64 draws"),
        ("score", {"text": "and", "path": "bounded", "steps": 2000}, "1,024 steps"),
        ("score", {"text": "and", "path": "remask"}, "it has no price"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(client, route, body, words):
    answer = client.post(f"/v1/{route}", json=body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_the_network_is_closed_without_a_token():
    with pytest.raises(InputError, match="can be reached from other machines"):
        Serving(host="0.0.0.0").check()
    for where in ({"host": "0.0.0.0", "token": "x"}, {"host": "0.0.0.0", "insecure": True}, {"host": "::1"}, {}):
        Serving(**where).check()


def test_a_port_that_is_taken_is_one_line(client, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", str(client.base_url.port)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == (
        f"scorelm: cannot listen on 127.0.0.1, port {client.base_url.port}: Address already in use"
    )


def test_the_model_is_described_and_what_it_does_is_counted(client, lm):
    said = client.get("/v1/model").json()
    assert said["name"] == "small" and said["max_length"] == lm.max_length and said["infills"]
    assert {path["name"] for path in said["paths"] if not path["infills"]} == set()
    assert set(said["defaults"]) >= set(Continuation.model_fields) - {"max_length"}
    counted = client.get("/metrics").text
    for name in ("requests_total", "request_seconds", "waiting_requests", "rows", "tokens_total", "evaluation_seconds"):
        assert f"scorelm_{name}" in counted


def test_the_page_and_its_files_come_with_their_policy(client):
    page = client.get("/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "script-src 'self'" in page.headers["content-security-policy"]
    )
    assert "{{data}}" in client.get("/film.html").text


def test_what_a_model_was_trained_on_is_said_from_the_first_run_on():
    first = Provenance(data="kjv", tokens=2000)
    assert trained(first) == "trained on 2,000 tokens of kjv"
    assert trained(Provenance(data="my.txt", tokens=30, before=first)) == (
        "trained on 2,000 tokens of kjv, then on 30 tokens of my.txt"
    )
    assert trained(Provenance(tokens=30, before=first)) == ""


def test_who_does_not_say_how_many_steps_gets_no_more_than_are_allowed(lm):
    with serving(lm, most_steps=3) as client:
        assert client.get("/v1/model").json()["defaults"]["steps"] == 3
        assert client.post("/v1/generate", json={}).json()["samples"][0]["nfe"] <= 3
        for route, body in (
            ("generate", {}), ("infill", {"text": "and ____ be"}), ("completions", {"model": "small", "prompt": "and"}),
        ):  # fmt: skip
            assert client.post(f"/v1/{route}", json=body).status_code == 200, route
            assert client.post(f"/v1/{route}", json=body | {"steps": 4}).status_code == 400, route


def test_no_texts_are_answered_with_none(lm):
    with serving(lm) as client:
        for repair in (None, 0.5):
            answer = client.post("/v1/infill", json={"text": [], "repair": repair, "steps": 2})
            assert (answer.status_code, answer.json()["samples"]) == (200, [])

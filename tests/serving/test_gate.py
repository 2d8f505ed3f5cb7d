"""What a hostile or a clumsy client sends is refused in words, and holds nothing up."""

import json
import socket
import threading

import pytest

from scorelm.serving import requests

from .conftest import serving, wait_for


def test_bad_bodies_and_paths(client):
    for content, words in ((b"{", "the body is not JSON"), (b"[]", "dictionary"), (b"", "Field required")):
        answer = client.post("/v1/generate", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    big = json.dumps({"prompt": "a" * (1 << 19)})
    for content in (big, iter([big.encode()])):  # a length that is declared, and one that is not
        answer = client.post("/v1/generate", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "262,144 bytes" in answer.json()["error"]["message"]
    for path in ("/v1/nothing", "/static/../app.py", "/static/%2e%2e/app.py", "/static/nothing.js"):
        answer = client.get(path)
        assert answer.status_code == 404 and "message" in answer.json()["error"], path


def test_only_who_has_the_token_comes_in(lm):
    with serving(lm, token="open sesame") as client:
        assert client.get("/").status_code == 200 and client.get("/healthz").status_code == 200
        for path in ("/v1/model", "/v1/models", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer open sesam"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer open sesame"}).status_code == 200
        assert client.post("/v1/generate", json={}).headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/model", headers={"Authorization": b"Bearer \xe9"}).status_code == 401


def test_pages_of_other_sites_get_nothing(client, lm):
    evil = {"Host": "evil.example", "Origin": "https://evil.example"}
    assert client.get("/v1/model", headers=evil).status_code == 421
    for host, status in (
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[", 421),
        ("", 421),
        ("127.0.0.1.evil:1", 421),
    ):
        assert client.get("/v1/model", headers={"Host": host}).status_code == status, host
    for origin in ("https://evil.example", "null", "http://localhost:1", f"{client.base_url}.evil.example"):
        answer = client.post("/v1/generate", json={"steps": 1}, headers={"Origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    own = {"Origin": str(client.base_url), "Host": client.base_url.netloc.decode().upper()}
    assert client.post("/v1/generate", json={"steps": 1}, headers=own).status_code == 200
    with serving(lm, origin=("https://good.example",)) as open_client:
        said = open_client.post("/v1/generate", json={"steps": 1}, headers={"Origin": "https://good.example"})
        assert said.status_code == 200
        answer = open_client.get("/v1/model", headers={"Origin": "https://good.example"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        answer = open_client.get("/v1/model", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"]
)
def test_what_a_browser_sends_without_asking_is_not_read(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post("/v1/generate", content=b'{"steps": 1}', headers=headers)
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000, b'{"a":' * 30_000 + b"1" + b"}" * 30_000, b'{"temperature": NaN}', b'{"top_p": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}", b'{"seed": ' + b"9" * 4000 + b"}", b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1}', b'{"path": "\\ud800"}', b'{"a\\u0000": 1}', b'{"path": "ramp:nan"}', b"null", b'"x"',
        b'{"prompt": {}}', b'{"' + b"x" * 200_000 + b'": 1}', b"\xff", b"\x1f\x8b\x08",
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["generate", "infill", "score", "completions"])
def test_nonsense_is_refused_in_a_line(client, route, body):
    answer = client.post(f"/v1/{route}", content=body, headers={"content-type": "application/json"})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and 0 < len(message) < 1000 and "\n" not in message, answer.text


def partial(client, head: str, body: bytes) -> socket.socket:
    """A connection that has sent so much of a request, and reads as little as it can."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((client.base_url.host, client.base_url.port))
    connection.sendall(
        f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}\r\n\r\n".encode()
        + body
    )
    return connection


def test_a_body_that_does_not_come_is_not_waited_for(lm):
    with serving(lm, timeout=1) as client:
        slow = [partial(client, "Content-Length: 1000", b"{") for _ in range(20)]
        assert client.post("/v1/generate", json={"steps": 1}).status_code == 200
        for connection in slow:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
            connection.close()


@pytest.mark.thorough
def test_a_stream_that_nobody_reads_ends(lm, monkeypatch, capfd):
    monkeypatch.setattr(requests, "SLOWEST", 0.3)
    options = {"stream": True, "candidates": 20, "path": "uniform", "steps": 1000, "n": 32, "length": 40}
    body = json.dumps(options).encode()
    with serving(lm) as client, partial(client, f"Content-Length: {len(body)}", body):
        worker = client.app.state.worker
        wait_for(lambda: worker.under_way)
        (ticket,) = worker.under_way.values()
        wait_for(lambda: ticket.cancelled)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("route", ["generate", "completions"])
def test_others_are_answered_while_a_long_text_is_read(client, lm, monkeypatch, route):
    going, leave, plan = threading.Event(), threading.Event(), lm.plan

    def held(*words):
        going.set()
        assert leave.wait(20)
        return plan(*words)

    monkeypatch.setattr(lm, "plan", held)
    body = {"steps": 1} | ({"model": "small"} if route == "completions" else {})
    thread = threading.Thread(target=lambda: answers.append(client.post(f"/v1/{route}", json=body)))
    answers: list = []
    thread.start()
    assert going.wait(20)
    assert client.get("/healthz", timeout=5).status_code == 200
    leave.set()
    thread.join()
    assert answers[0].status_code == 200

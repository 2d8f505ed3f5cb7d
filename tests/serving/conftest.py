"""A real server in a thread, with a small model, on a port of its own."""

import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from scorelm.config.serving import Serving
from scorelm.serving.app import make_app


@contextmanager
def serving(lm, **limits):
    """A client of a server of that model; the application is `client.app`."""
    app = make_app(lm, Serving.of(**limits), "small")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        client.app = app
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm()


@pytest.fixture(scope="module")
def client(lm):
    """A client of one server for all tests of a file."""
    with serving(lm) as client:
        yield client

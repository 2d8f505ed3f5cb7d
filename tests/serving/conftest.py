"""A real server in a thread, on a port of its own, and Studio, its page, in a browser."""

import json
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
    """A client of a server of that model; `client.app` is the application, and `client.server` what serves it."""
    app = make_app(lm, Serving.of(**limits), "small")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        client.app, client.server = app, server
        yield client
    server.should_exit = True
    thread.join()


def wait_for(condition) -> None:
    """Wait until something in the server's threads has come about."""
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm()


@pytest.fixture(scope="module")
def client(lm):
    """A client of one server for all tests of a file."""
    with serving(lm) as client:
        yield client


# --- Studio -----------------------------------------------------------------------------------------------------------

PROMPT = "And it came to pass"
SENTENCE = "And God said, Let there be light: and there was light."
QUICK = {"mode": "write", "prompt": PROMPT, "path": "uniform", "steps": 6, "seed": 3, "length": 16, "temperature": 1}


@pytest.fixture(scope="session")
def kjv():
    """The model that comes along."""
    from scorelm import ScoreLM

    return ScoreLM.from_pretrained()


@pytest.fixture(scope="session")
def server(kjv):
    """A client of one server for all tests of the page."""
    with serving(kjv, queue=2) as client:
        yield client


@pytest.fixture
def studio(browser, server):
    """Opens the page with settings in its address, and without motion unless it is asked for: no test waits for it."""

    def open_page(values=None, reduced_motion="reduce", at=server, **options):
        browser.open(f"{at.base_url}/", reduced_motion=reduced_motion, **options)
        tab = browser.tab
        if values:
            tab.goto("about:blank")
            tab.goto(f"{at.base_url}/#{httpx.QueryParams(values)}")
        tab.locator("#go:enabled").wait_for()
        return tab

    yield open_page
    browser.tab.evaluate("localStorage.clear(), sessionStorage.clear()")


def run(tab):
    """Press the button, and wait until the texts are there."""
    tab.locator("#go").click()
    tab.get_by_text("Written in").wait_for()


def texts(tab):
    """What stands on the page, control tokens left out."""
    return tab.eval_on_selector_all(
        "p.prose", "all => all.map(p => { const q = p.cloneNode(true); "
        "q.querySelectorAll('.control, [hidden]').forEach(e => e.remove()); return q.textContent.trim(); })",
    )  # fmt: skip


def steps(tab):
    """The step that is shown, and the last one."""
    return int(tab.locator("#step").input_value()), int(tab.locator("#step").get_attribute("max"))


def answer(server, route="generate", **body):
    """The samples that the server gives."""
    return server.post(f"/v1/{route}", json=body).json()["samples"]


def states(server, route="generate", **body):
    """The data of every step that the server sends."""
    with server.stream("POST", f"/v1/{route}", json=body | {"stream": True, "candidates": 5}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [data for line in lines if "rows" in (data := json.loads(line[6:]))]

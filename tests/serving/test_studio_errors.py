"""Studio: what goes wrong is said at the form, with a way on, and no text is ever anything but text."""

import threading
import time
from contextlib import contextmanager

import pytest

from scorelm.serving.worker import Ticket

from ..viz.pages import HOSTILE
from .conftest import QUICK, run, serving, texts

pytestmark = pytest.mark.thorough  # a browser, and a server with a model


def test_a_bad_value_is_said_at_the_form(studio, browser):
    tab = studio(QUICK)
    tab.fill("#steps", "0")
    tab.locator("#go").click()
    assert "Check “Steps”." in tab.inner_text("#wrong") and tab.evaluate("document.activeElement.id") == "steps"
    tab.fill("#steps", "6")
    tab.select_option("#path", "ramp")
    tab.fill("#path-number", "x")
    tab.locator("#go").click()
    tab.get_by_text("Path 'ramp:x': 'x' is not a number.").wait_for()
    assert tab.get_attribute("#path", "aria-invalid") == "true" and tab.locator("#welcome").is_visible()
    browser.forgive("400")
    tab.fill("#path-number", "")
    run(tab)
    assert tab.locator("#trouble").is_hidden() and tab.locator("[aria-invalid]").count() == 0


COUNTDOWN = """() => {
  window.seen = [];
  const look = () => {
    const [line, button] = [document.querySelector("#again span"), document.querySelector("#again button")];
    if (line?.textContent && line.textContent !== seen.at(-1)?.[0]) seen.push([line.textContent, button.disabled]);
  };
  new MutationObserver(look).observe(document.querySelector("#again"), { childList: true, subtree: true });
}"""


@contextmanager
def kept_waiting(worker, count):
    """The worker does nothing but to look who has gone, and so many requests wait."""
    leave = threading.Event()

    def hold(pause):
        while not leave.wait(0.01):
            pause()

    worker.submit(Ticket(hold, lambda event: None, 60))
    while worker.waiting:
        time.sleep(0.01)
    for _ in range(count):
        worker.submit(Ticket(hold, lambda event: None, 60))
    yield lambda: worker.submit(Ticket(hold, lambda event: None, 60))
    leave.set()


def test_the_queue(studio, server, browser):
    tab = studio(QUICK)
    with kept_waiting(server.app.state.worker, 1) as one_more:
        tab.locator("#go").click()
        tab.get_by_text("Waiting: 1 request ahead of yours.").wait_for()
        tab.get_by_role("button", name="Cancel").click()
        tab.get_by_text("Cancelled.").wait_for()
        while len(server.app.state.worker.waiting) > 1:
            time.sleep(0.01)
        one_more()
        tab.evaluate(COUNTDOWN)
        tab.locator("#go").click()
        tab.get_by_text("The server is busy.").wait_for()
        browser.forgive("429")
        tab.get_by_text("It may have room now.").wait_for()
    assert tab.evaluate("seen") == [
        ["Try again in 2 seconds.", True], ["Try again in 1 second.", True], ["It may have room now.", False],
    ]  # fmt: skip
    tab.get_by_role("button", name="Try again").click()
    tab.get_by_text("Written in").wait_for()


def vanish(client):
    """The server goes in the middle of whatever it does, as in a crash."""
    server = client.server

    def end():
        server.force_exit = server.should_exit = True
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()

    server.servers[0].get_loop().call_soon_threadsafe(end)
    client.app.state.worker.drain()


def test_a_token_a_timeout_and_a_server_that_goes(browser, kjv):
    with serving(kjv, timeout=2, token="open sesame") as client:
        tab = browser.open(f"{client.base_url}/", reduced_motion="reduce")
        tab.get_by_text("This server wants a token.").wait_for()
        tab.get_by_label("Access token").fill("wrong")
        tab.get_by_role("button", name="Unlock").click()
        tab.get_by_text("This token does not open it.").wait_for()
        tab.get_by_label("Access token").fill("open sesame")
        tab.keyboard.press("Enter")
        tab.locator("#go:enabled").wait_for()
        browser.forgive("401")
        assert tab.locator("#key").is_hidden() and "sesame" not in tab.url
        tab.fill("#n", "4")
        tab.fill("#steps", "1024")
        tab.select_option("#path", "uniform")
        tab.locator("#go").click()
        tab.get_by_text("That took too long.").wait_for()
        assert tab.get_by_text("Stopped after").is_visible() and tab.get_by_text("ask for fewer steps").is_visible()
        tab.get_by_role("button", name="Try again").click()
        tab.get_by_text("Writing…").wait_for()
        vanish(client)
        tab.get_by_text("The connection to the server broke").wait_for()
        tab.get_by_role("button", name="Try again").click()
        tab.get_by_text("The server does not answer. Is scorelm serve still running?").wait_for()
        browser.forgive("net::")
        assert tab.locator("#go").is_enabled()
        tab.evaluate("sessionStorage.clear()")


@pytest.mark.parametrize("mode", ["write", "fill"])
def test_text_is_never_html(studio, browser, mode):
    """Wherever a text stands: in its tokens, in what is read aloud, in an error that quotes it."""
    hostile = f"{HOSTILE} <img src=x onerror=window.broken=1> \\____ "
    tab = studio({"mode": mode, "prompt": hostile, "text": f"{hostile} ____", "path": "uniform", "steps": 6})
    found = "[document.images.length, document.scripts.length, window.broken]"
    before = tab.evaluate(found)
    run(tab)
    assert texts(tab)[0].startswith("</script><script>window.broken=1</script>")
    assert "<img src=x onerror=window.broken=1>" in tab.inner_text("#announce")
    tab.locator("p.prose [role=option]:visible >> nth=0").hover()
    tab.locator("label[for=mode-fill]").click()
    tab.get_by_role("button", name="Edit the text").click()
    tab.fill("#text", hostile)
    tab.locator("#go").click()
    tab.get_by_text("No blank in").wait_for()
    browser.forgive("400")
    assert "<img src=x onerror=window.broken=1>" in tab.inner_text("#wrong")
    assert tab.evaluate(found) == before

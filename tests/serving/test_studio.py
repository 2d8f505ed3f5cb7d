"""Studio, the page of the server: in a browser, against a real server with the model that comes along."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from ..viz.pages import HOSTILE

pytestmark = pytest.mark.thorough  # a browser, and a server with a model

PROMPT = "And it came to pass"
SENTENCE = "And God said, Let there be light: and there was light."
QUICK = {"mode": "write", "prompt": PROMPT, "path": "uniform", "steps": 6, "seed": 3, "length": 16, "temperature": 1}
HOG = {"n": 32, "length": 128, "path": "uniform", "steps": 1024, "stream": True}
"""A request that takes all the room there is, for a long time."""


@contextmanager
def serve(*options, **environment):
    """The address of a server in a process of its own, and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scorelm", "serve", "--port", "0", "--device", "cpu", *options],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    try:
        said = process.stderr.readline()
        yield re.search(r"http://\S+", said)[0], process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def server():
    with serve("--queue", "2") as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture
def studio(browser, server):
    """Opens the page with settings in its address, and without motion unless it is asked for: no test waits for it."""

    def open_page(values=None, reduced_motion="reduce", **options):
        browser.open(f"{server.base_url}/", reduced_motion=reduced_motion, **options)
        tab = browser.tab
        if values:
            tab.goto("about:blank")
            tab.goto(f"{server.base_url}/#{httpx.QueryParams(values)}")
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


def answer(server, route="generate", **body):
    return server.post(f"/v1/{route}", json=body).json()["samples"]


def events(server, route="generate", **body):
    """The data of every step that the server sends."""
    with server.stream("POST", f"/v1/{route}", json=body | {"stream": True, "candidates": 5}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [data for line in lines if "rows" in (data := json.loads(line[6:]))]


@contextmanager
def hogs(server, count):
    """So many requests that take all the room."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(server.stream("POST", "/v1/generate", json=HOG))
        yield


def steps(tab):
    return int(tab.locator("#step").input_value()), int(tab.locator("#step").get_attribute("max"))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_shows_what_the_server_writes(studio, server):
    body = {"prompt": PROMPT, "n": 2, "path": "uniform", "steps": 6, "seed": 3, "temperature": 0.7}
    expected = answer(server, **body)
    tab = studio()
    assert (tab.input_value("#prompt"), tab.input_value("#steps"), tab.input_value("#seed")) == (PROMPT, "128", "0")
    assert (tab.input_value("#path"), tab.input_value("#solver")) == ("bounded", "posterior")
    for name in ("n", "steps", "temperature"):
        tab.fill(f"#{name}", str(body[name]))
    tab.select_option("#path", "uniform")
    assert tab.inner_text("#path-about") == "All positions together, on one level."
    tab.get_by_text("More settings").click()
    tab.fill("#seed", "3")
    run(tab)
    assert texts(tab) == [sample["text"] for sample in expected]
    assert all(sample["text"] in tab.inner_text("#announce") for sample in expected)
    assert tab.locator(".nfe").all_inner_texts() == ["6 evaluations"] * 2
    assert tab.locator("figcaption").all_inner_texts() == ["uncertainty 0.0 nats"] * 2
    given = tab.locator("p.prose >> nth=0").locator(".given:not(.control)").all_inner_texts()
    assert "".join(given) == PROMPT.replace(" ", "") and "6 evaluations" in tab.inner_text("#status")
    tab.get_by_role("button", name="Another").click()
    tab.get_by_text("Written in").wait_for()
    assert tab.input_value("#seed") == "5"
    assert texts(tab) == [sample["text"] for sample in answer(server, **body | {"seed": 5})]


def test_examples_and_from_nothing(studio):
    tab = studio()
    tab.get_by_role("button", name="In the beginning").click()
    assert tab.input_value("#prompt") == "In the beginning"
    tab.get_by_role("button", name="from nothing").click()
    assert tab.input_value("#prompt") == ""
    tab.fill("#steps", "3")
    tab.get_by_role("button", name="Write something").click()
    tab.get_by_text("Written in").wait_for()
    assert texts(tab)[0] and tab.locator("p.prose .given:not(.control)").count() == 0


def test_candidates_of_a_token(studio, server):
    """Under the pointer and in focus: those of the step that is shown, or of the one that wrote the token."""
    body = {"prompt": PROMPT, "path": "bounded", "steps": 6, "seed": 3, "length": 16, "temperature": 1.0}
    seen = events(server, **body)
    tab = studio(QUICK | {"path": "bounded"})
    run(tab)
    k, row = 2, seen[2]["rows"][0]
    i = row["sigma"].index(None)
    tab.locator("#step").fill(str(k))
    blur = "all => all.map(e => Number.parseFloat(getComputedStyle(e).filter.slice(5)) || 0)"
    blurred = tab.eval_on_selector_all("p.prose .guess", blur)
    sure = [certainty for certainty, sigma in zip(row["certainty"], row["sigma"], strict=True) if sigma != 0]
    assert len(blurred) == len(sure) and blurred[sure.index(min(sure))] == max(blurred) > blurred[sure.index(max(sure))]
    assert not any(tab.eval_on_selector_all("p.prose .given, p.prose .done", blur))
    token, card = tab.locator("p.prose [role=option]").nth(i), tab.locator("#card")
    token.hover()
    listed = [part.split("\n")[0] for part in card.locator("li").all_inner_texts()]
    assert listed == [text.strip() for text, _ in row["candidates"][i]]
    assert f"{round(100 * row['candidates'][i][0][1])} %" in card.locator("li >> nth=0").inner_text()
    certainty = f"{row['certainty'][i]:.2f}" if row["certainty"][i] >= 0.01 else "below 0.01"
    assert f"A guess, certainty {certainty}, no evidence yet" in card.inner_text()
    tab.mouse.move(640, 5)
    assert card.is_hidden()
    token.click()
    assert token.get_attribute("aria-label").startswith(row["tokens"][i]["text"].strip())
    assert f"Likeliest: {row['candidates'][i][0][0].strip()}" in token.get_attribute("aria-label")
    tab.locator("#step").fill("6")
    wrote = next(state for state in seen if state["rows"][0]["sigma"][i] == 0)
    token.hover()
    assert f"Written in step {wrote['step']}" in card.inner_text()
    assert card.locator("li >> nth=0 >> span >> nth=0").inner_text() == wrote["rows"][0]["candidates"][i][0][0].strip()
    tab.locator("p.prose .given:not(.control) >> nth=0").hover()
    assert "Given" in card.inner_text() and card.locator("li").count() == 0


# --- filling in -------------------------------------------------------------------------------------------------------


def filling(tab):
    """What would be sent, from the address of the page."""
    return httpx.QueryParams(tab.evaluate("location.hash.slice(1)"))["text"]


def test_words_become_blanks_by_clicks(studio, server):
    tab = studio({"mode": "fill", "text": SENTENCE, "path": "bounded", "steps": 8})
    word = tab.locator("#board .word")
    word.nth(6).click()
    assert filling(tab) == SENTENCE.replace("light:", "____:", 1)
    word.nth(5).click()  # side by side they are one blank
    assert filling(tab) == SENTENCE.replace("be light:", "____:", 1)
    word.nth(6).click()
    word.nth(10).click()
    text = SENTENCE.replace("be light: and there was light", "____ light: and there was ____")
    assert filling(tab) == text
    run(tab)
    assert texts(tab) == [answer(server, "infill", text=text, steps=8)[0]["text"]]
    assert tab.get_by_text("Fill in", exact=True).count() == 2  # the mode, and the button


def test_words_become_blanks_by_dragging(studio):
    tab = studio({"mode": "fill", "text": SENTENCE})
    spots = [box for box in (one.bounding_box() for one in tab.locator("#board .word").all())]
    middle = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in spots]

    def drag(*way):
        tab.mouse.move(*middle[way[0]])
        tab.mouse.down()
        for i in way[1:]:
            tab.mouse.move(*middle[i])
        tab.mouse.up()

    drag(1, 2, 3, 4, 3)  # back by one
    assert filling(tab) == "And ____, ____ there be light: and there was light."
    drag(3, 2)
    assert filling(tab) == "And ____ said, Let there be light: and there was light."


def test_words_become_blanks_by_keys(studio):
    tab = studio({"mode": "fill", "text": SENTENCE})
    tab.locator("#board .word >> nth=0").focus()
    for key in ("ArrowRight", "Enter", "ArrowRight", "ArrowRight", " ", "Shift+ArrowRight", "Shift+ArrowRight"):
        tab.keyboard.press(key)
    assert filling(tab) == "And ____ said, ____ light: and there was light."
    assert tab.locator("#board [tabindex='0']").count() == 1
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "blank, was be"
    tab.keyboard.press("Home")
    tab.keyboard.press(" ")
    tab.keyboard.press("End")
    tab.keyboard.press(" ")
    assert filling(tab) == "____ said, ____ light: and there was ____."


def test_blanks_can_be_typed(studio):
    tab = studio({"mode": "fill", "text": SENTENCE})
    tab.locator("#board .word >> nth=1").click()
    tab.get_by_role("button", name="Edit the text").click()
    assert tab.input_value("#text") == SENTENCE.replace("God", "____")
    tab.get_by_role("button", name="Choose blanks").click()
    tab.locator("#board .word >> nth=1").click()  # unchanged, it still knows the word
    assert filling(tab) == SENTENCE
    tab.get_by_role("button", name="Edit the text").click()
    tab.fill("#text", "one ______ two\\____ ____")
    tab.keyboard.press("Escape")
    assert tab.locator("#board .hole").count() == 2
    assert filling(tab) == "one ____ two\\____ ____"
    tab.locator("#board .hole >> nth=1").click()  # there is no word to give back: write one
    tab.keyboard.type("three")
    assert tab.input_value("#text") == "one ____ two\\____ three"


def test_repair(studio, server):
    tab = studio({"mode": "fill", "text": SENTENCE, "steps": 6})
    tab.locator("#board .word >> nth=1").click()
    tab.get_by_label("Repair instead").check()
    assert tab.input_value("#path") == "uniform" and tab.input_value("#text") == SENTENCE
    tab.fill("#strength", "0.3")
    tab.get_by_role("button", name="Repair", exact=True).click()
    tab.get_by_text("Written in").wait_for()
    assert texts(tab) == [answer(server, "infill", text=SENTENCE, repair=0.3, steps=6)[0]["text"]]
    tab.get_by_label("Repair instead").uncheck()
    assert tab.input_value("#path") == "bounded" and filling(tab) == SENTENCE.replace("God", "____")


# --- playing, comparing, keeping --------------------------------------------------------------------------------------


def test_plays_and_winds_back(studio):
    tab = studio(QUICK | {"steps": 20}, reduced_motion="no-preference")
    tab.locator("#go").click()
    tab.get_by_label("Pause").wait_for()
    tab.get_by_text("step 20 of 20").wait_for()
    tab.get_by_label("Play", exact=True).wait_for()
    final = texts(tab)
    tab.locator("#stage").focus()
    tab.keyboard.press("Home")
    assert steps(tab) == (0, 20) and tab.locator("p.prose .blank").count() > 0
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
    assert steps(tab)[0] == 1 and tab.inner_text("#count") == "step 1 of 20"
    tab.get_by_label("Speed").select_option("0.25")
    tab.locator("#stage").focus()
    tab.keyboard.press(" ")
    tab.wait_for_function("() => document.querySelector('#step').value > 2")
    tab.keyboard.press(" ")
    held = steps(tab)
    tab.wait_for_timeout(300)
    assert steps(tab) == held and tab.get_by_label("Play", exact=True).is_visible()
    tab.keyboard.press("Home")
    tab.get_by_label("Step forward").click()
    assert steps(tab)[0] == 1
    box = tab.locator(".map").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 5.5 / 21, box["y"] + 30)
    assert steps(tab)[0] == 5 and tab.locator(".nfe").inner_text() == "5 evaluations"
    tab.locator("#step").press("End")
    assert texts(tab) == final


def test_can_be_wound_back_while_it_runs_and_cancelled(studio, server):
    tab = studio(QUICK | {"steps": 1024, "length": 64, "n": 4}, reduced_motion="no-preference")
    tab.locator("#go").click()
    tab.wait_for_function("() => document.querySelector('#step').value > 8")
    tab.get_by_label("Step back").click()
    held, last = steps(tab)
    tab.wait_for_function("last => document.querySelector('#step').max > last", arg=last)
    assert steps(tab)[0] == held  # more comes in, and what is shown stays
    assert tab.evaluate("document.activeElement.id") == "back"
    tab.get_by_role("button", name="Cancel").click()
    tab.get_by_text("Cancelled after").wait_for()
    assert tab.evaluate("document.activeElement.id") == "go"
    until = time.monotonic() + 10
    while "\nscorelm_rows 0.0" not in server.get("/metrics").text:
        assert time.monotonic() < until, "the server goes on writing"
    tab.locator("#step").fill("2")
    assert tab.locator(".nfe").all_inner_texts() == ["2 evaluations"] * 4


def test_compare(studio, server):
    body = {"prompt": PROMPT, "steps": 6, "seed": 3, "length": 16, "temperature": 1}
    tab = studio(QUICK)
    run(tab)
    tab.get_by_role("button", name="Compare with bounded").click()
    tab.locator(".run >> nth=1").get_by_text("Copy").wait_for()
    assert tab.locator(".run h2").all_inner_texts() == [
        f"{path}\n6 steps, temperature 1, seed 3" for path in ("uniform", "bounded")
    ]
    assert texts(tab) == [answer(server, **body, path=path)[0]["text"] for path in ("uniform", "bounded")]
    tab.locator("#step").fill("2")
    assert tab.locator(".nfe").all_inner_texts() == ["2 evaluations"] * 2
    left, right = (one.bounding_box() for one in tab.locator(".run").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    assert tab.locator("#prompt").is_disabled() and tab.get_by_text("The text and the seed are those").is_visible()
    tab.set_viewport_size({"width": 600, "height": 800})
    left, right = (one.bounding_box() for one in tab.locator(".run").all())
    assert left["x"] == right["x"] and left["y"] + left["height"] <= right["y"]
    tab.get_by_role("button", name="Unpin").click()
    assert tab.locator(".run h2 >> nth=0").inner_text().startswith("bounded") and tab.locator("#prompt").is_enabled()


def test_pin_keeps_a_run_beside_the_next(studio, server):
    tab = studio(QUICK)
    run(tab)
    tab.fill("#prompt", "another text")
    tab.get_by_role("button", name="Pin", exact=True).click()
    assert tab.input_value("#prompt") == PROMPT and tab.locator("#seed").is_disabled()
    tab.fill("#temperature", "0.5")
    run(tab)
    body = {"prompt": PROMPT, "steps": 6, "seed": 3, "length": 16, "path": "uniform"}
    assert texts(tab) == [answer(server, **body, temperature=t)[0]["text"] for t in (1, 0.5)]


def test_copies_texts_and_links(studio, browser):
    browser.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab = studio(QUICK)
    run(tab)
    tab.get_by_role("button", name="Copy", exact=True).click()
    tab.get_by_role("button", name="Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == texts(tab)[0]
    tab.get_by_role("button", name="Copy link").click()
    assert tab.evaluate("navigator.clipboard.readText()") == tab.url


def test_a_link_restores_settings_and_does_not_run(studio):
    values = {
        "mode": "fill", "text": "The ____ of <b>the</b> LORD", "path": "blocks:4", "solver": "posterior:50,0.9",
        "steps": "33", "temperature": "0.35", "n": "3", "blank_words": "2", "seed": "77",
    }  # fmt: skip
    tab = studio(values)
    assert tab.locator("#welcome").is_visible() and tab.locator(".run").count() == 0
    assert {name: tab.input_value(f"#{name}") for name in ("steps", "temperature", "n", "blank_words", "seed")} == {
        name: values[name] for name in ("steps", "temperature", "n", "blank_words", "seed")
    }
    assert (tab.input_value("#path"), tab.input_value("#path-number")) == ("blocks", "4")
    assert (tab.input_value("#solver"), tab.input_value("#solver-number")) == ("posterior", "50,0.9")
    assert tab.inner_text("#board").count("LORD") == 1 and tab.locator("#board .hole").count() == 1
    tab.get_by_text("More settings").click()
    tab.fill("#seed", "78")
    tab.get_by_role("spinbutton", name="Texts").fill("4")
    tab.keyboard.press("Tab")
    assert dict(httpx.QueryParams(tab.evaluate("location.hash.slice(1)"))) == values | {"seed": "78", "n": "4"}


def test_a_link_with_nonsense_changes_nothing(studio):
    tab = studio({"mode": "x", "steps": "many", "path": "<b>", "seed": "", "n": "NaN", "temperature": "1e999"})
    assert [tab.input_value(f"#{name}") for name in ("steps", "path", "seed", "n", "temperature")] == [
        "128", "bounded", "0", "1", "0.8",
    ]  # fmt: skip


def test_the_film_opens_and_plays(studio, browser, tmp_path):
    tab = studio(QUICK | {"n": 2, "prompt": PROMPT + " </script>"})
    run(tab)
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save film").click()
    assert download.value.suggested_filename == "scorelm-film.html"
    download.value.save_as(tmp_path / "film.html")
    written = texts(tab)
    film = browser.open(tmp_path / "film.html", browser.new_tab())
    film.get_by_label("Speed").select_option("4")
    film.get_by_text("step 6 of 6").wait_for()
    assert film.inner_text("h1") == PROMPT + " </script>" and "uniform, 6 steps" in film.inner_text("#subtitle")
    assert film.eval_on_selector_all(
        "main .text", "all => all.map(p => [...p.childNodes].filter(e => e.className !== 'control done given' && "
        "e.className !== 'control done').map(e => e.textContent).join('').trim())",
    ) == written  # fmt: skip
    film.close()


# --- what goes wrong --------------------------------------------------------------------------------------------------


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


def test_the_queue(studio, server, browser):
    tab = studio(QUICK)
    with hogs(server, 2):
        tab.locator("#go").click()
        tab.get_by_text("Waiting: 1 request ahead of yours.").wait_for()
        tab.get_by_role("button", name="Cancel").click()
        tab.get_by_text("Cancelled.").wait_for()
        with hogs(server, 1):
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


def test_a_token_a_timeout_and_a_server_that_goes(browser):
    with serve("--timeout", "3", SCORELM_TOKEN="open sesame") as (address, process):
        tab = browser.open(f"{address}/", reduced_motion="reduce")
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
        process.kill()
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


# --- for everyone -----------------------------------------------------------------------------------------------------


def press_until(tab, key, condition, most=60):
    """Press a key until something about the focused element is true."""
    for _ in range(most):
        if tab.evaluate(f"(e => Boolean({condition}))(document.activeElement)"):
            return
        tab.keyboard.press(key)
    raise AssertionError(f"{key} never leads to {condition}")


def test_all_of_it_by_keys_alone(studio):
    tab = studio(QUICK)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    press_until(tab, "Tab", "e.id === 'mode-write'")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#board").is_visible()
    press_until(tab, "Tab", "e.closest('#board')")
    tab.keyboard.press("End")
    press_until(tab, "Tab", "e.id === 'go'")
    tab.keyboard.press("Enter")
    tab.get_by_text("Written in").wait_for()
    press_until(tab, "Tab", "e.getAttribute('role') === 'option'")
    assert tab.locator("#card").is_visible()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#card b").inner_text() == tab.evaluate("document.activeElement.textContent")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.evaluate(outline) == "solid"
    tab.keyboard.press("Escape")
    assert tab.locator("#card").is_hidden()
    press_until(tab, "Tab", "e.id === 'step'")
    tab.keyboard.press("Home")
    assert steps(tab)[0] == 0
    press_until(tab, "Shift+Tab", "e.id === 'compare'")
    tab.keyboard.press("Enter")
    tab.locator(".run >> nth=1").get_by_text("Copy").wait_for()


PIXEL = """(y) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  context.drawImage(document.querySelector("canvas"), 0, -y);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


def test_light_and_dark(studio):
    found = {}

    def look():
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return background, tab.evaluate(PIXEL, 0), tab.evaluate(PIXEL, 12)

    for scheme, other in (("light", "dark"), ("dark", "light")):
        tab = studio(QUICK, color_scheme=scheme)
        run(tab)
        assert found.setdefault(scheme, look()) == look()
        tab.get_by_label("Light or dark").click()
        assert found.setdefault(other, look()) == look()
        tab.evaluate("localStorage.clear()")
    assert found == {
        "light": ("rgb(255, 255, 255)", [218, 219, 223], [241, 240, 234]),
        "dark": ("rgb(21, 23, 28)", [59, 64, 74], [34, 37, 45]),
    }
    tab.get_by_label("Light or dark").click()
    tab.reload()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == found["dark"][0]  # it is remembered


def test_a_phone_needs_no_sideways_scrolling(studio):
    tab = studio(QUICK | {"prompt": f"{PROMPT} {'x' * 60}", "length": 90}, width=390, height=844)
    width = "document.documentElement.scrollWidth"
    assert tab.evaluate(width) == 390
    tab.get_by_text("More settings").click()
    run(tab)
    assert tab.evaluate(width) == 390
    assert tab.evaluate("document.querySelector('#stage').getBoundingClientRect().top") < 100  # it is in view
    tab.locator("p.prose [role=option]:visible").last.click()
    box = tab.locator("#card").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    tab.get_by_role("button", name="Compare with bounded").click()
    tab.locator(".run >> nth=1").get_by_text("Copy").wait_for()
    assert tab.evaluate(width) == 390
    tab.get_by_role("button", name="Unpin").click()
    tab.locator("label[for=mode-fill]").click()
    tab.get_by_label("Repair instead").check()
    assert tab.evaluate(width) == 390


def test_nothing_moves_for_those_who_want_no_motion(studio):
    tab = studio(QUICK | {"steps": 30})
    tab.locator("#go").click()
    tab.locator("#player").wait_for()
    assert tab.get_by_label("Play", exact=True).is_visible()
    tab.get_by_text("step 30 of 30").wait_for()
    assert tab.evaluate("document.getAnimations().length") == 0
    assert tab.eval_on_selector("p.prose span", "e => getComputedStyle(e).transitionDuration") == "0s"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(studio, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()

    def check(what):
        found = [
            (one["impact"], one["id"], [node["target"] for node in one["nodes"]])
            for one in axe.run(tab).response["violations"]
        ]
        assert found == [], what

    tab = studio(QUICK, color_scheme=scheme)
    check("at first")
    tab.locator("label[for=mode-fill]").click()
    tab.locator("#board .word >> nth=1").click()
    tab.get_by_text("More settings").click()
    check("filling in")
    tab.locator("label[for=mode-write]").click()
    run(tab)
    tab.locator("#step").fill("1")
    tab.locator("p.prose .guess >> nth=0").hover()
    check("a step, and its card")
    tab.get_by_role("button", name="Compare with bounded").click()
    tab.locator(".run >> nth=1").get_by_text("Copy").wait_for()
    tab.fill("#steps", "0")
    tab.locator("#go").click()
    check("two runs, and a bad value")

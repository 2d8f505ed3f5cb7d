"""Studio: runs are played, wound back, compared, kept, linked to and saved as films."""

import time

import httpx
import pytest

from .conftest import PROMPT, QUICK, answer, run, steps, texts

pytestmark = pytest.mark.thorough  # a browser, and a server with a model


def test_plays_and_winds_back(studio):
    tab = studio(QUICK | {"steps": 12}, reduced_motion="no-preference")
    tab.locator("#go").click()
    tab.get_by_label("Pause").wait_for()
    tab.get_by_text("step 12 of 12").wait_for()
    tab.get_by_label("Play", exact=True).wait_for()
    final = texts(tab)
    tab.locator("#stage").focus()
    tab.keyboard.press("Home")
    assert steps(tab) == (0, 12) and tab.locator("p.prose .blank").count() > 0
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
    assert steps(tab)[0] == 1 and tab.inner_text("#count") == "step 1 of 12"
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
    tab.mouse.click(box["x"] + box["width"] * 5.5 / 13, box["y"] + 30)
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
        "128", "bounded", "0", "1", "0.75",
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

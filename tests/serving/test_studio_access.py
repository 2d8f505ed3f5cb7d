"""Studio for everyone: by keys alone, in the dark, on a phone, without motion, read aloud."""

import pytest

from .conftest import PROMPT, QUICK, run, steps

pytestmark = pytest.mark.thorough  # a browser, and a server with a model


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
    """All rules where it is light; in the dark, those about colours."""
    rules = None if scheme == "light" else {"runOnly": ["color-contrast", "link-in-text-block"]}
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()

    def check(what):
        found = [
            (one["impact"], one["id"], [node["target"] for node in one["nodes"]])
            for one in axe.run(tab, options=rules).response["violations"]
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

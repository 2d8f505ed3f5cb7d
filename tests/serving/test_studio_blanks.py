"""Studio: words become blanks, and blanks and doubted words are written anew."""

import httpx
import pytest

from .conftest import SENTENCE, answer, run, texts

pytestmark = pytest.mark.thorough  # a browser, and a server with a model


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
    tab.locator("#step").fill("0")
    assert texts(tab) == [SENTENCE]  # it begins with what is doubted, legibly
    doubted = tab.locator("p.prose .doubted")
    assert tab.locator("p.prose :is(.blank, .guess)").count() == 0 < doubted.count()
    assert set(doubted.evaluate_all("all => all.map(e => getComputedStyle(e).filter)")) == {"none"}
    doubted.first.hover()
    assert "Given and doubted, noise σ" in tab.inner_text("#card")
    tab.locator("#step").fill("1")
    assert doubted.count() == 0
    tab.get_by_label("Repair instead").uncheck()
    assert tab.input_value("#path") == "bounded" and filling(tab) == SENTENCE.replace("God", "____")

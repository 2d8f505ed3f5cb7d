"""Studio: a text is written, and what the model thought of at every word can be looked at."""

import math

import pytest

from .conftest import PROMPT, QUICK, answer, run, serving, states, texts

pytestmark = pytest.mark.thorough  # a browser, and a server with a model


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


def test_says_what_is_read_otherwise_than_it_was_typed(studio, lm):
    with serving(lm) as small:
        tab = studio({"mode": "write", "prompt": "and <b>GOD</b>", "path": "uniform", "steps": "2"}, at=small)
        run(tab)
        (said,) = small.post("/v1/generate", json={"prompt": "and <b>GOD</b>", "steps": 2}).json()["notes"]
        note = tab.locator(".run .note")
        assert "for 'and <b>GOD</b>'" in said and note.text_content() == f"T{said[1:]}."
        assert note.text_content() in tab.text_content("#announce")
        tab.fill("#prompt", "and god")
        run(tab)
        assert note.is_hidden()


def test_candidates_of_a_token(studio, server):
    """Under the pointer and in focus: those of the step that is shown, or of the one that wrote the token."""
    body = {"prompt": PROMPT, "path": "bounded", "steps": 6, "seed": 3, "length": 16, "temperature": 1.0}
    seen = states(server, **body)
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
    assert f"{math.floor(100 * row['candidates'][i][0][1] + 0.5)} %" in card.locator("li >> nth=0").inner_text()
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

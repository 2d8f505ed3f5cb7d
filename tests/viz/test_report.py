"""Reports: the page shows the figures, marks those that fool, draws the curves, and no text breaks out of it."""

import json
import math
import time
from pathlib import Path

import pytest

from scorelm.errors import DiskError, InputError
from scorelm.viz.report import check_report, save_report

from .pages import HOSTILE, Reader

pytestmark = pytest.mark.thorough  # a browser

PATHS = ("uniform", "ramp:1", "blocks:4", "shuffled", "confidence", "entropy")
LINES = [
    "And God said, Let there be light: and there was light.",
    "And it came to pass in those days, that the king sent for the elders of Judah, and of Jerusalem, and they came.",
    "",
]
JUDGED = ("perplexity", "perplexity_low", "perplexity_high", "mauve")
COPIED = ("copied", "longest_copy", "exact_copies")


def priced(path, steps, kind, nats, terms):
    return {
        "path": path, "exact": kind == "exact", "kind": kind, "nats_per_token": nats, "bits_per_char": nats * 0.41,
        "stderr_nats_per_token": 0.0213, "tokens": 21340, "nfe": 32.25, "unknown_characters": 0, "terms": terms,
        "steps": steps,
    }  # fmt: skip


def row(name, *values):
    keys = (
        *JUDGED, "entropy", "distinct_1", "distinct_2", "distinct_3", "self_bleu", "repetition_4", "zipf",
        "length_distance", *COPIED,
    )  # fmt: skip
    return {"name": name, "texts": 128} | dict(zip(keys, values, strict=True))


def point(perplexity, entropy):
    interval = {"perplexity_low": perplexity * 0.93, "perplexity_high": perplexity * 1.08}
    return {"perplexity": perplexity} | interval | {"entropy": entropy}


def whole():
    """The report of a score model, with every figure."""
    four = {"reconstruction": 0.0121, "diffusion": 3.9, "prior": 0.0004, "length": 0.11}
    best = {"uniform": 90, "ramp:1": 70, "blocks:4": 62, "shuffled": 48, "confidence": 43, "entropy": 41}
    heats = ((0.6, 17.2, 2.31), (0.7, 22.3, 2.48), (0.8, 29.4, 2.6), (0.9, 37.9, 2.67), (1.0, 48.3, 2.71))
    return {
        "model": {
            "objective": "score", "parameters": 12345678, "data": "kjv", "steps": 20000, "tokens": 163840000,
            "heldout_loss": 3.14159,
        },
        "judge": "runs/judge/model",
        "settings": {
            "texts": 128, "steps": 64, "seed": 7, "real": 127, "sample_temperature": 0.75, "sample_top_p": 0.95,
        },
        "prices": [
            priced("uniform", None, "upper bound", 4.0225, four),
            priced("random", None, "upper bound (mean over 16 orders)", 3.95, four),
            priced("ordered", None, "exact", 3.71, {"reconstruction": 3.71}),
            priced("confidence", 64, "upper bound", 4.31, {"reconstruction": 4.2, "length": 0.11}),
        ],
        "table": [
            row(
                "model (shuffled, 64 evaluations)", 48.31, 44.9, 52.2, 0.873, 2.71, 0.213, 0.684, 0.912, 18.3, 0.0121,
                0.98, 1.32, 0.0313, 4.2, 0.0,
            ),
            row(
                "real text", 31.2, 28.8, 33.9, 0.962, 2.83, 0.231, 0.722, 0.941, 16.9, 0.0042,
                0.96, 0.83, 0.0214, 4.4, 0.0078,
            ),
            row(
                "unigram sampler", 1234.5, 1180.2, 1290.7, 0.008, 2.84, 0.292, 0.853, 0.993, 4.1, 0.0,
                0.93, 0.74, 0.0, 2.1, 0.0,
            ),
            row(
                "one real line repeated", 22.04, 22.04, 22.04, 0.004, 2.62, 0.0013, 0.0014, 0.0015, 100.0, 0.0121,
                0.0, 9.33, 1.0, 18.0, 1.0,
            ),
        ],
        "frontier": [{"temperature": heat} | point(perplexity, entropy) for heat, perplexity, entropy in heats],
        "effort": [
            {"path": path, "steps": steps, "nfe": float(steps), "seconds": steps * 0.0041}
            | point(best[path] * (1 + 40 / steps), 2.7)
            for path in PATHS
            for steps in (8, 16, 32, 64, 128)
        ],
        "samples": [{"path": path, "texts": [*LINES, HOSTILE]} for path in ("blocks:1", *PATHS)],
        "notes": [],
    }  # fmt: skip


def unjudged():
    report = whole() | {"judge": None}
    for rows in (report["table"], report["frontier"], report["effort"]):
        for one in rows:
            for key in JUDGED:
                one.pop(key, None)
    return report


def autoregressive():
    report = whole()
    report["model"] |= {"objective": "autoregressive", "data": "", "heldout_loss": None}
    report["prices"] = report["prices"][2:3]
    report["effort"] = [{"path": "blocks:1", "steps": 1, "nfe": 27.34, "seconds": 0.0123} | point(41.0, 2.72)]
    report["samples"] = [{"path": "blocks:1", "texts": LINES}]
    return report


def saved(report, folder):
    save_report(report, folder / "report.html")
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


def poison(value):
    """The same report with a hostile end in every text and name but the one that the page looks for."""
    if isinstance(value, dict):
        return {key: poison(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return value + HOSTILE if isinstance(value, str) and value != "real text" else value


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_report(tmp_path):
    assert saved(whole(), tmp_path).data == whole()
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == whole()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_nothing_ends_the_element_of_the_json(tmp_path):
    hostile = saved(poison(whole()) | {"judge": HOSTILE + "\ud800\u2028"}, tmp_path)
    assert hostile.tags == saved(whole(), tmp_path).tags
    assert not set(hostile.json) & set("<>&") and hostile.json.isascii()
    assert hostile.data["judge"] == HOSTILE + "\ud800\u2028"


def test_numbers_that_json_lacks_are_null(tmp_path):
    report = whole()
    report["prices"][0] |= {"nats_per_token": math.nan, "terms": {"prior": math.inf}}
    report["frontier"][0]["perplexity"] = -math.inf
    found = saved(report, tmp_path).data
    assert found["prices"][0]["nats_per_token"] is found["prices"][0]["terms"]["prior"] is None
    assert found["frontier"][0]["perplexity"] is None and found["frontier"][1] == whole()["frontier"][1]


@pytest.mark.parametrize("name", ["report", "report.pdf", "report.html.txt", ".html", "html"])
def test_another_suffix_is_refused(tmp_path, name):
    for refuse in (check_report, lambda target: save_report(whole(), target)):
        with pytest.raises(InputError, match=r"must end in \.html, not '.*'$"):
            refuse(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_refused_and_good_names_are_not(tmp_path):
    for refuse in (check_report, lambda target: save_report(whole(), target)):
        with pytest.raises(InputError, match=r"cannot write .*nowhere is not a directory$"):
            refuse(tmp_path / "nowhere" / "report.html")
    for target in (None, Path("report.html"), tmp_path / "a b.HTML", tmp_path / "ü.html"):
        check_report(target)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(TypeError):
        save_report(whole() | {"judge": object()}, target)
    write = Path.write_text

    def full(path, text, **options):
        if isinstance(text, str):
            write(path, text[:1000], **options)
        raise OSError(28, "No space left on device")

    for name in ("write_text", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, full)
            with pytest.raises(DiskError, match=r"cannot write .*report\.html: No space left on device$"):
                save_report(whole(), target)
        assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    save_report(whole(), target)
    assert Reader(target.read_text(encoding="utf-8")).data == whole()
    assert sorted(tmp_path.iterdir()) == [target, target.with_suffix(".json")]
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*taken\.html: Is a directory$"):
        save_report(whole(), tmp_path / "taken.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "taken.html"]


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, tmp_path):
    """Shows the page of a report."""

    def open_page(report, **options):
        save_report(report, tmp_path / "report.html")
        return browser.open(tmp_path / "report.html", **options)

    return open_page


@pytest.fixture(scope="module")
def whole_tab(chromium, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    save_report(whole(), path)
    tab = chromium.new_tab()
    yield chromium.open(path, tab)
    tab.close()


@pytest.fixture
def shown(browser, whole_tab):
    """The page of a whole report, for tests that only look at it."""
    return whole_tab


def cells(tab, selector):
    """The texts of a table, row by row."""
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    return tab.eval_on_selector_all(f"{selector} tr", script)


def texts(tab, selector):
    return tab.locator(selector).all_text_contents()


def test_facts_and_prices(shown):
    tab, mean = shown, "upper bound (mean over 16 orders)"
    assert dict(zip(texts(tab, "dt"), texts(tab, "dd"), strict=True)) == {
        "objective": "score", "parameters": "12,345,678", "data": "kjv", "training steps": "20,000",
        "training tokens": "163,840,000", "loss of training on held-out text": "3.142", "judge": "runs/judge/model",
        "samples in a set": "128", "shown at temperature": "0.75", "and top-p": "0.95",
        "real texts": "127", "seed": "7",
    }  # fmt: skip
    assert cells(tab, "#prices") == [
        ["path", "kind", "nats/token", "bits/character", *whole()["prices"][0]["terms"], "evaluations"],
        ["uniform", "upper bound", "4.022 ± 0.021", "1.649", "0.012", "3.900", "0.000", "0.110", "32.3"],
        ["random", mean, "3.950 ± 0.021", "1.619", "0.012", "3.900", "0.000", "0.110", "32.3"],
        ["ordered", "exact", "3.710 ± 0.021", "1.521", "3.710", "–", "–", "–", "32.3"],
        ["confidence in 64 steps", "upper bound", "4.310 ± 0.021", "1.767", "4.200", "–", "–", "0.110", "32.3"],
    ]


def test_notes_stand_at_the_top_and_a_figure_that_there_is_not_is_a_dash(opened):
    report = whole() | {"notes": ["the judge is the model itself", HOSTILE]}
    report["prices"][0]["bits_per_char"] = None
    tab = opened(report)
    assert texts(tab, "#notes p") == ["! the judge is the model itself", f"! {HOSTILE}"]
    assert cells(tab, "#prices")[1][3] == "–"


def test_figures_beside_real_text_and_marks(shown):
    tab = shown
    assert cells(tab, "#table") == [
        [
            "texts of", "perplexity[95%] ↓", "MAUVE ↑", "entropy", "distinct-1 ↑", "distinct-2 ↑", "distinct-3 ↑",
            "self-BLEU ↓", "repetition-4 ↓", "Zipf", "lengthdistance ↓", "copiedshare ↓", "longestcopy", "exactcopies",
        ],
        [
            "model (shuffled, 64 evaluations)", "48.3 [44.9, 52.2]", "0.873", "2.71", "0.213", "0.684", "0.912",
            "18.3", "0.012", "0.98", "1.32", "3.13%", "4.2", "0%",
        ],
        [
            "real text", "31.2 [28.8, 33.9]", "0.962", "2.83", "0.231", "0.722", "0.941",
            "16.9", "0.004", "0.96", "0.83", "2.14%", "4.4", "0.78%",
        ],
        [
            "unigram sampler", "1,235 [1,180, 1,291]", "0.008", "2.84", "0.292†", "0.853†", "0.993†",
            "4.1†", "0.000†", "0.93", "0.74†", "0%†", "2.1", "0%",
        ],
        [
            "one real line repeated", "22.0 [22.0, 22.0]†", "0.004", "2.62", "0.001", "0.001", "0.002",
            "100.0", "0.012†", "0.00", "9.33", "100%", "18.0", "100%",
        ],
    ]  # fmt: skip
    assert tab.text_content("#fooled") == (
        "“unigram sampler” fools distinct-1, distinct-2, distinct-3, self-BLEU, repetition-4, length distance, "
        "copied share; “one real line repeated” fools perplexity, repetition-4."
    )
    assert "do not read this column by itself" in " ".join(tab.inner_text("main").split())


def test_where_nothing_fools_nothing_is_marked(opened):
    report = whole()
    report["table"] = report["table"][:2]
    tab = opened(report)
    assert tab.locator("#table .mark").count() == 0 and tab.text_content("#fooled") == "Here none does."


def test_tables_and_charts_have_names(opened):
    tab = opened(whole())
    names = [
        "Likelihood of held-out text", "Generated text beside real text",
        "Perplexity against entropy over temperature: numbers", "Perplexity against evaluations for each path: numbers",
    ]  # fmt: skip
    assert texts(tab, "caption") == names
    for name in names[:2]:
        assert tab.get_by_role("table", name=name).is_visible()
        assert tab.get_by_role("region", name=name).get_attribute("tabindex") == "0"
    assert tab.get_by_role("columnheader", name="MAUVE higher looks better").count() == 1
    assert tab.get_by_role("rowheader", name="unigram sampler").count() == 1
    assert tab.locator("th:not([scope])").count() == tab.locator("td[scope]").count() == 0
    for name in names[2:]:
        assert tab.get_by_role("img", name=name.removesuffix(": numbers"), exact=True).is_visible()
    for summary in tab.locator("summary").all():
        summary.focus()
        tab.keyboard.press("Enter")
    assert tab.get_by_role("table").count() == 4


def test_curves_and_their_numbers(shown):
    tab = shown
    first, second = tab.locator("figure").all()
    assert first.locator(".point").count() == 6 and second.locator(".point").count() == 30
    assert first.locator(".bar").count() == 6 and second.locator("g .curve").count() == 6
    assert first.locator("text:not(.tick)").all_text_contents() == ["0.6", "0.7", "0.8", "0.9", "1.0", "real text"]
    assert sorted(second.locator("text:not(.tick)").all_text_contents()) == sorted([*PATHS, "real text"])
    ticks = second.locator(".tick").all_text_contents()
    assert ticks[-7:-2] == ["8", "16", "32", "64", "128"] and {"30", "100", "300"} <= set(ticks)
    assert cells(tab, "figure:first-child details") == [
        ["temperature", "perplexity", "95%", "entropy"],
        ["0.6", "17.2", "[16.0, 18.6]", "2.31"],
        ["0.7", "22.3", "[20.7, 24.1]", "2.48"],
        ["0.8", "29.4", "[27.3, 31.8]", "2.60"],
        ["0.9", "37.9", "[35.2, 40.9]", "2.67"],
        ["1.0", "48.3", "[44.9, 52.2]", "2.71"],
        ["real text", "31.2", "[28.8, 33.9]", "2.83"],
    ]
    rows = cells(tab, "figure:last-child details")
    assert rows[0] == ["path", "steps", "evaluations", "seconds/text", "perplexity", "95%", "entropy"]
    assert rows[1] == ["uniform", "8", "8", "0.0328", "540", "[502, 583]", "2.70"] and len(rows) == 31


PLACES = """figure => [...figure.querySelectorAll("g .point")].map(mark => {
  const { x, y, width, height } = mark.getBoundingClientRect();
  return [x + width / 2, y + height / 2];
})"""


def test_points_stand_where_their_logarithms_are(opened):
    report = whole()
    report["effort"] = [one for one in report["effort"] if one["path"] == "uniform"]
    figure = opened(report).locator("figure").last
    places = figure.evaluate(PLACES)
    for axis, key, sign in ((0, "nfe", 1), (1, "perplexity", -1)):
        logs = [sign * math.log(one[key]) for one in report["effort"]]
        shares = [(value - logs[0]) / (logs[-1] - logs[0]) for value in logs]
        span = places[-1][axis] - places[0][axis]
        assert span > 50
        assert [(at[axis] - places[0][axis]) / span for at in places] == pytest.approx(shares, abs=0.01)


COVERED = """figure => {
  const boxes = [...figure.querySelectorAll("text")].map(text => text.getBoundingClientRect());
  const around = figure.querySelector("svg").getBoundingClientRect();
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
  const out = a => a.left < around.left || a.right > around.right || a.top < around.top - 2 || a.bottom > around.bottom;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b))).length + boxes.filter(out).length;
}"""


@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("slope", [-1, 1])
def test_labels_stay_inside_and_do_not_cover_each_other(opened, width, slope):
    report = whole()
    for i, one in enumerate(report["frontier"][2:]):
        one |= point(30 + 0.3 * i, 2.6 + 0.004 * i)
    for i, one in enumerate(report["effort"]):
        one |= point(31 * one["steps"] ** slope + 0.0001 * i, 2.7)
    report["table"][1] |= point(31 * 128**slope, 2.83)
    tab = opened(report, width=width, height=800)
    assert [figure.evaluate(COVERED) for figure in tab.locator("figure").all()] == [0, 0]


def test_without_a_judge_there_is_no_chart(opened):
    tab = opened(unjudged())
    assert tab.text_content("#charts") == "No judge was given, so there is no perplexity to draw."
    assert tab.locator("figure").count() == 0 and texts(tab, "dd")[6] == "none"
    heads = cells(tab, "#table")[0]
    assert heads[:3] == ["texts of", "entropy", "distinct-1 ↑"] and len(heads) == 12
    assert "fools repetition-4." in tab.text_content("#fooled") and "perplexity" not in tab.text_content("#fooled")


def test_without_training_text_there_are_no_copies(opened):
    report = whole()
    for one in report["table"]:
        for key in COPIED:
            del one[key]
    heads = cells(opened(report), "#table")[0]
    assert len(heads) == 11 and heads[-1] == "lengthdistance ↓"


def test_an_autoregressive_model_has_one_point(opened):
    tab = opened(autoregressive())
    assert texts(tab, "dd")[0] == "autoregressive" and texts(tab, "dd")[2] == texts(tab, "dd")[5] == "–"
    assert cells(tab, "#prices") == [
        ["path", "kind", "nats/token", "bits/character", "reconstruction", "evaluations"],
        ["ordered", "exact", "3.710 ± 0.021", "1.521", "3.710", "32.3"],
    ]
    figure = tab.locator("figure").last
    assert figure.locator(".point").count() == 1 and len(figure.locator(".tick").all_text_contents()) > 5
    numbers = ["blocks:1", "1", "27.3", "0.0123", "41.0", "[38.1, 44.3]", "2.72"]
    assert cells(tab, "figure:last-child details")[1:] == [numbers]
    assert tab.locator("#samples section").count() == 1


def test_a_figure_that_is_no_number_is_a_dash(opened):
    report = whole()
    report["prices"][0]["nats_per_token"] = math.nan
    report["table"][0] |= {"perplexity": math.inf, "perplexity_high": math.inf}
    for one in report["frontier"] + report["effort"][:6]:
        one |= {"perplexity": math.inf, "perplexity_high": math.inf}
    tab = opened(report)
    assert cells(tab, "#prices")[1][2] == "– ± 0.021" and cells(tab, "#table")[1][1] == "– [44.9, –]"
    assert "perplexity" not in tab.text_content("#fooled")
    first, second = tab.locator("figure").all()
    assert "nothing to draw" in first.inner_text() and second.locator(".point").count() == 24


def test_samples(shown):
    tab = shown
    assert texts(tab, "#samples h3") == ["blocks:1", *PATHS]
    assert texts(tab, "#samples section:first-child li") == [*LINES[:2], "nothing", HOSTILE]
    assert tab.text_content("#how") == "As generated, not selected: at most 64 steps, seeds from 7 on."


def test_hostile_text_does_nothing_in_a_browser(opened):
    tab = opened(poison(whole()))
    tab.wait_for_timeout(100)
    assert tab.evaluate("[window.broken, document.scripts.length, document.images.length]") == [None, 2, 0]
    assert texts(tab, "dd")[2] == "kjv" + HOSTILE and texts(tab, "dd")[6] == "runs/judge/model" + HOSTILE
    assert cells(tab, "#table")[1][0] == "model (shuffled, 64 evaluations)" + HOSTILE
    assert texts(tab, "#samples section:first-child li")[3] == HOSTILE * 2
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("make", [whole, unjudged, autoregressive, lambda: poison(whole())])
def test_a_phone_scrolls_tables_alone(opened, make):
    tab = opened(make(), width=375, height=700)
    for summary in tab.locator("summary").all():
        summary.click()
    assert tab.evaluate("document.documentElement.scrollWidth") == 375
    box = tab.locator("#table .scroll")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    box.evaluate("box => { box.scrollLeft = 200; }")
    assert tab.locator("#table tbody th").first.bounding_box()["x"] == box.bounding_box()["x"]


DRAWN = "document.querySelector('figure svg')?.viewBox.baseVal.width === document.querySelector('figure').clientWidth"


def test_charts_follow_the_width(opened):
    tab = opened(whole(), width=1200, height=800)
    for width, most in ((1200, 600), (375, 375), (700, 700)):
        tab.set_viewport_size({"width": width, "height": 800})
        deadline = time.monotonic() + 10
        while not tab.evaluate(DRAWN) and time.monotonic() < deadline:
            tab.wait_for_timeout(20)
        box = tab.locator("figure svg").first.bounding_box()
        assert box["height"] == 320 and most * 0.8 < box["width"] < most
        assert tab.locator("figure svg").count() == 2


def test_all_figures_fit_a_wide_screen(opened):
    tab = opened(whole(), width=1200, height=800)
    assert tab.locator("#table .scroll").evaluate("box => box.scrollWidth <= box.clientWidth")


def test_light_and_dark(opened):
    background = "getComputedStyle(document.body).backgroundColor"
    for scheme, other in (("light", "dark"), ("dark", "light")):
        tab = opened(whole(), color_scheme=scheme)
        found = {scheme: tab.evaluate(background)}
        tab.get_by_label("Light or dark").click()
        found[other] = tab.evaluate(background)
        assert found == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 28)"}

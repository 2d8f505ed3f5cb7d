"""Films: the page holds what was recorded, nothing in a text breaks out of it, and it plays in a browser."""

import io
import math
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import sentencepiece
import torch
from rich.console import Console

from scorelm.errors import InputError
from scorelm.sampling.denoise import Before, StepRecord
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.viz.figure import MOST_ROWS
from scorelm.viz.files import fill_page
from scorelm.viz.film import Film, check_suffix, film_data
from scorelm.viz.frames import Token, spell
from scorelm.viz.watch import Watch

from .pages import HOSTILE, Reader

pytestmark = pytest.mark.thorough  # a browser

BOS, EOS, PAD, UNK = SentencePieceTokenizer.special
LINES = [
    "in the beginning god created the heaven and the earth",
    "and the earth was without form and void",
] * 5
LENGTHS = [0] * 5 + [1, 2, 3, 4, 5, 4, 3, 2, 1, 1, 1]  # at most 15 tokens


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm(lengths=LENGTHS)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer with bytes, and with a token that would end the page's script."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, model_type="bpe", vocab_size=310, byte_fallback=True,
        user_defined_symbols=["</script>", *"0123456789"], normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, bos_id=BOS, eos_id=EOS, pad_id=PAD, unk_id=UNK,
    )  # fmt: skip
    return SentencePieceTokenizer.from_bytes(model.getvalue())


def shoot(lm, title="A title", **options):
    """A film, and the records and samples that it is of."""
    film, records = Film(lm.tokenizer, norm=lm.denoiser.embedding.norm, title=title, subtitle="scorelm sample"), []

    def watch(record):
        film(record)
        records.append(record)

    samples = lm.generate(["the"], watch=watch, **{"path": "uniform"} | options)
    return film, records, samples


def script(ids, **changes):
    """The record of one step that finishes the last of some tokens."""
    sigma = torch.zeros(1, len(ids))
    entropy, change = torch.zeros(1, len(ids)), torch.zeros(1, len(ids))
    entropy[0, -1] = change[0, -1] = 1.0
    counts, tokens = (torch.tensor([len(ids)]), torch.tensor([1])), torch.tensor([ids])
    before = Before(torch.where(entropy > 0, torch.inf, 0.0), tokens)
    return replace(StepRecord(1, sigma, tokens, entropy, change, *counts, before), **changes)


# --- what is recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "blocks:1", "blocks:4"])
def test_the_page_holds_the_records(lm, tmp_path, path):
    film, records, samples = shoot(lm, n=3, path=path, steps=7, top_p=1)
    film.save(tmp_path / "film.html")
    data = Reader((tmp_path / "film.html").read_text(encoding="utf-8")).data
    assert (data["title"], data["subtitle"], data["norm"]) == ("A title", "scorelm sample", 4.0)
    assert data["steps"] == [0, *(record.step for record in records)]
    head = 1 + len(lm.tokenizer.encode("the"))
    for b, (row, one) in enumerate(zip(data["rows"], samples, strict=True)):
        closed = path != "blocks:1"
        n = len(one.ids)
        assert row["given"] == [i < head or (closed and i == n - 1) for i in range(n)]
        assert row["nfe"] == [0, *(int(record.nfe_B[b]) for record in records)]
        ids = [[data["tokens"][t]["id"] for t in tokens] for tokens in row["token"]]
        assert ids[0] == [token if given else PAD for token, given in zip(one.ids, row["given"], strict=True)]
        assert ids[1:] == [record.ids_BL[b, :n].tolist() for record in records] and ids[-1] == one.ids
        for k, record in enumerate(records, 1):
            sigma = [math.inf if s is None else s for s in row["sigma"][k]]
            assert sigma == pytest.approx(record.sigma_BL[b, :n].tolist(), rel=6e-3)
            for i, entropy in enumerate(record.entropy_BL[b, :n].tolist()):
                seen = row["certainty"][k][i]
                if sigma[i] == 0:
                    assert seen == 1
                elif entropy > 0:
                    assert seen == pytest.approx(math.exp(-entropy), rel=1e-2)
                else:
                    assert seen == row["certainty"][k - 1][i]
        assert row["sigma"][0] == [0 if given else None for given in row["given"]]
        assert row["certainty"][0] == [int(given) for given in row["given"]]
        text = "".join(data["tokens"][t]["text"] for t in row["token"][-1] if data["tokens"][t]["kind"] != "control")
        assert text.removeprefix(" ") == one.text


def test_positions_out_of_reach_are_blank_until_their_block(lm):
    film, *_ = shoot(lm, n=1, path="blocks:4", steps=8, length=15)
    tokens = film.rows()[0].tokens
    assert [token.kind for token in tokens[1]][-4:-1] == ["blank"] * 3
    assert "blank" not in {token.kind for token in tokens[-1]}


def test_a_token_that_the_first_step_finishes_is_not_given(lm):
    film, *_ = shoot(lm, n=1, steps=1, length=9)
    row = film.rows()[0]
    assert row.given_N.tolist() == [i <= len(lm.tokenizer.encode("the")) or i == 8 for i in range(9)]
    assert (row.sigma_KN[-1] == 0).all() and row.certainty_KN[-1].min() == 1


def test_a_repair_begins_with_the_text_that_is_doubted(lm):
    film = Film(lm.tokenizer, norm=4.0)
    (sample,) = lm.infill("the light", repair=0.3, steps=4, watch=film)
    row, doubted = film.rows()[0], lm.tokenizer.encode("the light")
    assert row.ids_KN[0].tolist() == [BOS, *doubted, EOS] and row.ids_KN[-1].tolist() == sample.ids
    assert row.given_N.tolist() == [True, *[False] * len(doubted), True]
    assert (row.sigma_KN[0, 1:-1] > 0).all() and np.isfinite(row.sigma_KN[0]).all()
    assert row.certainty_KN[0].tolist() == [1, *[0] * len(doubted), 1]


def test_signal_is_a_half_where_sigma_is_the_norm(lm):
    film = Film(lm.tokenizer, norm=4.0)
    before = Before(torch.tensor([[0.0, torch.inf, torch.inf]]), torch.tensor([[BOS, 5, 6]]))
    film(script([BOS, 5, 6], sigma_BL=torch.tensor([[0.0, 4.0, torch.inf]]), before=before))
    assert film.rows()[0].signal_KN(4.0).tolist() == [[1, 0, 0], [1, 0.5, 0]]


def test_another_generation_starts_the_film_over_and_memory_is_modest(lm):
    film, *_ = shoot(lm, n=2, steps=4)
    again = lm.generate(["the"], n=1, path="uniform", steps=3, seed=9, watch=film)
    assert len(film.frames) == 4 and len(film.rows()) == 1 and film.rows()[0].ids_KN[-1].tolist() == again[0].ids
    arrays = [value for frame in film.frames for value in vars(frame).values() if isinstance(value, np.ndarray)]
    assert {a.dtype.itemsize for a in arrays} == {2, 4} and all(a.base is None for a in arrays)


@pytest.mark.parametrize("norm", [0, -1.0, math.inf, math.nan])
def test_a_norm_that_is_none_is_refused(lm, norm):
    with pytest.raises(InputError, match=f"{norm:g}"):
        Film(lm.tokenizer, norm=norm)


# --- spelling ---------------------------------------------------------------------------------------------------------


def test_characters_in_bytes_stand_at_their_first_byte(bytewise):
    for text in ("a é", "日本", "x🙂y"):
        tokens = spell(bytewise, bytewise.encode(text))
        assert "".join(token.text for token in tokens).strip() == text and {t.kind for t in tokens} == {"word"}
    ids = bytewise.encode("é🙂")
    assert [token.text for token in spell(bytewise, ids)][-6:] == ["é", "", "🙂", "", "", ""]
    broken = spell(bytewise, [ids[-1], *ids[-6:-5], *ids[-4:-1], EOS])
    assert [t.text for t in broken] == ["⟨82⟩", "⟨C3⟩", "⟨F0⟩", "⟨9F⟩", "⟨99⟩", "</s>"]
    assert [t.kind for t in broken] == ["byte"] * 5 + ["control"]


def test_signs_that_move_a_cursor_are_shown_as_pictures(bytewise):
    tokens = spell(bytewise, bytewise.encode("\x1b[31m\n\t\x7f\x9b"))
    assert "".join(token.text for token in tokens).strip() == "␛[31m↵⇥\ufffd\ufffd"
    assert spell(bytewise, [BOS, UNK, PAD]) == [Token("<s>", "control"), Token(" ⁇ ", "control"), Token(" ·", "blank")]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_hostile_text_stays_text(bytewise, tmp_path):
    pytest.importorskip("matplotlib")
    assert "</script>" in bytewise.pieces(bytewise.encode("</script><script>"))
    film = Film(bytewise, norm=4.0, title=HOSTILE, subtitle=HOSTILE + "\ud800")
    film(script([BOS, *bytewise.encode("</script><script>&lt; " + HOSTILE)]))
    for suffix in (".html", ".png", ".gif"):
        film.save(tmp_path / f"film{suffix}")
    honest = Film(bytewise, norm=4.0)
    honest(script([BOS, 300]))
    found = Reader((tmp_path / "film.html").read_text(encoding="utf-8"))
    assert found.tags == Reader(fill_page("film.html", film_data(honest.rows(), honest))).tags
    assert not set(found.json) & set("<>&")
    assert (found.data["title"], found.data["subtitle"]) == (HOSTILE, HOSTILE + "\ud800")
    shown = "".join(found.data["tokens"][t]["text"] for t in found.data["rows"][0]["token"][-1])
    assert shown == "<s> </script><script>&lt; " + HOSTILE


def test_a_notebook_shows_the_page_in_a_frame(lm):
    film, _, _ = shoot(lm, title=f'"{HOSTILE}')
    frame = ElementTree.fromstring(film._repr_html_())
    assert frame.tag == "iframe" and frame.get("sandbox") == "allow-scripts"
    assert frame.get("srcdoc") == fill_page("film.html", film_data(film.rows(), film)).replace("\n", " ")


def test_files_are_small_and_pictures_open_and_have_their_frames(lm, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    film, *_ = shoot(lm, n=1, steps=32, length=15)
    for name, most in (("film.html", 40_000), ("film.PNG", 150_000), ("film.gif", 700_000)):
        film.save(tmp_path / name)
        assert 5_000 < (tmp_path / name).stat().st_size < most
    with image.open(tmp_path / "film.PNG") as still, image.open(tmp_path / "film.gif") as moving:
        assert still.format == "PNG" and still.width > 500 and len(still.convert("RGB").getcolors(2**24)) > 50
        assert moving.format == "GIF" and moving.n_frames == 33 and moving.info["loop"] == 0


def test_a_long_film_is_thinned(lm, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("scorelm.viz.figure.MOST_FRAMES", 5)
    film, *_ = shoot(lm, n=1, steps=12, length=7)
    film.save(tmp_path / "long.gif")
    with image.open(tmp_path / "long.gif") as moving:
        assert moving.n_frames == 5


def test_no_more_than_four_rows_are_drawn(lm, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    sizes = []
    for n in (1, MOST_ROWS, MOST_ROWS + 2):
        film, *_ = shoot(lm, n=n, steps=1, length=9)
        film.save(tmp_path / "film.png")
        with image.open(tmp_path / "film.png") as still:
            sizes.append(still.width)
    assert MOST_ROWS == 4 and sizes[0] < sizes[1] == sizes[2]


@pytest.mark.parametrize("name", ["film", "film.mp4", "film.html.txt", ".html", "html"])
def test_another_suffix_is_refused(lm, tmp_path, name):
    for refuse in (check_suffix, shoot(lm, n=1, steps=1)[0].save):
        with pytest.raises(InputError, match=r"\.html, \.gif, \.png"):
            refuse(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_refused_and_good_names_are_not(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a directory"):
        check_suffix(tmp_path / "nowhere" / "film.html")
    pytest.importorskip("matplotlib")
    for name in ("film.html", "film.HTML", "a b.gif", "ü.png"):
        check_suffix(tmp_path / name)


def test_pictures_need_matplotlib_and_pages_do_not(lm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    film, *_ = shoot(lm, n=1, steps=1)
    for suffix in (".gif", ".png"):
        for refuse in (check_suffix, film.save):
            with pytest.raises(InputError, match=r"matplotlib is not installed: pip install 'scorelm\[viz\]'"):
                refuse(tmp_path / f"film{suffix}")
    film.save(tmp_path / "film.html")
    assert [path.name for path in tmp_path.iterdir()] == ["film.html"]


def test_nothing_recorded_is_refused(lm, tmp_path):
    film = Film(lm.tokenizer, norm=4.0)
    lm.generate(["the day"], length=2 + len(lm.tokenizer.encode("the day")), watch=film)
    with pytest.raises(InputError, match="every token was given"):
        film.save(tmp_path / "film.html")


def test_a_file_is_written_whole_or_not_at_all(lm, tmp_path):
    film, *_ = shoot(lm, n=1, steps=2)
    target = tmp_path / "film.html"
    target.write_text("old")
    film.title = object()  # is not JSON
    with pytest.raises(TypeError):
        film.save(target)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    film.title = "new"
    film.save(target)
    assert '"new"' in target.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [target]
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*taken\.html: Is a directory"):
        film.save(tmp_path / "taken.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.html", "taken.html"]


# --- in the terminal --------------------------------------------------------------------------------------------------


def test_the_terminal_shows_the_text(lm):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="truecolor")
    with Watch(lm.tokenizer, console) as watch:
        samples = lm.generate(["the"], n=2, path="uniform", steps=5, watch=watch)
        watch.live.refresh()
        shown = Console(file=io.StringIO(), width=100)
        shown.print(watch.live.get_renderable())
    assert "step 5, 5 evaluations of the network" in shown.file.getvalue()
    for one in samples:
        assert one.text.replace(" ", "") in shown.file.getvalue().replace(" ", "")
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back


def test_the_terminal_leaves_out_what_an_open_row_has_not_reached(lm):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Watch(lm.tokenizer, console) as watch:
        lm.generate(["the"], path="blocks:1", steps=1, watch=lambda record: record.step < 4 and watch(record))
        lines = watch.live.get_renderable().renderables
    assert lines[0].plain == "step 3, 3 evaluations of the network" and "·" not in lines[1].plain


def test_markup_and_escapes_are_text_in_the_terminal(bytewise):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Watch(bytewise, console) as watch:
        watch(script([BOS, *bytewise.encode("[bold]x[/bold] [/] \x1b]0;title\x07"), 300]))
        plain = Console(file=io.StringIO(), width=100)
        plain.print(watch.live.get_renderable())
    assert "[bold]x[/bold] [/] ␛]0;title␇" in plain.file.getvalue()
    assert "\x1b]0" not in console.file.getvalue() and "\x07" not in console.file.getvalue()


def test_without_a_terminal_nothing_is_shown(lm, capsys):
    console = Console(file=io.StringIO(), force_terminal=False)
    with Watch(lm.tokenizer, console) as watch:
        lm.generate(n=1, path="uniform", steps=3, watch=watch)
    assert console.file.getvalue() == "" and capsys.readouterr() == ("", "")


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def movie(lm, tmp_path_factory):
    """A page, and the samples in it."""
    path = tmp_path_factory.mktemp("film") / "film.html"
    film, _, samples = shoot(lm, n=2, steps=12, path="ramp:0.5")
    film.save(path)
    return path, samples


def step(tab):
    return int(tab.get_by_label("Step", exact=True).input_value())


def texts(tab):
    return tab.eval_on_selector_all(
        "main .text", "all => all.map(p => { const q = p.cloneNode(true); "
        "q.querySelectorAll('.control').forEach(e => e.remove()); return q.textContent.trim(); })",
    )  # fmt: skip


def test_the_page_plays_to_the_end(browser, movie):
    path, samples = movie
    tab = browser.open(path)
    assert tab.title() == tab.text_content("h1") == "A title" and tab.text_content("#subtitle") == "scorelm sample"
    tab.get_by_label("Speed").select_option("4")
    tab.get_by_text("step 12 of 12").wait_for()
    tab.get_by_label("Play").wait_for()
    assert texts(tab) == [one.text for one in samples]
    assert tab.locator("main .nfe").all_text_contents() == ["12 evaluations of the network"] * 2
    assert "the number of times that the network has been evaluated" in " ".join(tab.inner_text("footer").split())
    assert tab.locator("main .done:not(.control)").count() == sum(len(one.ids) - 2 for one in samples)
    assert tab.locator("main .given:not(.control)").first.inner_text() == "the"


def test_keys_and_controls(browser, movie):
    path, samples = movie
    tab = browser.open(path, reduced_motion="reduce")
    assert step(tab) == 12 and texts(tab) == [one.text for one in samples]  # does not play by itself
    tab.keyboard.press("Home")
    assert step(tab) == 0 and tab.locator("main .blank").count() > 0
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowLeft")
    assert step(tab) == 1 and tab.text_content("#count") == "step 1 of 12"
    tab.keyboard.press(" ")
    tab.get_by_label("Pause").wait_for()
    tab.get_by_text("step 3 of 12").wait_for()
    tab.keyboard.press(" ")
    assert tab.get_by_label("Play").is_visible()
    held = step(tab)
    tab.wait_for_timeout(300)
    assert step(tab) == held
    tab.get_by_label("Step back").click()
    assert step(tab) == held - 1
    tab.get_by_label("Step forward").click()
    tab.get_by_label("Step forward").click()
    assert step(tab) == held + 1
    slider = tab.get_by_label("Step", exact=True)
    slider.fill("7")
    assert tab.text_content("#count") == slider.get_attribute("aria-valuetext") == "step 7 of 12"
    slider.press("ArrowRight")
    assert step(tab) == 8
    tab.keyboard.press("End")
    assert step(tab) == 12
    box = tab.locator(".map").first.bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 5.5 / 13, box["y"] + box["height"] / 2)
    assert step(tab) == 5 and "position" in tab.locator(".look").first.inner_text()


PIXEL = """([x, y]) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  context.drawImage(document.querySelector("main canvas"), -x, -y);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


def test_noise_is_painted(browser, movie):
    """Given rows are grey throughout, free ones go from the colour of no evidence to that of finished."""
    tab = browser.open(movie[0], reduced_motion="reduce", color_scheme="light")
    size = tab.evaluate("(({ width, height }) => [width, height])(document.querySelector('canvas'))")
    given, first, last = (tab.evaluate(PIXEL, place) for place in ([0, 0], [0, 6], [12, 6]))
    assert size == [13, len(movie[1][0].ids)]
    assert (given, first, last) == ([198, 200, 205], [241, 240, 234], [29, 66, 104])


def test_light_and_dark(browser, movie):
    background = "getComputedStyle(document.body).backgroundColor"
    for scheme, other in (("light", "dark"), ("dark", "light")):
        tab = browser.open(movie[0], color_scheme=scheme, reduced_motion="reduce")
        found = {scheme: (tab.evaluate(background), tab.evaluate(PIXEL, [0, 6]))}
        tab.get_by_label("Light or dark").click()
        found[other] = (tab.evaluate(background), tab.evaluate(PIXEL, [0, 6]))
        assert found["light"] == ("rgb(255, 255, 255)", [241, 240, 234])
        assert found["dark"] == ("rgb(21, 23, 28)", [34, 37, 45])


def test_a_phone_needs_no_sideways_scrolling(browser, movie):
    tab = browser.open(movie[0], width=320, height=640, reduced_motion="reduce")
    assert tab.evaluate("document.documentElement.scrollWidth") == 320


def test_hostile_text_does_nothing_in_a_browser(browser, bytewise, tmp_path):
    film = Film(bytewise, norm=4.0, title=HOSTILE, subtitle=HOSTILE)
    film(script([BOS, *bytewise.encode(HOSTILE), 300]))
    film.save(tmp_path / "film.html")
    tab = browser.open(tmp_path / "film.html", reduced_motion="reduce")
    assert tab.text_content("h1") == tab.text_content("#subtitle") == HOSTILE
    assert texts(tab) == [HOSTILE + bytewise.pieces([300])[0].replace("▁", " ")]
    assert tab.evaluate("[window.broken, document.scripts.length, document.images.length]") == [None, 2, 0]

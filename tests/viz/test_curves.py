"""What runs have measured, as curves: read from metrics.jsonl, drawn in a terminal and as a picture, in a table."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from scorelm.cli import main
from scorelm.viz.chart import SIGNS, chart_runs, table_prices
from scorelm.viz.curves import LOSS, SMOOTHED, Curve, Point, limits, read_runs
from scorelm.viz.plots import COLOURS, choose_styles, draw_run, draw_runs, plot_runs, spread

pytest.importorskip("matplotlib")
pytest.importorskip("plotext")
STEPS = range(20, 2001, 20)


def price(path, epoch, strength=1.0):
    """Falls until about epoch 5, then rises."""
    return {"ordered": 2.0, "uniform": 3.5}[path] + 4 * np.exp(-epoch) + 0.05 * strength * max(0.0, epoch - 4)


def lines(strength=1.0, every=200):
    """Of a run of 20 epochs of 100 steps; a measurement is told 20 steps after it was made."""
    for step in STEPS:
        line = {"step": step, "epoch": step / 100, "tokens": 9 * step, "loss": 6 * np.exp(-step / 500) + 1, "mfu": 0.3}
        line["heldout"] = None
        if step % every == 20 and step > every:
            at = (step - 20) / 100
            prices = {path: float(price(path, at, strength)) for path in ("ordered", "uniform")}
            line["heldout"] = {"step": step - 20} | prices | {"stderr": 0.02}
        yield line


@pytest.fixture
def make_run(tmp_path):
    """Makes a run directory with these lines in its metrics.jsonl."""

    def make(name, found=None, end=""):
        (tmp_path / name).mkdir(parents=True)
        text = "".join(f"{json.dumps(line)}\n" for line in (lines() if found is None else found)) + end
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    return make


def command(*words):
    with pytest.raises(SystemExit) as ended:
        main(["plot", *map(str, words)])
    return ended.value.code


def test_prices_stand_where_they_were_measured_and_the_loss_is_smoothed(make_run):
    found = read_runs([make_run("a")])
    curves = found.curves["a"]
    assert (found.unit, list(curves)) == ("epochs", ["ordered", "uniform", LOSS])
    assert [point.at for point in curves["ordered"].points] == pytest.approx([2.0 * k for k in range(1, 10)])
    assert curves["ordered"].points[3] == pytest.approx((8, price("ordered", 8)))
    assert curves["ordered"].best.at == 4 and curves["ordered"].priced and not curves[LOSS].priced
    losses = [line["loss"] for line in lines()]
    assert len(losses) == 100 > SMOOTHED and len(curves[LOSS].points) == 50
    assert curves[LOSS].points[0] == pytest.approx((0.3, (losses[0] + losses[1]) / 2))


def test_what_is_missing_or_not_finite_or_torn_is_left_out(make_run):
    found = list(lines())
    found[3]["loss"], found[4]["loss"] = None, float("nan")
    found[20]["heldout"]["uniform"] = None
    found[30]["heldout"]["ordered"] = float("inf")
    curves = read_runs([make_run("a", found, end='{"step": 2020, "epo')]).curves["a"]
    assert len(curves["uniform"].points) == len(curves["ordered"].points) == 8
    assert all(np.isfinite(curves[LOSS].points).flat)
    measured_first = [{"step": 10, "epoch": 0.1, "loss": 4.0, "heldout": {"step": 0, "ordered": 6.0}}]
    assert read_runs([make_run("b", measured_first)]).curves["b"]["ordered"].points == [(0.0, 6.0)]


def test_runs_without_epochs_are_drawn_over_steps(make_run):
    older = [{"step": step, "loss": 3.0} for step in STEPS]
    found = read_runs([make_run("a"), make_run("old", older)])
    assert (found.unit, found.last) == ("steps", pytest.approx(2000, rel=0.01))
    assert found.curves["a"]["ordered"].points[0].at == 200
    assert list(found.panels) == ["ordered", "uniform", LOSS] and list(found.panels["ordered"]) == ["a"]


def test_runs_are_named_by_their_directories_as_far_as_that_tells_them_apart(make_run, tmp_path, monkeypatch):
    one, two, three = make_run("x/mine"), make_run("y/mine"), make_run("y/yours")
    assert list(read_runs([one, three, one]).curves) == ["mine", "yours"]
    assert list(read_runs([one, two, three]).curves) == ["x/mine", "y/mine", "y/yours"]
    monkeypatch.chdir(one)
    assert list(read_runs([Path("."), tmp_path / "y" / "yours"]).curves) == ["mine", "yours"]
    alike = [make_run(f"{'x' * 30}{k}{'x' * 30}") for k in range(2)]
    assert [name[:3] for name in read_runs(alike).curves] == ["1 x", "2 x"]


def test_the_steep_start_is_cut_off_and_every_best_point_is_in_view(make_run):
    curve = read_runs([make_run("a")]).curves["a"]["ordered"]
    low, high = limits([curve])
    assert low < curve.best.nats and curve.points[-1].nats < high < 3
    flat = Curve([Point(1, 3.0), Point(2, 3.0)], priced=True)
    assert limits([flat])[0] < 3 < limits([flat])[1]
    begun = Curve([Point(0.1, 7.0)], priced=True)
    assert limits([curve, begun])[1] > 7
    gentle = Curve([Point(float(k), 4 - 0.1 * k) for k in range(9)], priced=True)
    assert limits([gentle])[1] > 4


@pytest.fixture
def three(make_run):
    """Runs that overfit a little, a lot and not at all."""
    return read_runs([make_run("a run"), make_run("_b $1$", lines(3)), make_run("c", lines(0))])


def test_the_chart_shows_every_curve_in_its_sign_within_the_width(make_run, three):
    one = read_runs([make_run("a")])
    for width in (40, 80, 100):
        for found, panels in ((one, 1), (three, 3)):
            text = chart_runs(found, width)
            assert text == chart_runs(found, width)
            assert max(map(len, text.splitlines())) <= width and "\x1b" not in text
            assert text.count("└") == panels
    head, legend, *chart = chart_runs(one, 80).splitlines()
    assert head == "a: held-out prices and training loss, nats per token, over epochs"
    assert legend == "o ordered   x uniform   . training loss"
    assert all(any(sign in line for line in chart) for sign in "ox.")
    _, legend, *chart = chart_runs(three, 80).splitlines()
    assert legend == "o a run   x _b $1$   + c" and len(chart) < 30
    assert all(any(word in line for line in chart) for word in ("ordered", "uniform", LOSS, *"ox+"))
    assert len(chart_runs(three, 60).splitlines()) > len(chart) + 10
    assert len(set(SIGNS)) == len(SIGNS)


def test_the_table_has_the_best_and_the_last_price_of_each_run_on_each_path(three):
    head, *rows = table_prices(three).splitlines()
    assert head.split() == ["best", "at", "epoch", "last", "at", "epoch"]
    assert len({len(row) for row in (head, *rows)}) == 1 and len(head) <= 80
    last = price("ordered", 18)
    assert rows[0].split() == ["ordered", "a", "run", f"{price('ordered', 4):.3f}", "4.0", f"{last:.3f}", "18.0"]
    assert [row[:7].strip() for row in rows] == ["ordered", "", "", "uniform", "", ""]


def test_places_are_told_as_finely_as_the_axis_is_long(make_run):
    found = read_runs([make_run("a")])
    assert found.place(4) == "4.0"
    short = [{"step": 1000 * k, "epoch": 0.001 * k, "loss": 3.0, "heldout": {"ordered": 3.0}} for k in range(1, 50)]
    assert read_runs([make_run("short", short)]).place(0.007) == "0.0070"
    assert found._replace(unit="steps").place(12345) == "12,345"


def test_the_picture_of_one_run_names_its_curves_and_marks_their_best(make_run):
    found = read_runs([make_run("a")])
    figure = draw_run(found)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["2.07", "3.57", "ordered", "uniform", LOSS]
    marks = [line.get_xydata()[0] for line in axis.lines if len(line.get_xdata()) == 1]
    assert np.array(marks) == pytest.approx(np.array([found.curves["a"][path].best for path in found.paths]))


def test_texts_in_the_picture_keep_apart(make_run):
    """Both prices end at the same height, and at their best."""
    ends = [{"step": k, "epoch": k, "heldout": {"ordered": 9 - k, "uniform": 9 - k}} for k in range(8)]
    (axis,) = draw_run(read_runs([make_run("a", ends)])).axes
    *values, one, two = axis.texts
    assert [text.get_horizontalalignment() for text in values] == ["right", "right"]
    low, high = axis.get_ylim()
    assert abs(one.xy[1] - two.xy[1]) > 0.05 * (high - low)


def test_the_picture_of_several_runs_has_a_panel_for_each_path_and_one_legend(three):
    figure = draw_runs(three)
    *panels, free = figure.axes
    assert [axis.get_title(loc="left") for axis in panels] == ["ordered", "uniform", LOSS]
    assert [axis.get_title(loc="right") for axis in panels] == ["best 2.00 at 18.0", "best 3.50 at 18.0", ""]
    assert [text.get_text() for text in free.get_legend().get_texts()] == list(three.curves)
    assert len({axis.get_xlim() for axis in panels}) == 1
    many = choose_styles(map(str, range(5 * len(COLOURS))))
    assert len({(style.colour, style.dashes) for style in many.values()}) == len(many)


def test_long_names_have_a_legend_below(make_run):
    names = [f"{'long-' * 7}{k}" for k in range(2)]
    figure = draw_runs(read_runs([make_run(name) for name in names]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names


def test_labels_move_apart_and_keep_their_order():
    moved = spread([3.0, 1.0, 1.1, 1.05], 0.5)
    assert moved[0] == 3.0 and np.diff(sorted(moved)).min() > 0.49
    assert sorted(range(4), key=moved.__getitem__) == [1, 3, 2, 0]


@pytest.mark.parametrize("suffix", [".png", ".SVG", ".pdf"])
def test_each_kind_of_file_is_drawn(three, tmp_path, suffix):
    plot_runs(three, tmp_path / f"plot{suffix}")
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix.lower()]
    assert (tmp_path / f"plot{suffix}").read_bytes().startswith(start)
    assert not list(tmp_path.glob("*.partial"))


def test_the_verb_prints_charts_and_table_and_says_what_it_wrote(make_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run, begun = make_run("mine"), make_run("begun", [{"step": 10, "epoch": 0.1, "loss": 5.0, "heldout": None}])
    assert command(run, begun) == 0
    out, err = capsys.readouterr()
    assert chart_runs(read_runs([run, begun]), 80) in out and table_prices(read_runs([run, begun])) in out
    picture = run / "prices.png"
    assert err == f"begun has no held-out price yet: only its training loss is drawn\npicture: {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert command(begun, "--out", begun / "loss.pdf") == 0
    out, err = capsys.readouterr()
    assert "best" not in out and out.startswith("begun: training loss") and "picture: " in err
    assert not picture.exists() and (begun / "loss.pdf").exists()


def test_home_is_found_in_the_name_of_a_run(make_run, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(make_run("mine").parent))
    assert command("~/mine") == 0
    assert "mine: held-out" in capsys.readouterr().out


def refused(capsys, *words):
    """The line that bad input gets."""
    assert command(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_bad_input_gets_one_line_and_writes_nothing(make_run, tmp_path, capsys, monkeypatch):
    run = make_run("mine")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for words, says in (
        ((), "name a run directory"),
        ((run, tmp_path / "gone"), r"there is no directory .*gone"),
        ((tmp_path / "notes.txt",), r"there is no directory .*notes\.txt"),
        ((tmp_path / "empty",), r"empty is no run directory: it has no metrics\.jsonl"),
        ((run, "--out", tmp_path / "a.doc"), r"must end in \.png, \.svg, \.pdf"),
        ((run, "--out", tmp_path / "gone" / "a.png"), "gone is not a directory"),
    ):
        assert re.search(says, refused(capsys, *words)), says
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "nothing to draw of odd yet"),
        (b'{"step": 1, "loss": null}\n', "nothing to draw of odd yet"),
        (b'{"step": 1, "lo', "nothing to draw of odd yet"),
        (b"hello\n", r"metrics\.jsonl is not what a run writes: line 1"),
        (b'{"step": 1, "loss": 2.0}\n[]\n', "line 2 is no JSON object with a step"),
        (b'{"loss": 2.0}\n', "line 1"),
        (b'{"step": -1e400, "loss": 2.0}\n', "line 1"),
        (b'{"step": 1, "loss": 2.0, "heldout": 3}\n', "line 1"),
        (b"\xff\xfe\n", "line 1"),
    ],
)
def test_a_file_that_no_run_has_written_gets_one_line(make_run, tmp_path, capsys, content, says):
    (make_run("odd") / "metrics.jsonl").write_bytes(content)
    assert re.search(says, refused(capsys, tmp_path / "odd"))


def test_what_is_no_file_is_refused(make_run, tmp_path, capsys):
    run = make_run("odd")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert re.search(r"cannot read .*metrics\.jsonl: Is a directory", refused(capsys, run))


@pytest.mark.parametrize("package", ["plotext", "matplotlib"])
def test_a_package_that_is_missing_is_named(make_run, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"{package} is not installed: pip install 'scorelm[viz]'" in refused(capsys, make_run("mine"))

"""Trackers: each is told the whole run in one curve, resumed or not, and none can stop a run or change it."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scorelm import ScoreLM
from scorelm.cli.train import film
from scorelm.config.recipe import Recipe
from scorelm.errors import InputError
from scorelm.training import trackers, train
from scorelm.training.trackers import TRACKERS, Followed, figures

from .test_trainer import after_its_first_checkpoint

STEPS = 12
Curve = dict[int, float]


@pytest.fixture(scope="module")
def recipe(tools: Any, text: Path) -> Recipe:
    return tools.recipe(text, {"model": {"layers": 1}}, steps=STEPS, save_every=6, keep=3, samples=2)


@pytest.fixture(scope="module")
def plain(tools: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody follows."""
    tools.train(recipe, out := tmp_path_factory.mktemp("runs") / "plain")
    return out


def followed(recipe: Recipe, *names: str, **training: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"track": names} | training)})


# What trackers that are installed are told


def read_tensorboard(out: Path) -> tuple[list[Curve], list[str], str]:
    """Every curve of the loss that was told, what was told besides, and the film."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    tags = events.Tags()
    assert "samples/text_summary" in tags["tensors"]
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert len(dict(told)) == len(told)  # what was told twice shows once
    return [dict(told)], tags["scalars"], "</html>"


def read_wandb(out: Path) -> tuple[list[Curve], list[str], str]:
    from wandb.proto.wandb_internal_pb2 import Record

    def records(path: Path) -> Iterator[Any]:
        """The records of a file in LevelDB's log format, after a header of 7 bytes."""
        data, at, whole = path.read_bytes(), 7, b""
        while at < len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # the last part of a record
                yield Record.FromString(whole)
                whole = b""

    curves, names, ids = [], set(), set()
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        curve: Curve = {}
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            names |= values.keys()
            if "loss" in values:
                curve[values["_step"]] = values["loss"]
        curves.append(curve)
    assert ids == {(out / "run_id").read_text().strip()}
    pages = [path.read_text() for path in out.glob("wandb/offline-run-*/files/media/html/*.html")]
    return curves, [name.removesuffix("/_type") for name in names], pages[-1]


def read_trackio(out: Path) -> tuple[list[Curve], list[str], str]:
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    logs = SQLiteStorage.get_logs("scorelm", (out / "run_id").read_text().strip())
    curves: list[Curve] = [{}]
    for line in logs:
        if "loss" in line:
            if line["step"] in curves[-1]:
                curves.append({})
            curves[-1][line["step"]] = line["loss"]
    pages = [path.read_text() for path in Path(MEDIA_DIR).rglob("*.html")]
    return curves, [key for line in logs for key in line], pages[-1]


READERS: dict[str, Callable[[Path], tuple[list[Curve], list[str], str]]] = {
    "tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio,
}  # fmt: skip


@pytest.fixture(scope="module")
def quiet_trackers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """On this machine, and in a directory of their own; trackio looks when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("WANDB_MODE", "offline")
        yield


@pytest.mark.thorough
@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_is_resumed_goes_on_in_the_same_curve(
    name: str, tools: Any, recipe: Recipe, plain: Path, tmp_path: Path, quiet_trackers: None, capsys: Any
) -> None:
    pytest.importorskip(name)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    said = tools.train(followed(recipe, name), whole, film=film)
    tools.assert_same(whole, plain)
    after_its_first_checkpoint(whole, out)
    tools.train(followed(recipe, name, steps=None), out, resume=True, film=film)
    tools.assert_same(out, plain)
    curves, names, page = READERS[name](out)
    told = dict(enumerate(tools.losses(plain), 1))
    for curve in curves:
        assert curve == pytest.approx({step: told[step] for step in curve})
    assert {step for curve in curves for step in curve} == set(told)
    assert {"lr", "loss_by_snr/none", *([] if name == "tensorboard" else ["samples", "film"])} <= {*names}
    assert "</html>" in page
    assert [line for line in said if line.startswith(f"{name}: ")] or name == "tensorboard"
    assert capsys.readouterr().out == ""


# What fails


class Told:
    """A tracker that notes what it is told, and fails or waits where it is asked to."""

    def __init__(self, run: Followed) -> None:
        self.run = run
        self.heard: list[str] = []
        self.hear("begin")

    where, act = "", staticmethod(lambda: None)

    def hear(self, what: str) -> None:
        self.heard.append(what)
        if what == self.where:
            self.act()

    def scalars(self, step: int, values: Any) -> None:
        self.hear("scalars")

    def texts(self, step: int, texts: Any) -> None:
        self.hear("texts")

    def page(self, step: int, name: str, html: str) -> None:
        self.hear("page")

    def close(self) -> None:
        self.hear("close")


def fail() -> None:
    raise ConnectionError("no\nnetwork")


def make(where: str, act: Callable[[], object]) -> type[Told]:
    return type("Failing", (Told,), {"where": where, "act": staticmethod(act)})


@pytest.mark.parametrize(
    "where",
    ["scalars", *(pytest.param(where, marks=pytest.mark.thorough) for where in ("begin", "texts", "page", "close"))],
)
def test_a_tracker_that_fails_costs_one_line(
    where: str, tools: Any, recipe: Recipe, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: list[Told] = []

    def follow(run: Followed) -> Told:
        good.append(Told(run))
        return good[0]

    monkeypatch.setitem(TRACKERS, "tensorboard", make(where, fail))
    monkeypatch.setitem(TRACKERS, "wandb", follow)
    monkeypatch.setattr("scorelm.training.run.check_trackers", lambda names: None)  # installed or not
    said = tools.train(followed(recipe, "tensorboard", "wandb", "wandb"), tmp_path / "run", film=lambda lm: "page")
    tools.assert_same(tmp_path / "run", plain)
    assert [line for line in said if "tensorboard" in line] == [
        "tensorboard no longer follows the run, which goes on: no network"
    ]
    assert len(good) == 1 and good[0].heard[:3] == ["begin", "scalars", "scalars"]
    assert good[0].heard.count("scalars") == STEPS and good[0].heard[-2:] == ["page", "close"]


@pytest.mark.thorough
def test_a_tracker_that_waits_for_ever_is_left_behind(
    tools: Any, recipe: Recipe, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    monkeypatch.setattr(trackers, "UNSAID", 0.1)
    for where, most, reason in (("begin", 5, "it does not keep up"), ("close", 999, "it has not taken everything")):
        monkeypatch.setitem(TRACKERS, "tensorboard", make(where, over.wait))
        monkeypatch.setattr(trackers, "WAITING", most)
        said = tools.train(followed(recipe, "tensorboard"), out := tmp_path / where)
        tools.assert_same(out, plain)
        *waiting, line = (line for line in said if "tensorboard" in line)
        assert line.startswith(f"tensorboard no longer follows the run, which goes on: {reason}")
        assert waiting == ["waiting up to 0 seconds for tensorboard to take the rest"] * (where == "close")
    over.set()


@pytest.mark.thorough
def test_files_that_cannot_be_written_cost_one_line(tools: Any, recipe: Recipe, plain: Path, tmp_path: Path) -> None:
    (out := tmp_path / "run").mkdir()
    (out / "tensorboard").symlink_to("/proc/nowhere")
    said = tools.train(followed(recipe, "tensorboard"), out)
    tools.assert_same(out, plain)
    assert len([line for line in said if line.startswith("tensorboard no longer follows")]) == 1


@pytest.mark.thorough
def test_without_a_network_wandb_costs_one_line(
    tools: Any, recipe: Recipe, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    nobody = {"MODE": "online", "BASE_URL": "http://127.0.0.1:9", "API_KEY": 40 * "a", "INIT_TIMEOUT": "2"}
    for name, value in nobody.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(trackers, "PATIENCE", 5.0)  # wandb tries for longer
    said = tools.train(followed(recipe, "wandb"), tmp_path / "run")
    tools.assert_same(tmp_path / "run", plain)
    assert len([line for line in said if line.startswith("wandb no longer follows the run, which goes on: ")]) == 1


def test_a_tracker_that_is_not_installed_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"trackio is not installed: pip install 'scorelm\[trackio\]'"):
        train(followed(recipe, "trackio"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


# What a tracker is told, and of which run


def test_the_numbers_of_a_line_have_names_without_tables() -> None:
    line = {"step": 3, "loss": 1.5, "heldout": {"step": 3, "ordered": 2.0, "stderr": float("nan")}, "name": "x"}
    assert figures(line | {"loss_by_snr": {"none": None, ">6": 0.5}}) == {
        "loss": 1.5, "heldout/ordered": 2.0, "loss_by_snr/>6": 0.5,
    }  # fmt: skip


@pytest.mark.thorough
def test_a_run_keeps_its_name_until_it_is_replaced(
    tools: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Followed] = []

    def follow(run: Followed) -> Told:
        seen.append(run)
        return Told(run)

    monkeypatch.setitem(TRACKERS, "tensorboard", follow)
    out, own = tmp_path / "our run", "wandb/offline-run-20260102_030405-our-run-1f/files/tmp/a.json"
    (out / own).parent.mkdir(parents=True)
    for name in (own, "wandb/debug.log", "wandb/notes.txt"):
        (out / name).write_text("{}")
    (out / "wandb" / "latest-run").symlink_to(out / "wandb" / own.split("/")[1])
    with pytest.raises(InputError, match=r"wandb/debug\.log"):
        tools.train(followed(recipe, "tensorboard", steps=2), out)
    for steps, how in ((2, {"overwrite": True}), (4, {"resume": True}), (2, {"overwrite": True})):
        tools.train(followed(recipe, "tensorboard", steps=steps), out, **how)
    first, again, other = seen
    assert first.id == again.id != other.id and first.id.startswith("our-run-")
    assert (first.step, again.step, first.out, first.options["training"]["rows"]) == (0, 2, out, 4)
    assert [str(p.relative_to(out)) for p in sorted((out / "wandb").rglob("*"))] == ["wandb/notes.txt"]
    assert ScoreLM.from_pretrained(out).provenance.steps == 2

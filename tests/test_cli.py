"""The command line, within this process: what it prints, where, and with which exit code.

Processes are started for what only a process has: its two streams, a reader that has gone, a full disk behind stdout,
and what is imported. Signals and crashes of training are in `tests/faults`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import pytest
import torch

from scorelm import ScoreLM
from scorelm.cli import VERBS, main
from scorelm.cli.info import InfoVerb
from scorelm.cli.output import Output
from scorelm.cli.process import let_waiting_threads_sleep
from scorelm.config.generation import Continuation, Infilling
from scorelm.config.toml import load_recipe
from scorelm.errors import DiskError, InputError
from scorelm.model.directory import EMBEDDED, FILES
from scorelm.objectives.objective import Objective
from scorelm.sampling.halting import CRITERIA
from scorelm.sampling.paths import PATHS
from scorelm.sampling.solvers import SOLVERS

SMALL = ("--model.dim", "32", "--model.layers", "2", "--max-length", "32", "--rows", "8")
HELD = ("--holdout", "0.2")


class Done(NamedTuple):
    """What a command has come to."""

    code: int
    out: str
    err: str


def scorelm(*words: str) -> Done:
    with StringIO() as out, TemporaryFile("w+") as err:  # a file of the system, as `speak` asks for
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(words)
        err.seek(0)
        return Done(int(ended.value.code or 0), out.getvalue(), err.read())


def done(*words: str) -> str:
    """What a command that succeeds prints on stdout."""
    code, out, err = scorelm(*words)
    assert code == 0, err
    return out


def process(*words: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scorelm", *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, **streams)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("Ruth", "Saul", "Amos", "Leah", "Dan")
    text = [
        f"{a} and {b} have {k} figs, and {c} has none." for a in names for b in names for c in names for k in (1, 23)
    ]
    path = tmp_path_factory.mktemp("cli") / "lines.txt"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(lines: Path) -> Path:
    """A run made with the reference project's flag names."""
    spm, out = lines.parent / "spm", lines.parent / "run"
    made = scorelm("tokenizer", "-d", str(lines), "--vocab-size", "310", "--out", str(spm))
    assert (made.code, made.out) == (0, "") and "310 tokens" in made.err
    tokenizer = str(spm / "tokenizer.model")
    trained = scorelm("train", "-d", str(lines), "-spm", tokenizer, "-mdir", str(out), "--steps", "30", *SMALL, *HELD)
    assert (trained.code, trained.out) == (0, "") and f"scorelm sample {out / 'model'}" in trained.err
    assert "lines: 250 examples, 0 empty, 0 duplicates\n" in trained.err
    return out


@pytest.fixture(scope="module")
def peers(run: Path, lines: Path) -> dict[str, Path]:
    """An autoregressive and a masked run on the same text and tokenizer."""
    found = {}
    for objective in ("autoregressive", "masked"):
        found[objective] = run.parent / objective
        words = ("-d", str(lines), "-spm", str(run / "tokenizer.model"), "--out", str(found[objective]))
        done("train", *words, "--objective", objective, "--steps", "12", *SMALL, *HELD)
    return found


# Help


def test_help_names_every_verb_and_fits_in_80_columns() -> None:
    page = done("--help")
    assert page == done()
    assert all(f"  {verb} " in page and summary in page for verb, summary in VERBS.items())
    assert max(map(len, page.splitlines())) <= 80
    assert done("--version").strip().count(".") == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = done(verb, "--help")
    assert page.startswith("usage: scorelm ") and VERBS[verb] in page and "--" in page
    assert "None" not in page and "(default: False)" not in page
    assert max(len(line) for line in page.splitlines() if not line.startswith("usage:")) <= 80


@pytest.mark.parametrize("verb", ["sample", "infill"])
def test_help_lists_what_the_registries_hold(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spiral(turns: float = 2.5, start: float = 0) -> None:
        """From the middle outwards.

        Not shown.
        """

    for registry in (PATHS, SOLVERS, CRITERIA):
        monkeypatch.setitem(registry, f"spiral{len(registry)}", spiral)
    page = done(verb, "--help")
    for registry in (PATHS, SOLVERS, CRITERIA):
        assert all(f"\n  {name}" in page for name in registry)
    assert page.count(":TURNS,START (default: 2.5,0)\n      From the middle outwards.\n") == 3
    assert "Not shown" not in page


def test_help_of_train_shows_the_recipe_that_is_given() -> None:
    assert "(default: 2048)" in done("train", "--help")
    assert "(default: 41)" in done("train", "--recipe", "text8", "--help")


def test_help_of_score_lists_the_paths() -> None:
    page = done("score", "--help")
    assert all(f"\n  {name}" in page for name in PATHS)


# Work


def test_sample_prints_a_line_each_and_the_same_for_the_same_seed(run: Path) -> None:
    words = ("sample", str(run), "-n", "3", "--steps", "8", "--prompt", "Ruth and")
    first = scorelm(*words)
    assert (first.code, first.err) == (0, "")
    assert first.out == done(*words) != done(*words, "--seed", "9")
    texts = first.out.splitlines()
    assert len(texts) == 3 and all(text.startswith("Ruth and") for text in texts)


@pytest.mark.parametrize(
    ("path", "solver"),
    [("uniform", "posterior"), ("ramp:2", "euler"), ("blocks:1", "ancestral:0.5"), ("blocks:4", "posterior")],
)
def test_json_is_the_contract_on_paths_and_solvers(run: Path, path: str, solver: str) -> None:
    words = ("-n", "2", "--steps", "6", "--path", path, "--solver", solver, "--json")
    samples = json.loads(done("sample", str(run / "model"), *words))
    assert [set(s) for s in samples] == [{"text", "ids", "seed", "nfe"}] * 2
    assert [s["seed"] for s in samples] == [0, 1]
    assert all(s["ids"][0] == 0 and s["nfe"] >= 1 for s in samples)
    if path in ("uniform", "ramp:2"):
        assert all(s["nfe"] == 6 and s["ids"][-1] == 1 for s in samples)


@pytest.mark.parametrize("size", ["--blank-tokens", "--blank-words"])
def test_infill_keeps_what_is_given_byte_for_byte(run: Path, size: str) -> None:
    words = ("infill", str(run), "  Saul\n\t____  has \\____ and ____.\n", "-n", "2", "--steps", "5", size, "2")
    samples = json.loads(done(*words, "--json"))
    marked = done(*words, "--mark").removesuffix("\n").split("\n---\n")
    assert len(marked) == 2 and len(done(*words).split("\n---\n")) == 2
    for sample, shown in zip(samples, marked, strict=True):
        assert set(sample) == {"text", "ids", "seed", "nfe", "spans"}
        one, two = (sample["text"][start:end] for start, end in sample["spans"])
        assert sample["text"] == f"  Saul\n\t{one}  has ____ and {two}.\n"
        assert shown == f"  Saul\n\t[{one}]  has ____ and [{two}].\n"
        assert size == "--blank-tokens" or len(one.split()) == len(two.split()) == 2


def test_a_blank_can_have_another_sign(run: Path) -> None:
    out = done("infill", str(run), "Saul has ____ [?] figs.", "--blank", "[?]", "-n", "1", "--steps", "3")
    assert out.startswith("Saul has ____ ") and out.endswith(" figs.\n") and "?" not in out


def test_texts_continue_each_prompt_in_order(run: Path, tmp_path: Path) -> None:
    prompts = ["Ruth and", "\tSaul", "", "Dan"]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf\r\nDan\n")
    words = ("sample", str(run), "--prompt", prompts[0], "--prompt", prompts[1], "-n", "2", "--steps", "4", "--json")
    samples = json.loads(done(*words, "--prompt-file", str(tmp_path / "prompts.txt")))
    assert [sample["prompt"] for sample in samples] == [prompt for prompt in prompts for _ in range(2)]
    assert [sample["seed"] for sample in samples] == list(range(8))
    assert all(sample["text"].startswith(sample["prompt"]) for sample in samples)


def test_temperature_0_prints_the_same_for_every_seed(run: Path) -> None:
    words = ("sample", str(run), "--temperature", "0", "--path", "blocks:1", "-n", "2", "--prompt", "Ruth", "--seed")
    first, second = (done(*words, seed).splitlines() for seed in ("0", "9"))
    assert first == second == [first[0]] * 2


def test_long_work_says_how_far_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scorelm.viz.progress.EVERY", 0.05)
    for verb, *words in (("sample", "--length", "30"), ("infill", "____")):
        code, out, err = scorelm(verb, str(run), *words, "-n", "40", "--steps", "16", "--path", "uniform", "--json")
        assert (code, len(json.loads(out))) == (0, 40)
        shares = [int(share) for share in re.findall(r"writing 40 texts: (\d+)% done", err)]
        assert shares == sorted(shares) and 0 < shares[-1] <= 100


def test_a_film_of_one_batch_of_several_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scorelm.sampling.loop.LOGITS", 2 * 20 * 310)
    words = ("sample", str(run), "-n", "3", "--length", "20", "--steps", "2", "--film", str(tmp_path / "film.html"))
    code, out, err = scorelm(*words)
    assert (code, len(out.splitlines())) == (0, 3)
    assert err == "the film shows 1 of 3 texts: those that were written together last\n"


def test_every_option_of_a_request_runs(run: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.html"
    both = (
        "-n", "2", "--steps", "6", "--json", "--solver", "ancestral", "--temperature", "0.8", "--top-k", "40",
        "--top-p", "0.95", "--self-guidance", "1.2", "--score-temperature", "0.9", "--halt", "entropy:0.01",
        "--best-of", "2", "--choose", "vote", "--seed", "5", "--precision", "auto", "--device", "cpu", "--watch",
    )  # fmt: skip
    sample = (
        "sample", str(run), *both, "--prompt", "Ruth", "--path", "confidence:0.2", "--nats-per-step", "3",
        "--guidance", "1.5", "--length", "20", "--max-length", "24", "--film", str(film),
    )  # fmt: skip
    infill = ("infill", str(run), "Ruth has @ figs.", *both, "--blank", "@")
    repair = (*infill, "--blank-tokens", "2", "--repair", "0.5")
    in_words = (*infill, "--blank-words", "2", "--mark")
    for words, start in ((sample, "Ruth"), (in_words, "Ruth"), (repair, "")):
        code, out, err = scorelm(*words)
        assert (code, err) == (0, "")
        samples = json.loads(out)
        assert len(samples) == 2 and all(s["text"].startswith(start) for s in samples)
        assert [s["seed"] for s in samples] != [0, 1]
    assert "</html>" in film.read_text(encoding="utf-8")
    known = {"-n" if name == "n" else f"--{name.removeprefix('as_').replace('_', '-')}" for name in (
        *Continuation.model_fields, *Infilling.model_fields, *Output.model_fields
    )}  # fmt: skip
    assert known <= {*sample, *in_words, *repair}


def test_without_a_name_it_is_the_model_that_comes_along() -> None:
    lm = ScoreLM.from_pretrained()
    assert lm.provenance.data == "kjv" and lm.provenance.holdout == 0.02
    files = list(EMBEDDED.iterdir())
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {*FILES, "tokenizer.model", "README.md", "recipe.toml"} == {path.name for path in files}
    code, out, _ = scorelm("sample", "--seed", "3", "-n", "1", "--device", "cpu")
    assert (code, out.strip()) == (0, lm.generate(seed=3)[0].text)
    code, out, err = scorelm("infill", "And God said, Let there be ____: and there was light.", "-n", "1")
    assert code == 0 and out.startswith("And God said, Let there be ") and out.endswith(": and there was light.\n")
    assert 1 <= len(out.split()) - 10 <= 3 and "--blank-words N" in err
    code, out, _ = scorelm("info", "--json")
    assert (code, json.loads(out)["parameters"]) == (0, lm.parameters_count)


@pytest.mark.thorough
def test_held_out_verses_cost_the_model_that_comes_along_what_its_card_says() -> None:
    found = json.loads(done("score", "--path", "ordered", "--json", "--device", "cpu"))
    made = ScoreLM.from_pretrained().provenance
    assert found["held_out"] and found["nats_per_token"] == pytest.approx(made.prices["ordered"], abs=1e-3)
    assert f"ordered {made.prices['ordered']:.3f}" in (EMBEDDED / "README.md").read_text()


def test_info_describes_a_model(run: Path) -> None:
    said = done("info", str(run))
    assert "parameters" in said and re.search(r"^tells next token +yes$", said, re.MULTILINE)
    facts = json.loads(done("info", str(run / "model"), "--json"))
    shown = ("dim", "layers", "vocab_size", "max_length", "steps", "objective")
    assert [facts[name] for name in shown] == [32, 2, 310, 32, 30, "score"]


PRICE = {
    "path", "exact", "kind", "nats_per_token", "bits_per_char", "stderr_nats_per_token", "tokens", "nfe",
    "unknown_characters", "terms", "data", "held_out",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "more", "exact", "terms"),
    [
        ("uniform", (), False, {"reconstruction", "diffusion", "prior", "length"}),
        ("blocks:1", ("--draws", "4", "--precision", "auto"), False, {"reconstruction", "diffusion", "prior"}),
        ("confidence", ("--steps", "5", "--seed", "3"), False, {"reconstruction", "diffusion", "length"}),
        ("ordered", ("--device", "cpu"), True, {"reconstruction"}),
        ("reverse", (), True, {"reconstruction", "length"}),
        ("random", ("--draws", "2"), False, {"reconstruction", "length"}),
    ],
)
def test_score_prints_the_contract_on_every_kind_of_path(
    run: Path, path: str, more: tuple[str, ...], exact: bool, terms: set[str]
) -> None:
    code, out, err = scorelm("score", str(run), "--path", path, *more, "--limit", "5", "--json")
    found = json.loads(out)
    assert (code, err) == (0, f"{found['data']}\n") and found["held_out"] is True
    assert found["data"].startswith("the first 5 held-out examples of ") and found["data"].endswith(
        ", none seen in training"
    )
    assert (found.keys(), found["exact"], set(found["terms"])) == (PRICE, exact, terms)
    assert found["nats_per_token"] == pytest.approx(sum(found["terms"].values()))
    assert 0 < found["stderr_nats_per_token"] < found["nats_per_token"] and found["tokens"] > 30


def test_score_prices_all_of_another_file_and_plots(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("Ruth has 3 figs.\nDan has none.\n", encoding="utf-8")
    plot = tmp_path / "integrand.png"
    out = done("score", str(run), "-d", str(tmp_path / "new.txt"), "--plot", str(plot))
    assert out.startswith("uniform: ") and out.splitlines()[0].endswith("bits/character, upper bound")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("objective", "wrong", "priced"), [("autoregressive", "shuffled", "ordered"), ("masked", "uniform", "random")]
)
def test_a_peer_writes_and_is_priced_in_its_own_order_only(
    peers: dict[str, Path], objective: str, wrong: str, priced: str
) -> None:
    model = str(peers[objective])
    assert json.loads(done("info", model, "--json"))["objective"] == objective
    samples = json.loads(done("sample", model, "--prompt", "Ruth and", "-n", "2", "--json"))
    assert all(sample["text"].startswith("Ruth and") for sample in samples)
    assert json.loads(done("score", model, "--limit", "3", "--json"))["path"] == priced
    for verb in ("sample", "score"):
        code, _, err = scorelm(verb, model, "--path", wrong)
        assert code == 2 and wrong in err and err.count("\n") == 1


def test_a_masked_model_fills_in_and_an_autoregressive_one_says_that_it_cannot(peers: dict[str, Path]) -> None:
    words = ("Saul ____ has ____.", "--blank-tokens", "3", "-n", "1")
    assert done("infill", str(peers["masked"]), *words).startswith("Saul")
    code, _, err = scorelm("infill", str(peers["autoregressive"]), *words)
    assert code == 2 and "fill" in err


@pytest.mark.thorough
def test_eval_writes_one_report(
    run: Path, peers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objective, "shown_budgets", (2, 4))
    page = tmp_path / "report.html"
    out = done(
        "eval", str(run), "--judge", str(peers["autoregressive"]), "-n", "4", "--steps", "4", "--holdout", "0.2",
        "--limit", "12", "--precision", "float32", "--device", "cpu", "--report", str(page),
    )  # fmt: skip
    for word in ("ordered", "real text", "unigram sampler", "perplexity", "mauve"):
        assert word in out
    heads, model, *_ = lines = out.split("\n\n")[1].splitlines()
    assert "top-p 0.95" in model and len({len(line) for line in lines if not line.startswith("note: ")}) == 1
    assert heads.split()[0] in ("entropy", "perplexity")
    report = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    parts = {"model", "judge", "settings", "prices", "table", "frontier", "effort", "samples", "notes"}
    assert parts | {"data", "held_out"} == report.keys() and report["held_out"] is True
    assert "</html>" in page.read_text(encoding="utf-8")


def test_flags_override_a_recipe_its_budget_too(lines: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[data]\nvocab_size = 300\n[training]\nminutes = 9.0\nrows = 4\nlr = 0.25\n", encoding="utf-8")
    out = tmp_path / "run"
    words = ("--steps", "2", "--model.dim", "32", "--model.layers", "1", "--lr", "0.001")
    done("train", "--recipe", str(recipe), "--out", str(out), "--data", str(lines), *words)
    kept = load_recipe(str(out / "recipe.toml"))
    assert (kept.data.vocab_size, kept.training.rows, kept.training.lr) == (300, 4, 0.001)
    assert (kept.training.steps, kept.training.minutes) == (2, None)
    done("train", "--out", str(out), "--resume", "--steps", "3")
    assert load_recipe(str(out / "recipe.toml")).training.steps == 3


def test_a_tokenizer_is_replaced_only_if_told(lines: Path, tmp_path: Path) -> None:
    words, target = ("tokenizer", "-d", str(lines), "--out", str(tmp_path / "new" / "spm")), tmp_path / "new" / "spm"
    done(*words, "--vocab-size", "310")
    made = (target / "tokenizer.model").read_bytes()
    assert scorelm(*words, "--vocab-size", "320").code == 2
    assert (target / "tokenizer.model").read_bytes() == made
    done(*words, "--vocab-size", "320", "--overwrite")
    assert (target / "tokenizer.model").read_bytes() != made


def test_a_tokenizer_of_characters_has_those_of_the_text(lines: Path, tmp_path: Path) -> None:
    made = scorelm("tokenizer", "-d", str(lines), "--vocab-size", "characters", "--out", str(tmp_path))
    count = len(set(lines.read_text(encoding="utf-8")) - {"\n"}) + 4
    assert made.code == 0 and f"tokenizer.model: {count} tokens" in made.err


def test_a_run_that_has_ended_goes_on_by_what_is_added(run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    ended = scorelm("train", "--out", str(out), "--resume")
    assert ended.code == 0 and "is finished, after 30 steps: nothing is changed" in ended.err
    for added in (("--minutes", "0.002"), ("--steps", "1000000", "--minutes", "1"), ("--minutes", "0.002")):
        assert scorelm("train", "--out", str(out), "--resume", *added).code == (2 if len(added) > 2 else 0)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] > 0.24
    assert load_recipe(str(out / "recipe.toml")).training.minutes > 0.004


@pytest.mark.thorough
def test_a_second_demo_replaces_the_first_only_if_told(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    words = ("demo", "--out", str(out), "--minutes", "0.005", "--device", "cpu")
    assert "And God said" in done(*words)
    (out / "notes.txt").write_text("mine")
    films = [tmp_path / "demo-verses.html", tmp_path / "demo-blank.html"]
    before = [film.read_bytes() for film in films]
    assert all(b"</html>" in film for film in before) and before[0] != before[1]
    assert scorelm(*words).code == 2 and [film.read_bytes() for film in films] == before
    shutil.move(out, tmp_path / "elsewhere")
    refused = scorelm(*words)
    assert refused.code == 2 and not refused.out and "demo-verses.html exists" in refused.err
    shutil.move(tmp_path / "elsewhere", out)
    replaced = scorelm(*words, "--overwrite")
    assert replaced.code == 0 and "what is not its own stays: notes.txt" in replaced.err
    assert (out / "notes.txt").read_text() == "mine" and [film.read_bytes() for film in films] == before


# What a user can cause


TRAIN = ("train", "--steps", "2", "--out", "out/run", "--data")
ALL_KEPT = ("--data.holdout", "0")
BAD = {
    "missing file": ((*TRAIN, "{folder}/none.txt"), "none.txt"),
    "empty corpus": ((*TRAIN, "{folder}/empty.txt"), "empty"),
    "not UTF-8": ((*TRAIN, "{folder}/latin.txt"), "UTF-8"),
    "vocabulary too large": ((*TRAIN, "{folder}/few.txt", "--vocab-size", "9000", *ALL_KEPT), "9000"),
    "no size of a vocabulary": ((*TRAIN, "{folder}/few.txt", "--vocab-size", "0"), "a number above 0, or characters"),
    "unknown extension": ((*TRAIN, "{folder}/odd.xyz"), "odd.xyz"),
    "no dataset named": (("info", "--hub-split", "test"), "name it"),
    "missing column": ((*TRAIN, "{folder}/rows.jsonl"), "body"),
    "bad tokenizer": ((*TRAIN, "kjv", "--tokenizer", "{folder}/few.txt"), "few.txt"),
    "no place for a run": (("train", "--out", "{folder}/few.txt/run", "--data", "{folder}/few.txt"), "few.txt"),
    "no place for a tokenizer": (("tokenizer", "--out", "{folder}/few.txt/spm", "-d", "{folder}/few.txt"), "few.txt"),
    "no device to train on": (
        (*TRAIN, "{folder}/few.txt", "--vocab-size", "290", *ALL_KEPT, "--device", "abacus"),
        "abacus",
    ),
    "unknown recipe": (("train", "--out", "out/run", "--recipe", "nonesuch"), "nonesuch"),
    "run exists": (("train", "--out", "{run}"), "--resume"),
    "nothing to resume": (("train", "--out", "void", "--resume"), "nothing to resume"),
    "falling back from nothing": (("train", "--out", "void", "--fall-back"), "--resume"),
    "another model resumed": (("train", "--out", "{run}", "--resume", "--model.dim", "64"), "model"),
    "two budgets": (("train", "--out", "out/run", "--steps", "3", "--minutes", "1"), "either"),
    "a run where a demo is to be": (("demo", "--out", "{run}"), "--overwrite"),
    "other rows resumed": (("train", "--out", "{run}", "--resume", "--rows", "4"), "--rows can't change"),
    "another recipe resumed": (("train", "--out", "{run}", "--resume", "--recipe", "demo"), "--recipe"),
    "steps that are made": (
        ("train", "--out", "{run}", "--resume", "--steps", "30"),
        "--steps 30: the run has made 30",
    ),
    "replaced and resumed": (("train", "--out", "{run}", "--resume", "--overwrite"), "--overwrite"),
    "tokenizer exists": (("tokenizer", "--out", "{run}", "-d", "{folder}/few.txt"), "--overwrite"),
    "no text for a tokenizer": (("tokenizer", "--out", "out/spm", "-d", "{folder}/none.txt"), "none.txt"),
    "prompt too long": (("sample", "{run}", "--prompt", "Ruth " * 50), "tokens"),
    "length too long": (("sample", "{run}", "--length", "99"), "99"),
    "no model": (("sample", "{folder}/nowhere"), "nowhere"),
    "another shape": (("sample", "{folder}/shape"), "model.safetensors"),
    "damaged weights": (("sample", "{folder}/damaged"), "model.safetensors"),
    "no device": (("sample", "{run}", "--device", "abacus"), "abacus"),
    "no blank": (("infill", "{run}", "no blank here"), "____"),
    "no blank of that sign": (("infill", "{run}", "a ____", "--blank", "@"), "write @"),
    "too many words": (("infill", "{run}", "a ____", "--blank-words", "99"), "tokens"),
    "no text to fill in": (("infill",), "text"),
    "a model to fill in": (("infill", "{run}"), "is a directory: give a text too"),
    "text without quotes": (("infill", "{run}", "And", "____"), "quotes"),
    "no text to price": (("score", "{run}", "-d", "{folder}/empty.txt"), "empty"),
    "nothing to plot": (("score", "{run}", "--path", "ordered", "--limit", "2", "--plot", "{folder}/a.png"), "ordered"),
    "no judge": (("eval", "{run}", "--judge", "{folder}/nobody"), "nobody"),
    "a judge of another kind": (("eval", "{run}", "--judge", "{run}"), "judge"),
    "unknown verb": (("dance",), "dance"),
}
"""Command, and a word of the message."""

BEFORE = {
    "no samples": (("sample", "-n", "0"), "n:"),
    "no evaluations": (("sample", "--steps", "0"), "steps"),
    "bad path": (("sample", "--path", "zigzag"), "zigzag"),
    "bad number": (("sample", "--path", "blocks:half"), "half"),
    "bad solver": (("sample", "--solver", "ancestral:7"), "ancestral"),
    "bad temperature": (("sample", "--temperature", "-1"), "temperature"),
    "no prompts": (("sample", "--prompt-file", "{folder}/nil.txt"), "nil.txt is empty"),
    "missing prompts": (("sample", "--prompt-file", "{folder}/none.txt"), "none.txt"),
    "prompts in a directory": (("sample", "--prompt-file", "{folder}"), "directory"),
    "prompts not in UTF-8": (("sample", "--prompt-file", "{folder}/latin.txt"), "latin.txt is not UTF-8"),
    "prompts from a pipe": (("sample", "--prompt-file", "/dev/zero"), "/dev/zero"),
    "two sizes of a blank": (("infill", "A ____.", "--blank-tokens", "2", "--blank-words", "2"), "not both"),
    "no sign of a blank": (("infill", "A ____.", "--blank", ""), "blank"),
    "nothing to mark": (("infill", "A.", "--repair", "0.5", "--mark"), "--mark"),
    "bad seed": (("sample", "--seed", "-1"), "seed"),
    "bad halting": (("sample", "--halt", "never"), "never"),
    "no score": (("sample", "--score-temperature", "0.5"), "temperature"),
    "nats on another path": (("sample", "--path", "uniform", "--nats-per-step", "1"), "nats"),
    "bad film": (("sample", "--film", "film.avi"), "film.avi"),
    "no place for a film": (("sample", "--film", "{folder}/none/film.html"), "none"),
    "bad path to infill": (("infill", "{folder}/nowhere", "A ____.", "--path", "zigzag"), "zigzag"),
    "bad repair": (("infill", "{folder}/nowhere", "A.", "--repair", "1"), "repair"),
    "repair in blocks": (("infill", "{folder}/nowhere", "A.", "--repair", "0.5", "--path", "blocks:2"), "repair"),
    "bad order": (("score", "--path", "sideways"), "sideways"),
    "order with steps": (("score", "--path", "random", "--steps", "4"), "steps"),
    "path without a price": (("score", "--path", "remask"), "no price"),
    "no draws": (("score", "--draws", "0"), "draws"),
    "bad limit": (("score", "--limit", "0"), "limit"),
    "bad share": (("score", "--holdout", "1"), "holdout"),
    "bad plot": (("score", "--plot", "a.doc"), "a.doc"),
    "one sample to judge": (("eval", "-n", "1"), "n:"),
    "bad report": (("eval", "--report", "a.pdf"), "a.pdf"),
}
"""The same, for what is refused before a model is loaded: there is none where the command is given."""


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bad files."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in {
        "empty.txt": b"\n  \n", "latin.txt": b"caf\xe9\n" * 50,
        "few.txt": b"one two three\n" * 5, "nil.txt": b"", "odd.xyz": b"x",
        "rows.jsonl": b'{"body": "a"}\n{"body": "b"}\n',
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    for name in ("shape", "damaged"):
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.model"):
            (folder / name / file).write_bytes((run / "model" / file).read_bytes())
    config = json.loads((folder / "shape" / "config.json").read_text())
    config["model"]["dim"] = 64
    (folder / "shape" / "config.json").write_text(json.dumps(config))
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.mark.parametrize("kind", [*BAD, *BEFORE])
def test_bad_input_gets_one_line_and_exit_code_2(
    run: Path, folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, word = (BAD | BEFORE)[kind]
    code, out, err = scorelm(*(w.format(run=run, folder=folder) for w in words))
    *before, message = err.splitlines()
    assert (code, out) == (2, ""), err
    assert message.startswith("scorelm: ") and word in message
    assert not before or words[0] == "train"  # what it was doing
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_is_refused_with_the_nearest_right_one() -> None:
    code, _, err = scorelm("sample", "--tempertaure", "1")
    assert code == 2 and "tempertaure" in err and "--temperature" in err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("no such thing"), 2, "no such thing"),
        (DiskError("cannot write x: no space"), 1, "cannot write x"),
        (MemoryError(), 1, "not enough memory: use a smaller model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "not enough"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_no_bug_gets_one_line(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(verb: InfoVerb) -> int:
        raise error

    monkeypatch.setattr(InfoVerb, "run", run)
    done = scorelm("info")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"scorelm: {says}") and done.err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("x"), FloatingPointError("x")])
def test_a_bug_shows_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(verb: InfoVerb) -> int:
        raise error

    monkeypatch.setattr(InfoVerb, "run", run)
    with pytest.raises(type(error), match="x"):
        main(["info"])


def test_ctrl_c_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InfoVerb, "run", lambda verb: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert scorelm("info") == Done(130, "", "scorelm: interrupted\n")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("missing", "judge"), [("sacrebleu", ()), ("mauve", ("--judge", "none"))])
def test_what_a_report_needs_is_asked_for_before_anything_is_measured(
    missing: str, judge: tuple[str, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scorelm.evaluation.diversity.find_spec", lambda name: None if name == missing else name)
    code, out, err = scorelm("eval", str(run), *judge)
    assert (code, out) == (2, "") and err.startswith(f"scorelm: {missing}") and "pip install 'scorelm[eval]'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("bar", ["0", "1"])
def test_ctrl_c_keeps_the_texts_that_are_written(run: Path, bar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in the third part of five; the texts of the first two are printed, behind the bar of a terminal too."""
    monkeypatch.setenv("TTY_COMPATIBLE", bar)
    monkeypatch.setattr("scorelm.cli.output.PART", 2)
    words = ("sample", str(run), "-n", "5", "--prompt", "R", "--prompt", "S", "--steps", "2")
    every = json.loads(done(*words, "--json"))
    generate = ScoreLM.generate

    def interrupted(*how: str) -> Done:
        calls = count()

        def write(lm: ScoreLM, *args: object, **options: object) -> object:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return generate(lm, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(ScoreLM, "generate", write)
        return scorelm(*words, *how)

    code, out, err = interrupted("--json")
    assert (code, json.loads(out)) == (130, every[:4]) and err.endswith("scorelm: interrupted\n")
    assert ("━" in err) == (bar == "1")
    assert interrupted().out.splitlines() == [text["text"] for text in every[:4]]


def test_a_prompt_that_does_not_fit_is_refused_before_any_text_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scorelm.cli.output.PART", 1)
    monkeypatch.setattr(ScoreLM, "generate", None)
    (tmp_path / "prompts.txt").write_text("Ruth\n" + 99 * "Ruth ")
    code, out, err = scorelm("sample", str(run), "--prompt-file", str(tmp_path / "prompts.txt"))
    assert (code, out) == (2, "") and "the prompt takes" in err


# What only a process has


@pytest.mark.thorough
def test_results_go_to_stdout_and_complaints_to_stderr(run: Path) -> None:
    good = process("sample", str(run), "-n", "1", "--steps", "2", "--json")
    bad = process("dance")
    out, err = good.communicate()
    assert (good.returncode, err) == (0, "") and len(json.loads(out)) == 1
    out, err = bad.communicate()
    assert (bad.returncode, out) == (2, "") and err.startswith("scorelm: ") and err.count("\n") == 1


def test_a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    gone = process("--help", stdout=writing)
    os.close(writing)
    assert (gone.communicate()[1], gone.returncode) == ("", 141)
    with open("/dev/full", "w") as full:
        filled = process("--help", stdout=full)
    err = filled.communicate()[1]
    assert filled.returncode == 1 and err.startswith("scorelm: cannot write the output: No space") and err[-1] == "\n"
    assert err.count("\n") == 1


def test_help_imports_next_to_nothing() -> None:
    code = (
        "import sys\ntry:\n  from scorelm.cli import main; main(['--help'])\nfinally:\n"
        "  print(*{'torch', 'datasets', 'numpy', 'pydantic', 'tyro'} & set(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == "\n"


def test_a_policy_of_waiting_is_set_unless_the_user_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for given in (None, *names):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(given, "7")
        let_waiting_threads_sleep()
        assert {name: os.environ.get(name) for name in names if name in os.environ} == (
            {"GOMP_SPINCOUNT": "1000"} if given is None else {given: "7"}
        )

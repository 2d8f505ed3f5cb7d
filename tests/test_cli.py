"""The command line in real processes: what it prints, where, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

VERBS = ("demo", "train", "tokenizer", "sample", "infill", "score", "eval", "info")


def scorelm(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scorelm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("Ruth", "Saul", "Amos", "Leah", "Dan")
    text = [
        f"{a} and {b} have {k} figs, and {c} has none." for a in names for b in names for c in names for k in (1, 23)
    ]
    path = tmp_path_factory.mktemp("cli") / "lines.txt"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(lines: Path) -> Path:
    """A run made with the reference project's flag names."""
    folder = lines.parent
    made = scorelm("tokenizer", "-d", str(lines), "--vocab-size", "310", "--out", str(folder / "spm"))
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    assert (folder / "spm" / "tokenizer.model").is_file()
    flags = ["--steps", "30", "--model.dim", "32", "--model.layers", "2", "--max-length", "32", "--rows", "8"]
    out = folder / "run"
    done = scorelm(
        "train", "-d", str(lines), "-spm", str(folder / "spm" / "tokenizer.model"), "-mdir", str(out), *flags
    )
    assert done.returncode == 0, done.stderr
    assert "scorelm sample" in done.stderr
    return out


def test_help_names_every_verb_and_every_verb_has_help() -> None:
    overview = scorelm("--help")
    assert overview.returncode == 0
    for verb in VERBS:
        assert verb in overview.stdout
        page = scorelm(verb, "--help")
        assert page.returncode == 0
        assert "--" in page.stdout
    assert scorelm("--version").stdout.strip().count(".") == 2


def test_sample_prints_a_line_each_and_the_same_for_the_same_seed(run: Path) -> None:
    arguments = ("sample", str(run), "-n", "3", "--steps", "8", "--prompt", "Ruth and")
    first, second = scorelm(*arguments), scorelm(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert first.stdout == second.stdout
    texts = first.stdout.splitlines()
    assert len(texts) == 3
    assert all(text.startswith("Ruth and") for text in texts)
    assert scorelm(*arguments, "--seed", "9").stdout != first.stdout


@pytest.mark.parametrize(
    ("path", "solver"),
    [("uniform", "posterior"), ("ramp:2", "euler"), ("blocks:1", "ancestral:0.5"), ("blocks:4", "posterior")],
)
def test_json_is_the_contract_on_paths_and_solvers(run: Path, path: str, solver: str) -> None:
    done = scorelm(
        "sample", str(run / "model"), "-n", "2", "--steps", "6", "--path", path, "--solver", solver, "--json"
    )
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)
    assert [set(s) for s in samples] == [{"text", "ids", "seed", "nfe"}] * 2
    assert [s["seed"] for s in samples] == [0, 1]
    assert all(s["ids"][0] == 0 and s["nfe"] >= 1 for s in samples)
    if path in ("uniform", "ramp:2"):
        assert all(s["nfe"] == 6 and s["ids"][-1] == 1 for s in samples)


def test_infill_keeps_what_is_given(run: Path) -> None:
    done = scorelm(
        "infill", str(run), "Saul ____ has ____.", "-n", "2", "--steps", "5", "--json", "--blank-tokens", "3"
    )
    assert done.returncode == 0, done.stderr
    for sample in json.loads(done.stdout):
        assert sample["text"].startswith("Saul")
        assert sample["text"].endswith(".")
        assert "has" in sample["text"]
        assert "_" not in sample["text"]


def test_every_option_of_generation_runs(run: Path, tmp_path: Path) -> None:
    done = scorelm(
        "sample", str(run), "-n", "2", "--steps", "6", "--prompt", "Ruth", "--json", "--path", "confidence:0.2",
        "--solver", "ancestral", "--temperature", "0.8", "--top-k", "40", "--top-p", "0.95", "--guidance", "1.5",
        "--self-guidance", "1.2", "--score-temperature", "0.9", "--halt", "entropy:0.01", "--best-of", "2",
        "--choose", "vote", "--film", str(tmp_path / "film.html"), "--watch",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    samples = json.loads(done.stdout)
    assert len(samples) == 2 and all(s["text"].startswith("Ruth") for s in samples)
    assert "</html>" in (tmp_path / "film.html").read_text(encoding="utf-8")


def test_info_describes_a_model(run: Path) -> None:
    assert "parameters" in scorelm("info", str(run)).stdout
    facts = json.loads(scorelm("info", str(run / "model"), "--json").stdout)
    assert (facts["dim"], facts["layers"], facts["vocab_size"], facts["max_length"], facts["steps"]) == (
        32,
        2,
        310,
        32,
        30,
    )


PRICE = {"path", "exact", "nats_per_token", "bits_per_char", "stderr_nats_per_token", "tokens", "nfe", "terms"}


@pytest.mark.parametrize(
    ("path", "more", "exact", "terms"),
    [
        ("uniform", (), False, {"reconstruction", "diffusion", "prior", "length"}),
        ("blocks:1", ("--draws", "4"), False, {"reconstruction", "diffusion", "prior"}),
        ("confidence", ("--steps", "5"), False, {"reconstruction", "diffusion", "length"}),
        ("ordered", (), True, {"reconstruction"}),
        ("reverse", (), True, {"reconstruction", "length"}),
        ("random", (), True, {"reconstruction", "length"}),
    ],
)
def test_score_prints_the_contract_on_every_kind_of_path(
    run: Path, path: str, more: tuple[str, ...], exact: bool, terms: set[str]
) -> None:
    done = scorelm("score", str(run), "--path", path, *more, "--limit", "5", "--holdout", "0.1", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = json.loads(done.stdout)
    assert (found.keys(), found["exact"], set(found["terms"])) == (PRICE, exact, terms)
    assert found["nats_per_token"] == pytest.approx(sum(found["terms"].values()))
    assert 0 < found["stderr_nats_per_token"] < found["nats_per_token"] and found["tokens"] > 30


def test_score_prices_all_of_another_file_and_plots(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("Ruth has 3 figs.\nDan has none.\n", encoding="utf-8")
    plot = tmp_path / "integrand.png"
    done = scorelm("score", str(run), "-d", str(tmp_path / "new.txt"), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "uniform (bound)" in done.stdout and "bits/character" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="session")
def peers(run: Path, lines: Path) -> dict[str, Path]:
    """An autoregressive and a masked run on the same text and tokenizer."""
    found = {}
    for objective in ("autoregressive", "masked"):
        found[objective] = run.parent / objective
        flags = ["--steps", "12", "--model.dim", "32", "--model.layers", "2", "--max-length", "32", "--rows", "8"]
        done = scorelm(
            "train", "-d", str(lines), "-spm", str(run / "tokenizer.model"), "--out", str(found[objective]),
            "--objective", objective, *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize(
    ("objective", "wrong", "priced"), [("autoregressive", "shuffled", "ordered"), ("masked", "uniform", "random")]
)
def test_a_peer_writes_and_is_priced_in_its_own_order_alone(
    peers: dict[str, Path], objective: str, wrong: str, priced: str
) -> None:
    model = str(peers[objective])
    assert json.loads(scorelm("info", model, "--json").stdout)["objective"] == objective
    done = scorelm("sample", model, "--prompt", "Ruth and", "-n", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert all(sample["text"].startswith("Ruth and") for sample in json.loads(done.stdout))
    assert json.loads(scorelm("score", model, "--limit", "3", "--json").stdout)["path"] == priced
    for verb in ("sample", "score"):
        refused = scorelm(verb, model, "--path", wrong)
        assert refused.returncode == 2 and wrong in refused.stderr and refused.stderr.count("\n") == 1


def test_a_masked_model_fills_in_and_an_autoregressive_one_says_that_it_cannot(peers: dict[str, Path]) -> None:
    done = scorelm("infill", str(peers["masked"]), "Saul ____ has ____.", "--blank-tokens", "3", "-n", "1")
    assert done.returncode == 0 and done.stdout.startswith("Saul")
    refused = scorelm("infill", str(peers["autoregressive"]), "Saul ____ has ____.")
    assert refused.returncode == 2 and "fill" in refused.stderr


def test_eval_writes_one_report(run: Path, peers: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = scorelm(
        "eval", str(run), "--judge", str(peers["autoregressive"]), "-n", "4", "--steps", "4", "--holdout", "0.2",
        "--limit", "12", "--report", str(page),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("ordered", "real text", "unigram sampler", "perplexity", "mauve"):
        assert word in done.stdout
    report = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert {"model", "judge", "settings", "prices", "table", "frontier", "effort", "samples"} == report.keys()
    assert "</html>" in page.read_text(encoding="utf-8")


def bad_inputs(run: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    """Command and a word of the message for every kind of bad input."""
    for name, content in {
        "empty.txt": b"\n  \n", "latin.txt": b"caf\xe9\n" * 50, "long.txt": b"word " * 400 + b"\n",
        "few.txt": b"one two three\n" * 5, "odd.xyz": b"x", "rows.jsonl": b'{"body": "a"}\n{"body": "b"}\n',
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    train = ["train", "--steps", "2", "--out", str(folder / "out"), "--data"]
    for name in ("shape", "damaged"):
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.model"):
            (folder / name / file).write_bytes((run / "model" / file).read_bytes())
    config = json.loads((folder / "shape" / "config.json").read_text())
    config["model"]["dim"] = 64
    (folder / "shape" / "config.json").write_text(json.dumps(config))
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {
        "missing file": ([*train, str(folder / "none.txt")], "none.txt"),
        "empty corpus": ([*train, str(folder / "empty.txt")], "empty"),
        "not UTF-8": ([*train, str(folder / "latin.txt")], "UTF-8"),
        "only long lines": ([*train, str(folder / "long.txt"), "--vocab-size", "280", "--data.holdout", "0"], "max"),
        "vocabulary too large": (
            [*train, str(folder / "few.txt"), "--vocab-size", "9000", "--data.holdout", "0"],
            "9000",
        ),
        "unknown extension": ([*train, str(folder / "odd.xyz")], "odd.xyz"),
        "missing column": ([*train, str(folder / "rows.jsonl")], "body"),
        "unknown recipe": (["train", "--out", str(folder / "out"), "--recipe", "nonesuch"], "nonesuch"),
        "run exists": (["train", "--out", str(run)], "--resume"),
        "nothing to resume": (["train", "--out", str(folder / "void"), "--resume"], "nothing to resume"),
        "two budgets": (["train", "--out", str(folder / "out"), "--steps", "3", "--minutes", "1"], "either"),
        "prompt too long": (["sample", str(run), "--prompt", "Ruth " * 50], "tokens"),
        "length too long": (["sample", str(run), "--length", "99"], "99"),
        "bad path": (["sample", str(run), "--path", "zigzag"], "zigzag"),
        "bad solver": (["sample", str(run), "--solver", "ancestral:7"], "ancestral"),
        "bad temperature": (["sample", str(run), "--temperature", "0"], "temperature"),
        "bad film": (["sample", str(run), "--film", "film.avi"], "film.avi"),
        "bad halting": (["sample", str(run), "--halt", "never"], "never"),
        "no score": (["sample", str(run), "--score-temperature", "0.5"], "temperature"),
        "no blank": (["infill", str(run), "no blank here"], "____"),
        "no model": (["sample", str(folder / "nowhere")], "nowhere"),
        "another shape": (["sample", str(folder / "shape")], "model.safetensors"),
        "damaged weights": (["sample", str(folder / "damaged")], "model.safetensors"),
        "unknown verb": (["dance"], "dance"),
        "bad order": (["score", str(run), "--path", "sideways"], "sideways"),
        "order with steps": (["score", str(run), "--path", "random", "--steps", "4"], "steps"),
        "path without a price": (["score", str(run), "--path", "remask"], "no price"),
        "no text to price": (["score", str(run), "--limit", "0"], "limit"),
        "nothing to plot": (["score", str(run), "--path", "ordered", "--limit", "2", "--plot", "a.png"], "ordered"),
        "bad plot": (["score", str(run), "--plot", "a.doc"], "a.doc"),
        "bad report": (["eval", str(run), "--report", "a.pdf"], "a.pdf"),
        "no judge": (["eval", str(run), "--judge", str(folder / "nobody")], "nobody"),
        "a judge of another kind": (["eval", str(run), "--judge", str(run)], "judge"),
        "nats on another path": (["sample", str(run), "--path", "uniform", "--nats-per-step", "1"], "nats"),
        "bad tokenizer": ([*train, "kjv", "--tokenizer", str(folder / "few.txt")], "few.txt"),
    }


@pytest.fixture(scope="module")
def bad(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], str]]:
    return bad_inputs(run, tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("kind", [
    "missing file", "empty corpus", "not UTF-8", "only long lines", "vocabulary too large", "unknown extension",
    "missing column", "unknown recipe", "run exists", "nothing to resume", "two budgets", "prompt too long",
    "length too long", "bad film", "bad halting", "no score",
    "bad path", "bad solver", "bad temperature", "no blank", "no model", "another shape",
    "damaged weights", "unknown verb", "bad tokenizer", "bad order", "order with steps", "path without a price",
    "no text to price", "nothing to plot", "bad plot", "bad report", "no judge", "a judge of another kind",
    "nats on another path",
])  # fmt: skip
def test_bad_input_gets_one_line_and_exit_code_2(bad: dict[str, tuple[list[str], str]], kind: str) -> None:
    arguments, word = bad[kind]
    done = scorelm(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("scorelm: ")
    assert word in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 2


def test_an_unknown_flag_is_refused_with_code_2() -> None:
    done = scorelm("sample", "--tempertaure", "1")
    assert done.returncode == 2
    assert "tempertaure" in done.stderr

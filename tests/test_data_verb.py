"""``scorelm data``: what it prints, as a page and as JSON, of many kinds of sources, and what it refuses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from scorelm.cli import main
from scorelm.config.recipe import Recipe
from scorelm.config.text import DataConfig
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.training.proposal import propose

DOCS = Path(__file__).parents[1] / "docs" / "text.md"
SIZES = ("--vocab-size", "320", "--max-length", "32")
NAMES = ("Ruth", "Saul", "Amos", "Leah", "Dan")
LINES = [f"{a} and {b} have {k} figs, and {c} has none." for a in NAMES for b in NAMES for c in NAMES for k in (1, 23)]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the verb in a directory with a few texts, at 80 columns, and checks that the directory stays as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("lines.txt").write_text("\n".join(LINES), encoding="utf-8")
    rows = [{"body": text} for text in [*LINES, LINES[0].upper(), LINES[0], "[red]odd[/red] \x1b[31m " * 9, " "]]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"[i]title": "x"}])), encoding="utf-8")
    Path("rows.csv").write_text(
        "n|text\n" + "\n".join(f"{k}|{text} So." for k, text in enumerate(LINES)), encoding="utf-8"
    )
    Path("many").mkdir()
    Path("many", "a.txt").write_text("\n".join(LINES[:9] * 3), encoding="utf-8")
    Path("many", "b.bin").write_bytes(bytes(range(256)))
    before = sorted(tmp_path.rglob("*"))

    def run(*words: str) -> SimpleNamespace:
        with pytest.raises(SystemExit) as ended:
            main(["data", *words])
        assert sorted(tmp_path.rglob("*")) == before
        return SimpleNamespace(code=ended.value.code, **capsys.readouterr()._asdict())

    return run


def facts(done: SimpleNamespace) -> dict:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_the_page_fits_in_80_columns_and_says_what_is_there(ask) -> None:
    done = ask("rows.jsonl", "--field", "body", *SIZES)
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80
    page = " ".join(done.out.split())
    for words in (
        "records 255, 1 without the field", "fields body, [i]title", "examples 253: ", "blank 1, left out",
        "duplicates 1 exact, 1 more but for case and spaces", f"most often 2 x {LINES[0]}", "Rows of 32 tokens",
        "> 32 ", "tokenizer of 320 tokens, as training would make it", "unknown none, and every character comes back",
        "[red]odd[/red] \\x1b[31m", "What a run on this text would be: scorelm info rows.jsonl --field body",
    ):  # fmt: skip
        assert words in page, words
    assert "\x1b" not in done.out and "█" in done.out


def test_json_is_the_contract_that_the_documentation_gives(ask) -> None:
    found = facts(ask("lines.txt", "--json", *SIZES))
    table = DOCS.read_text(encoding="utf-8").partition("## What a text is like")[2].partition("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(found)
    for name in ("characters", "packing", "vocabulary", "longest", "most_repeated"):
        inner = found[name][0] if isinstance(found[name], list) and found[name] else found[name]
        assert all(f"`{key}`" in table for key in inner), name
    assert (found["name"], found["examples"], found["max_length"], found["tokenizer"]) == ("lines", 250, 32, None)
    assert found["train"] + found["heldout"] == 250 and found["vocabulary"]["size"] == 320
    assert found["notes"] == ["lines: 250 examples, 0 empty, 0 duplicates"]


@pytest.mark.thorough
def test_every_option_of_a_text_is_taken_as_in_training(ask, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    SentencePieceTokenizer.train(LINES, 300).save(tokenizer)
    plain = facts(ask("rows.csv", "--csv-separator", "|", "--holdout", "0", "--json", *SIZES))
    assert plain["fields"] == ["n", "text"] and plain["heldout"] == 0 and plain["vocabulary"]["byte_share"] == 0
    for words, check in (
        (("--field", "n", "--vocab-size", "characters"), lambda found: found["characters"]["max"] == 3),
        (("--split", "sentence-window:10,0"), lambda found: found["examples"] == 500),
        (("--holdout", "0.5"), lambda found: found["heldout"] > 90),
        (("--tokenizer", str(tokenizer)), lambda found: found["vocabulary"]["size"] == 300),
        (("--vocab-size", "60", "--no-byte-fallback"), lambda found: not found["vocabulary"]["unused_bytes"]),
        (("--normalize", "lower"), lambda found: "So" not in str(found["vocabulary"]["commonest"])),
        (("--max-length", "16"), lambda found: found["packing"][0]["width"] == 16 and found["packing"][0]["longer"]),
    ):
        found = facts(ask("rows.csv", "--csv-separator", "|", "--json", *SIZES, *words))
        assert check(found) and not check(plain), words


@pytest.mark.thorough
def test_what_is_not_given_is_what_training_would_choose(ask) -> None:
    found, chosen = facts(ask("lines.txt", "--json")), propose(Recipe(data=DataConfig(source="lines.txt"))).recipe.data
    assert (found["vocabulary"]["size"], found["max_length"]) == (chosen.vocab_size, chosen.max_length)
    assert chosen.vocab_size != DataConfig().vocab_size
    assert facts(ask("lines.txt", "--json", "--max-length", "20"))["max_length"] == 20


def test_a_directory_says_what_it_leaves_out_and_one_line_is_a_text(ask, tmp_path_factory) -> None:
    done = ask("many", *SIZES[2:], "--vocab-size", "characters")
    assert done.code == 0 and "left out: b.bin (no text format)" in done.out and "18 exact" in done.out
    line = tmp_path_factory.mktemp("one") / "one.txt"
    line.write_text("The quick brown fox jumps over the lazy dog.\n", encoding="utf-8")
    done = ask(str(line), *SIZES[2:], "--vocab-size", "characters", "--holdout", "0")
    assert done.code == 0 and "examples    1: 1 to train on, 0 held out" in done.out and "most often" not in done.out


def test_long_work_says_how_far_it_is_and_leaves_stdout_alone(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scorelm.viz.progress.EVERY", 0.02)
    done = ask("lines.txt", "--json", *SIZES)
    shares = [int(share) for share in re.findall(r"lines.txt: [\w ]+: (\d+)% done", done.err)]
    assert shares == sorted(shares) and 40 <= shares[-1] < 100 and facts(done)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("absent.txt",), "absent.txt does not exist"),
        (("rows.jsonl", *SIZES), "rows.jsonl has no field 'text'|rows has no field 'text'"),
        (("lines.txt", "--holdout", "1"), "holdout: "),
        (("lines.txt", "--split", "verse"), "verse"),
        (("lines.txt", "--max-length", "2"), "max_length: |max-length: "),
        (("lines.txt", "--vocab-size", "0"), "vocab_size: "),
        (("lines.txt", "--vocab-size", "99999"), "too large for this text: the largest that works is "),
        (("lines.txt", "--tokenizer", "absent.model"), "absent.model"),
        (("lines.txt", "--hub-split", "test"), "no dataset of the Hugging Face hub"),
    ],
)
def test_what_cannot_be_read_is_one_line(ask, words: tuple[str, ...], said: str) -> None:
    done = ask(*words)
    assert (done.code, done.out) == (2, "") and re.search(said, done.err), done.err
    assert len([line for line in done.err.splitlines() if line.startswith("scorelm: ")]) == 1

"""The documentation is true: its commands and its Python run, and what it links in the code is there."""

import ast
import inspect
import json
import lzma
import re
import shlex
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest

from scorelm.cli import main

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = DOCS.parent / "src" / "scorelm"
THEORY = (DOCS / "theory.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[`([\w.]+)`\]\[(\w+)\]")
SMALL = "--steps 3 --model.dim 32 --model.layers 2 --rows 8 --max-length 32 --samples 0"
PAGES = ["quick-start.md", *sorted(str(page.relative_to(DOCS)) for page in DOCS.glob("howto/*.md"))]


@pytest.mark.parametrize(("name", "label"), sorted(set(LINK.findall(THEORY))))
def test_every_function_that_the_theory_links_is_in_the_file_of_its_link(name: str, label: str) -> None:
    room, module, *path = name.split(".")
    thing = import_module(f"scorelm.{room}.{module}")
    for attribute in path:
        thing = inspect.getattr_static(thing, attribute)
    (target,) = re.findall(rf"^\[{label}\]: (\S+)$", THEORY, re.MULTILINE)
    assert (DOCS / target).resolve() == SOURCE / room / f"{module}.py"


def test_every_equation_of_the_theory_stands_beside_a_link() -> None:
    rows = [row for row in THEORY.partition("## Steps")[0].splitlines() if row.startswith("| `")]
    assert len(rows) == 5 and all(LINK.search(row) for row in rows)
    parts = THEORY.split("\n\n")
    numbered = [k for k, part in enumerate(parts) if re.fullmatch(r"    .*\(\d\)", part)]
    assert len(numbered) == 6
    for k in numbered:
        assert LINK.search(parts[k - 1] + parts[k + 1]), parts[k]


def test_the_picture_of_the_house_has_every_room() -> None:
    picture = (DOCS / "images" / "architecture.svg").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {"assets"}
    assert rooms <= set(re.findall(r"mono\"[^>]*>([^<]+)<", picture))


def blocks(page: str, kind: str) -> list[str]:
    """The fenced blocks of a kind on a page of the documentation."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shortened(line: str) -> list[str]:
    """The words of a command, with less work to do; none where it is not scorelm's, or run by the README's test."""
    name, *words = shlex.split(line, comments=True) or [""]
    if name == "torchrun":
        name, *words = words[words.index("-m") + 1 :]
    if name != "scorelm" or words[0] == "eval":
        return []
    if words[0] == "train":
        line = re.sub(r"--minutes \d+|--model\.\w+ \d+", "", shlex.join(words))
        again = "--resume" in words
        words = shlex.split(f"{line} {'' if again else f'{SMALL} --overwrite'}")
        return words if "--vocab-size" in words or "--recipe" in words or again else [*words, "--vocab-size", "800"]
    return [*words, "--limit", "8"] if words[0] == "score" and "--text" not in words else words


@pytest.mark.thorough
@pytest.mark.parametrize("page", PAGES)
def test_commands_and_python_of_a_page_run(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    write_texts(tmp_path)
    if "transformers" in page:
        request.getfixturevalue("own_modules")
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(blocks(page, "bash")).splitlines()
    commands = [["train", *f"--data my.txt --out runs/mine --vocab-size 800 {SMALL}".split()], *map(shortened, lines)]
    for words in filter(None, commands):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, (words, capsys.readouterr().err)
    for source in blocks(page, "python"):
        shorter = source.replace("minutes=10", "steps=3").replace("dim=128", "dim=32")
        exec(compile(shorter, page, "exec"), {})


def write_texts(directory: Path) -> None:
    """The texts that the pages speak of."""
    with lzma.open(SOURCE / "assets" / "kjv.txt.xz", "rt", encoding="utf-8") as file:
        lines = list(islice(file, 600))
    for name in ("my.txt", "other.txt"):
        (directory / name).write_text("".join(lines))
    (directory / "book.txt").write_text("\n".join("".join(lines[k : k + 4]) for k in range(0, len(lines), 4)))
    rows = (f'{k},"{line.strip()}"\n' for k, line in enumerate(lines) if '"' not in line)
    (directory / "letters.csv").write_text("id,body\n" + "".join(rows))
    (directory / "prompts.txt").write_text("In the beginning\nAnd God said\n")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_films(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell after cell as plain Python; what stands last in a cell is shown as Jupyter would."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names, shown = {}, []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, notebook.name, "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), notebook.name, "eval"), names)
                shown += [] if value is None else [value._repr_html_()]
    assert shown and all(html.startswith("<iframe") for html in shown)

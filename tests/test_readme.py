"""What the README tells a new user to type works as written; only the training time is cut short."""

import lzma
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from scorelm.cli import VERBS, main
from scorelm.objectives.objective import Objective

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CORPUS = Path(__file__).parents[1] / "src" / "scorelm" / "assets" / "kjv.txt.xz"
SHORT = "--steps 3 --model.dim 32 --model.layers 2 --vocab-size 800 --save-every 2"


def block(start: str) -> str:
    """The README's fenced block that begins with `start`."""
    return next(text for text in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) if text.startswith(start))


def commands() -> list[list[str]]:
    """The commands of the README's two screens of use, with less work to do."""
    found = []
    for line in (block("scorelm sample") + block("scorelm train")).splitlines():
        if line.startswith("pip install"):  # tests/test_packaging.py sees that each extra brings what it is for
            continue
        words = shlex.split(line.replace("--minutes 60", SHORT).replace("blocks:4", "blocks:16"), comments=True)
        if words[1:2] in (["score"], ["eval"]):
            words += ["--limit", "8", *(["-n", "4", "--steps", "8"] if words[1] == "eval" else [])]
        found.append(words)
    return found


@pytest.mark.thorough
def test_the_commands_and_the_python_example_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        lines = list(islice(file, 2000))
    (tmp_path / "my.txt").write_text("".join(lines))
    (tmp_path / "book.txt").write_text("\n".join("".join(lines[k : k + 4]) for k in range(0, 2000, 4)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Objective, "shown_budgets", (2, 4))
    for name, *words in commands():
        assert name == "scorelm"
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, (words, capsys.readouterr().err)
    capsys.readouterr()
    exec(compile(block("from scorelm"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("In the beginning")
    command = [sys.executable, "-m", *commands()[-1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_every_verb_is_in_the_readme() -> None:
    for verb in set(VERBS) - {"demo", "tokenizer"}:
        assert f"scorelm {verb}" in README

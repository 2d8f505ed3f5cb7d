"""What the README tells a new user to type works as written; only the training time is cut short."""

import lzma
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CORPUS = Path(__file__).parents[1] / "src" / "scorelm" / "assets" / "kjv.txt.xz"


def block(start: str) -> str:
    """The README's fenced block that begins with `start`."""
    return next(text for text in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) if text.startswith(start))


def test_the_commands_and_the_python_example_run(tmp_path: Path) -> None:
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        (tmp_path / "my.txt").write_text("".join(line for _, line in zip(range(2000), file, strict=False)))
    short = "--steps 3 --model.dim 32 --model.layers 2 --vocab-size 800 --save-every 2"
    for line in block("scorelm train").splitlines():
        command = shlex.split(line.split("#")[0].replace("--minutes 60", short).replace("blocks:4", "blocks:16"))
        if command[1] in ("score", "eval"):
            command += ["--limit", "8", *(["-n", "4"] if command[1] == "eval" else [])]
        assert command[0] == "scorelm"
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
    done = subprocess.run(
        [sys.executable, "-c", block("from scorelm")],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("In the beginning")


def test_every_verb_is_in_the_readme() -> None:
    from scorelm.verbs import VERBS

    for verb in set(VERBS) - {"demo", "tokenizer"}:
        assert f"scorelm {verb}" in README

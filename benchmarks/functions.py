"""The functions of Python's standard library as a text: JSON lines, one short function each, none twice.

Tests, the editor IDLE and lib2to3, which newer Pythons no longer have, are left out.

    python benchmarks/functions.py functions.jsonl
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

MOST_CHARACTERS = 300
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


def functions(library: Path) -> Iterator[str]:
    """The source of every function in a library, its own indentation taken away."""
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(path.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # written to be so
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    target: Path = parser.parse_args().target
    short = dict.fromkeys(
        text for text in functions(Path(sysconfig.get_path("stdlib"))) if len(text) <= MOST_CHARACTERS
    )
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in short), encoding="utf-8")
    print(f"{len(short):,} functions in {target}")


if __name__ == "__main__":
    main()

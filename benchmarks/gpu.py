"""How fast scorelm is on a GPU: training beside a plain GPT loop, generation beside Hugging Face's GPT-2.

    python benchmarks/gpu.py [--only NAME,NAME] [--out FILE] [--small] [--limit SECONDS] [--total SECONDS] [--at-once N]

Each configuration runs in a process of its own, which is ended after --limit seconds, or when all together have taken
--total; what it has measured by then is kept, and the next one begins. What is compiled is so first, in processes that
do nothing else, with --at-once N of them side by side, which takes each of them longer; then everything is measured
alone. Figures are added to benchmarks/results/gpu.json (on a CPU to a temporary file) as they come; at the end there is
a table. `gpu_figures.py` says what is measured.

--small, which a CPU implies, takes sizes that two cores do in two minutes, and only a few of the names: compiling takes
a CPU half a minute each, but any name can be asked for with --only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gpu_figures import SIZES, SMALL, generation, training, write_text
from gpu_trace import CUDA
from runs import RESULTS
from scorelm.cli import process

NAMES = (
    "384x6-score", "generate-score", "generate-ar", "generate-gpt2", "256x6-score", "256x6-score-eager", "384x6-ar",
    "384x6-gpt", "768x12-score", "768x12-ar", "768x12-gpt", "320x6-score", "256x6-ar", "256x6-gpt", "256x6-ar-eager",
    "256x6-gpt-eager",
)  # fmt: skip
"""Width x layers and what is trained, compiled unless it says eager; or what generates. The most wanted come first."""
FEW = (
    "256x6-ar", "256x6-score-eager", "256x6-ar-eager", "256x6-gpt-eager", "generate-score", "generate-ar",
    "generate-gpt2",
)  # fmt: skip
TRAINING = {
    "tokens/s": ("tokens_per_second", ",.0f"), "MFU": ("of_peak", ".1%"), "ms": ("step_ms", ".1f"),
    "host": ("host_ms", ".1f"), "draw": ("draw_ms", ".1f"), "pack": ("pack_ms", ".1f"), "line": ("line_ms", ".1f"),
    "busy": ("busy", ".0%"), "first": ("first_steps_s", ".1f"), "again": ("first_steps_again_s", ".1f"),
    "GB": ("memory_gb", ".1f"),
}  # fmt: skip
GENERATION = {
    "tokens/s": ("tokens_per_second", ",.0f"), "evals": ("evaluations", "d"), "ms each": ("evaluation_ms", ".2f"),
    "kernels": ("launches", ".0f"), "item": ("items", ".1f"), "nonzero": ("nonzeros", ".1f"),
    "to host": ("copies_to_host", ".1f"), "waits": ("waits", ".1f"), "busy": ("busy", ".0%"),
}  # fmt: skip
"""Columns of the two tables, in the figures' names and formats."""
Row = dict[str, Any]


def child(name: str, folder: Path, small: bool, compiling: bool) -> None:
    """Measure a configuration; its rows go to a file of its name as they come, and what it says to another."""
    with (folder / f"{name}.log").open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"kernels-{name}")
    rows: dict[str, Row] = {}

    def keep(row: str, **figures: Any) -> None:
        device = torch.cuda.get_device_name() if CUDA else torch.cpu.get_capabilities().get("cpu_name")
        rows.setdefault(row, {"device": device, "torch": torch.__version__}).update(figures)
        draft = folder / f"{name}.writing"
        draft.write_text(json.dumps(rows))
        draft.replace(folder / f"{name}.json")

    kind, _, rest = name.partition("-")
    try:
        if kind == "generate":
            generation(rest, folder, small, keep)
        else:
            what, _, eager = rest.partition("-")
            size = (SMALL if small else SIZES)[kind]
            training(size, what, not eager, folder, compiling, lambda **figures: keep(name, **figures))
    except BaseException as error:
        keep(name, failed=f"{type(error).__name__}: {error}"[:1000])
        traceback.print_exc()
        raise SystemExit(1) from None


def measure(name: str, folder: Path, small: bool, limit: float, compiling: bool) -> dict[str, Row]:
    """The rows of a configuration, measured in a process of its own; what went wrong is said, and noted in its row."""
    found, log = folder / f"{name}.json", folder / f"{name}.log"
    found.unlink(missing_ok=True)
    work = multiprocessing.get_context("spawn").Process(target=child, args=(name, folder, small, compiling))
    work.start()
    work.join(limit)
    stopped = work.exitcode is None
    if stopped:
        work.kill()
        work.join(10)
    rows: dict[str, Row] = json.loads(found.read_text()) if found.exists() else {}
    if stopped or work.exitcode:
        row = rows.setdefault(name, {})
        row.setdefault("failed", f"stopped after {limit:.0f} s" if stopped else f"ended with code {work.exitcode}")
        print(f"{name}: {row['failed']}\n{log.read_text(errors='replace')[-3000:] if log.exists() else ''}", flush=True)
    return rows


def measured(names: list[str], small: bool, limit: float, total: float, at_once: int) -> Iterator[dict[str, Row]]:
    """The rows of each configuration: of those that compile, first what that takes; then everything, one by one."""
    end = time.monotonic() + total
    compiled = [name for name in names if not name.startswith("generate") and not name.endswith("eager")]
    with tempfile.TemporaryDirectory() as place:

        def rows(name: str, compiling: bool) -> dict[str, Row]:
            left = min(limit, end - time.monotonic())
            return measure(name, Path(place), small, left, compiling) if left > 0 else {}

        write_text(Path(place), SMALL if small else SIZES)
        with ThreadPoolExecutor(at_once) as pool:
            first = dict(zip(compiled, pool.map(lambda name: rows(name, True), compiled), strict=True))
        for name in names:
            before = first.get(name, {})
            found = {} if "failed" in before.get(name, {}) else rows(name, False)
            yield before | {row: before.get(row, {}) | figures for row, figures in found.items()}


def table(rows: Mapping[str, Row]) -> Iterator[str]:
    """Two tables, one line a configuration, at most 100 columns wide."""
    for title, columns, first, width in (("training", TRAINING, 18, 7), ("generation", GENERATION, 24, 8)):
        own = {name: row for name, row in rows.items() if name.startswith("generate") == (title == "generation")}
        lines = {title: list(columns)} if own else {}
        for name, row in own.items():
            lines[name] = [format(row[key], form) if key in row else "-" for key, form in columns.values()]
        for name, (speed, *cells) in lines.items():
            yield f"{name:<{first}}{speed:>10}" + "".join(f"{cell:>{width}}" for cell in cells)
            if "failed" in own.get(name, {}):
                yield f"  {own[name]['failed'].splitlines()[0]}"[:100]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=(RESULTS if CUDA else Path(tempfile.gettempdir())) / "gpu.json")
    parser.add_argument("--small", action="store_true", default=not CUDA)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds that each process may take")
    parser.add_argument("--total", type=float, default=3600.0, help="seconds that all together may take")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="how many compile side by side")
    options = parser.parse_args()
    names = options.only or (FEW if options.small else NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"no {', '.join(unknown)}: there are {', '.join(NAMES)}")
    process.prepare()
    rows: dict[str, Row] = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    fresh: dict[str, Row] = {}
    for found in measured(names, options.small, options.limit, options.total, options.at_once):
        fresh |= found
        print("\n".join(list(table(found))[1:]), flush=True)
        result = {"command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "rows": rows | fresh}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + "\n".join(table(fresh)))


if __name__ == "__main__":
    main()

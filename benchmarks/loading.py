"""Loading 1 GB of text, split and counted, beside `datasets.load_dataset` alone, which does neither.

    python benchmarks/loading.py [MEGABYTES]

The text is the embedded corpus over and over, a number before each line so that lines differ. Each figure is from a
process of its own with an empty cache; the two take turns. Writes results/loading.json.
"""

import csv
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from itertools import chain, count
from pathlib import Path
from statistics import median

OUT = Path(__file__).with_name("results") / "loading.json"
ROUNDS = 3
KINDS = {"txt": "text", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
BEGIN = "import re, sys, time; path, kind = sys.argv[1:]"
END = (
    r"print(time.perf_counter() - start, int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) / 1e3)"
)
OURS = f"""{BEGIN}
from scorelm.text.corpus import load_corpus
import datasets, pyarrow.compute
start = time.perf_counter()
load_corpus(path, holdout=0.02)
{END}"""
THEIRS = f"""{BEGIN}
import datasets
datasets.disable_progress_bars()
start = time.perf_counter()
datasets.load_dataset(kind, data_files=path, split="train")
{END}"""


def lines(size: int) -> Iterator[str]:
    """Lines of together `size` bytes."""
    with lzma.open(str(files("scorelm.assets") / "kjv.txt.xz"), "rt", encoding="utf-8") as file:
        verses = file.read().splitlines()
    written = 0
    for number in count():
        for verse in verses:
            line = f"{number} {verse}"
            written += len(line) + 1
            yield line
            if written >= size:
                return


def write(folder: Path, kind: str, size: int) -> Path:
    """A file of that kind with so much text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"text.{kind}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "txt":
            file.writelines(f"{line}\n" for line in lines(size))
        elif kind == "jsonl":
            file.writelines(json.dumps({"id": 1, "text": line}) + "\n" for line in lines(size))
        elif kind == "csv":
            csv.writer(file).writerows(chain([["id", "text"]], ([1, line] for line in lines(size))))
        else:
            pq.write_table(pa.table({"text": list(lines(size))}), path)
    return path


def measure(program: str, path: Path) -> tuple[float, float]:
    """Seconds, and megabytes of memory at most."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", program, str(path), KINDS[path.suffix[1:]]],
            env={"HF_DATASETS_CACHE": cache, "PATH": ""}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def main() -> None:
    """All kinds of file."""
    size, table = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), kind, size * 1_000_000)
            rounds = [(measure(OURS, path), measure(THEIRS, path)) for _ in range(ROUNDS)]
        own, other = ([median(column) for column in zip(*side, strict=True)] for side in zip(*rounds, strict=True))
        ratio = median(ours[0] / theirs[0] for ours, theirs in rounds)
        table[kind] = {
            "ratio": round(ratio, 2), "seconds": round(own[0], 2), "datasets_seconds": round(other[0], 2),
            "peak_mb": round(own[1]), "datasets_peak_mb": round(other[1]),
        }  # fmt: skip
        print(kind, table[kind], flush=True)
    OUT.write_text(json.dumps({"megabytes": size, "rounds": ROUNDS, **table}, indent=1) + "\n")


if __name__ == "__main__":
    main()

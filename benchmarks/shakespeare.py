"""A public yardstick: Shakespeare in characters, split, cut and counted as in nanoGPT, for all three objectives.

    .venv/bin/python benchmarks/shakespeare.py tinyshakespeare.txt           # the size of nanoGPT's, for a GPU
    .venv/bin/python benchmarks/shakespeare.py tinyshakespeare.txt --small   # 4 x 128, five minutes each on two cores

FILE is the text of https://github.com/karpathy/char-rnn (1,115,394 characters), which is not in this repository. Its
first 90% are one training document, which the packer cuts into windows at other places in every epoch, as long as
nanoGPT's (256 characters; 128 with --small). What is trained is `recipes/shakespeare-char.toml` with each objective.
Held-out text is priced twenty times (four with --small); a model is kept at its own best price, left to right or, for
the masked one, in random order. That choice and the figure use the same text, as nanoGPT's do.

What is counted, in nats per character. nanoGPT's estimate is the mean cross-entropy of 256 characters of which the
first is predicted from one character before it and the last from 256. So left to right a row here is 257 characters of
the held-out text; the price of the row less that of its first character alone is the price of the other 256 given all
before them, and rows overlap by one character, so that every character but the text's first is counted once (nanoGPT
draws its windows at random). Rows have neither ``<s>`` nor ``</s>``, and their length is given, as in nanoGPT. In
random order and along the uniform path the same 256 characters are priced without the one before them, which costs
about a hundredth of a nat. Both are upper bounds, the means over a few orders and noise levels.

What differs from nanoGPT: weights are averaged, the rate falls linearly to 0 rather than along a cosine to a tenth,
dropout is only on what layers add, and the Transformer has rotary positions and SwiGLU. Writes
benchmarks/results/shakespeare.json (with --small, shakespeare-small.json), each model as soon as it is done, so that a
stopped run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from runs import RESULTS, Kept, recipe
from scorelm import ScoreLM, price
from scorelm.cli import process
from scorelm.config.recipe import Recipe
from scorelm.evaluation.rows import CutTexts
from scorelm.text.corpus import Corpus
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.training.data import TrainingData
from scorelm.training.trainer import Trainer

PATHS = {"autoregressive": ("ordered",), "score": ("ordered", "random", "uniform"), "masked": ("random",)}
"""What is priced of each model; the first one says when it is best."""
SMALL = {"model__dim": 128, "model__layers": 4, "data__max_length": 128, "training__rows": 16, "training__lr": 2e-3,
         "training__warmup": 50, "training__dropout": 0.0}  # fmt: skip
DROPOUT = {"autoregressive": 0.3, "score": 0.2, "masked": 0.2}
"""Of each objective at full size; with 0.2 the autoregressive model overfits after 15 epochs."""
PUBLISHED = {False: ("nanoGPT, 6 x 384 (its README)", 1.4697), True: ("nanoGPT, 4 x 128, windows of 64", 1.88)}
"""Best validation losses, by whether they are of the small size."""
TIMES = {False: (20, 8), True: (4, 2)}
"""How often held-out text is priced, and over how many orders or noise levels."""


def split(text: str) -> tuple[str, str]:
    """The first 90% of the characters and the rest."""
    end = int(0.9 * len(text))
    return text[:end], text[end:]


def windows(ids: list[int], length: int) -> list[list[int]]:
    """Rows of `length` tokens side by side, each behind the token before it."""
    return [ids[start : start + length + 1] for start in range(0, len(ids) - length, length)]


def read(text: str, digest: str) -> TrainingData:
    """The text as one training document and one held-out document."""
    import datasets

    tokenizer = SentencePieceTokenizer.train([text], "characters")
    sides = [datasets.Dataset.from_dict({"ids": [tokenizer.encode_document(part)]}) for part in split(text)]
    return TrainingData(tokenizer, Corpus("shakespeare", *sides, digest), digest, digest)


def nats(lm: ScoreLM, rows: list[list[int]], path: str, draws: int) -> float:
    """Mean nats of all tokens of `windows` but the first of each: given that one left to right, else without it."""

    def total(ids: list[list[int]]) -> float:
        texts = CutTexts(ids, list(range(len(ids))), [len(row) for row in ids], [0] * len(ids))
        found = price(lm, texts, path, **({} if path == "ordered" else {"draws": draws}))
        return found.tokens * sum(value for term, value in found.terms.items() if term != "length")

    count = sum(len(row) - 1 for row in rows)
    if path == "ordered":
        return (total(rows) - total([row[:1] for row in rows])) / count
    return total([row[1:] for row in rows]) / count


def measure(options: Recipe, data: TrainingData, rows: list[list[int]], turns: int, draws: int) -> dict[str, Any]:
    """Train one model, price it at every turn, and on all of its paths at its best."""
    trainer, config, curve = Trainer(options, data), options.training, []
    progress, paths, best = trainer.progress, PATHS[options.training.objective], None
    for turn in range(1, turns + 1):
        while progress.share(config) < turn / turns:
            started = time.perf_counter()
            trainer.step()
            progress.seconds += time.perf_counter() - started
        if curve and curve[-1]["step"] == progress.step:  # it compiled for several turns
            continue
        trainer.read()
        trainer.measure_heldout()
        lm = trainer.model()
        assert lm is not None
        point = {"step": progress.step, "epoch": trainer.epoch, "seconds": progress.seconds}
        point[paths[0]] = nats(lm, rows, paths[0], draws)
        print(f"{config.objective}: " + ", ".join(f"{name} {value:.4g}" for name, value in point.items()), flush=True)
        curve.append(point)
        if best is None or point[paths[0]] < best[0][paths[0]]:
            best = point, lm
    assert best is not None
    prices = {path: best[0][path] if path in best[0] else nats(best[1], rows, path, draws) for path in paths}
    size = sum(p.numel() for p in best[1].denoiser.parameters())
    return {"nats_per_character": prices, "best": best[0], "last": curve[-1], "parameters": size, "curve": curve}


def show(found: dict[str, Any], small: bool) -> None:
    """The table."""
    columns = ("left to right", "random order", "uniform bound")
    print("\n" + " " * 32 + "".join(f"{c:>15}" for c in (*columns, "best at epoch", "of", "seconds", "parameters")))
    name, value = PUBLISHED[small]
    print(f"{name:<32}{value:>15.4f}")
    for objective in [name for name in PATHS if name in found]:
        one, best, last = found[objective], found[objective]["best"], found[objective]["last"]
        prices = [one["nats_per_character"].get(path) for path in ("ordered", "random", "uniform")]
        cells = [f"{best['epoch']:.1f}", f"{last['epoch']:.1f}", f"{last['seconds']:.0f}", f"{one['parameters']:,}"]
        cells = ["" if p is None else f"{p:.4f}" for p in prices] + cells
        print(f"{objective:<32}" + "".join(f"{cell:>15}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the text")
    parser.add_argument("--small", action="store_true", help="a trunk of 4 x 128 and windows of 128, for a CPU")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help="training time of each model (default: 5,000 steps; small: 300)")
    budget.add_argument("--steps", type=int, help="training steps of each model instead")
    parser.add_argument("--only", choices=PATHS, help="train just this one")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    process.prepare()
    small, seconds, gpu = arguments.small, arguments.seconds, torch.cuda.is_available()
    contents = arguments.file.read_bytes()
    text, digest = contents.decode(), hashlib.sha256(contents).hexdigest()
    data, sides = read(text, digest), split(text)
    options = {"--seconds": arguments.seconds, "--steps": arguments.steps, "--only": arguments.only}
    words = ["--small"] * small + [f"{name} {value}" for name, value in options.items() if value is not None]
    run = {
        "command": " ".join(["python benchmarks/shakespeare.py", arguments.file.name, *words]),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, threads: {torch.get_num_threads()}",
        "text": {"sha256": digest, "characters": [len(side) for side in sides], "tokens": data.tokenizer.vocab_size},
        "published": list(PUBLISHED[small]),
    }
    kept = Kept(str((arguments.out or RESULTS / f"shakespeare{'-small' * small}.json").absolute()))
    if kept.get("run", lambda: run) != run:
        parser.error(f"{kept.path} is of {kept.values['run']}: move it away first")
    if small and seconds is None and arguments.steps is None:
        seconds = 300
    limit = {"training__steps": arguments.steps} if arguments.steps else {}
    if seconds:
        limit = {"training__minutes": seconds / 60, "training__steps": None}
    for objective in [arguments.only] if arguments.only else PATHS:
        own = SMALL if small else {"training__dropout": DROPOUT[objective]}
        options = recipe("shakespeare-char", **limit, **own, training__objective=objective, training__compile=gpu)
        rows = windows(data.tokenizer.encode(sides[1]), options.data.max_length)
        kept.get(objective, lambda: measure(options, data, rows, *TIMES[small]))  # noqa: B023
    show(kept.values, small)


if __name__ == "__main__":
    main()

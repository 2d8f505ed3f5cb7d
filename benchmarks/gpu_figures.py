"""What `gpu.py` measures of one configuration, in the process that it has started for it.

Training. ``tokens_per_second``: real tokens. ``of_peak``: useful FLOPs (padding and what fixed places compute for
nothing are not counted) over the fastest square product in the same process and precision. ``step_ms``: with a wait
after every ten steps. ``host_ms``: until a step is handed to an idle GPU, which takes about a thousand launches before
the host waits. ``draw_ms``, ``pack_ms``, ``line_ms``: noise and its levels for a batch, its rows, and a line of metrics
(in a run once in ten steps), each by itself. ``first_steps_s``: four steps, with a first pass and without, of a new
process that has no compiled kernels; ``first_steps_again_s``: that has those of the process before. From CUDA's own
trace of ten steps, ``busy``: share of the time in which kernels run; ``waits``: how often the host waits in a step;
``kernels``: those that take most of the time, with their shares.

Generation, with random weights. ``evaluation_ms``: of the network, with all that goes with it. Counted in a trace, for
an evaluation: ``launches`` of kernels; ``items`` and ``nonzeros``, most of which read what the host has anyway;
``copies_to_host``, for which the host waits, and all ``waits``. ``busy``: kernels' time over the time without a trace.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

import runs
from generation import LENGTH, model, peer, write
from gpt import GPT
from gpu_trace import CUDA, DEVICE, counts, covered, seconds, short, trace, typical_ms, wait
from scorelm import Tokenizer
from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.device import matmul_peak
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.training.data import prepare
from scorelm.training.loop import measure
from scorelm.training.run import with_shards
from scorelm.training.step import draw_step
from scorelm.training.trainer import Trainer
from training import done

FIRST, TEN = 4, 10
OBJECTIVES = {"score": "score", "ar": "autoregressive"}


class Size(NamedTuple):
    """Of a model and of its batches."""

    dim: int
    layers: int
    length: int
    rows: int
    optimizer: str = "adamw"
    long: bool = False
    """Whether its text is several verses an example."""


SIZES = {
    "256x6": Size(256, 6, 64, 1024),
    "384x6": Size(384, 6, 128, 512, "muon"),
    "320x6": Size(320, 6, 128, 128, "muon"),
    "768x12": Size(768, 12, 1024, 16, long=True),
}
SMALL = {
    "256x6": Size(64, 1, 64, 16),
    "384x6": Size(64, 1, 128, 8, "muon"),
    "320x6": Size(64, 1, 128, 4, "muon"),
    "768x12": Size(64, 1, 256, 4, long=True),
}


def write_text(folder: Path, sizes: dict[str, Size]) -> None:
    """The tokenizer of all configurations, and the text of the long ones: verses joined to 7/8 of a row."""
    verses = runs.training()
    tokenizer = Tokenizer.train(verses, 2048)
    tokenizer.save(folder / "tokenizer.model")
    room = next(size.length for size in sizes.values() if size.long) * 7 // 8
    examples: list[str] = []
    left = 0
    for verse in verses:
        tokens = len(tokenizer.encode(verse))
        if tokens > left:
            examples.append(verse)
            left = room - tokens
        else:
            examples[-1] += f" {verse}"
            left -= tokens
    (folder / "long.txt").write_text("\n".join(examples), "utf-8")


def loop(size: Size, kind: str, compiled: bool, folder: Path) -> Trainer | GPT:
    """A training loop on the text and with the tokenizer of `folder`."""
    source = str(folder / "long.txt") if size.long else "kjv"
    data = prepare(DataConfig(source=source, max_length=size.length), folder, True, print)
    if kind == "gpt":
        return GPT(size.dim, size.layers, size.length, size.rows, data, DEVICE, compiled)
    options = {
        "objective": OBJECTIVES[kind], "optimizer": size.optimizer, "rows": size.rows, "steps": 10**6,
        "places": "fixed", "compile": compiled,
    }  # fmt: skip
    recipe = Recipe(
        data=DataConfig(source=source, max_length=size.length),
        model=ModelConfig(dim=size.dim, layers=size.layers),
        training=TrainingConfig(**options),
    )
    return Trainer(with_shards(recipe, world=1), data)


def training(size: Size, kind: str, compiled: bool, folder: Path, compiling: bool, keep: Callable[..., None]) -> None:
    """Measure a training loop, or where it is `compiling` only its first steps; `keep` takes the figures."""
    run = loop(size, kind, compiled, folder)
    first = "first_steps_s" if compiling or not compiled else "first_steps_again_s"
    keep(**{first: seconds(lambda: steps(run, FIRST))})
    if not compiling:
        measure_loop(run, keep)


def measure_loop(run: Trainer | GPT, keep: Callable[..., None]) -> None:
    """All but its first steps."""
    peak = matmul_peak(DEVICE, run.dtype if isinstance(run, GPT) else run.learner.dtype)
    keep(**speed(run, peak, 5.0 if CUDA else 0.0))
    run.step()
    loss, norm = map(float, run.newest if isinstance(run, GPT) else (run.unread.loss, run.unread.norm))
    skipped = 0 if isinstance(run, GPT) else run.progress.skipped
    keep(loss=loss, norm=norm)
    if skipped or not math.isfinite(loss + norm):
        raise ArithmeticError(f"loss {loss:g}, norm {norm:g}, {skipped} steps skipped")
    if isinstance(run, Trainer):
        keep(**parts(run))
    if CUDA:
        keep(host_ms=1e3 * host_seconds(run))
        keep(**kernels(run))


def steps(run: Trainer | GPT, count: int) -> None:
    """Some steps."""
    for _ in range(count):
        run.step()


def speed(run: Trainer | GPT, peak: float, least: float) -> dict[str, float]:
    """Of ten steps, and ten more until `least` seconds are over."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before, took, count = done(run), 0.0, 0
    while not count or took < least:
        took += seconds(lambda: steps(run, TEN))
        count += TEN
    tokens, flops = (now - then for now, then in zip(done(run), before, strict=True))
    memory = torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens_per_second": tokens / took, "of_peak": flops / took / peak, "peak_flops": peak,
        "step_ms": 1e3 * took / count, "steps": count, "memory_gb": memory / 1e9,
    }  # fmt: skip


def parts(run: Trainer) -> dict[str, float]:
    """What a step's batch and a line of metrics take, each by itself."""
    packed = [replace(shard, batches=repeat(next(shard.batches))) for shard in run.shards]

    def line() -> str:
        run.window.seconds = 1.0
        return json.dumps(measure(run, 1.0, looked=False))

    return {
        "draw_ms": typical_ms(lambda: draw_step(run.learner, packed, run.schedule, 0)),
        "pack_ms": typical_ms(lambda: [next(shard.batches) for shard in run.shards]),
        "line_ms": typical_ms(line),
    }


def host_seconds(run: Trainer | GPT) -> float:
    """Median time until a step is handed to the idle device; the one in ten that waits for it does not count."""
    times = []
    for _ in range(TEN):
        wait()
        started = time.perf_counter()
        run.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def kernels(run: Trainer | GPT) -> dict[str, Any]:
    """What runs on the GPU in ten steps: for how much of the time, how often it is waited for, and what takes most."""
    events = trace(lambda: steps(run, TEN), ProfilerActivity.CUDA)
    found, times = [e for e in events if e["cat"] == "kernel"], Counter[str]()
    for event in found:
        times[short(event["name"])] += event["dur"]
    span = max(e["ts"] + e["dur"] for e in found) - min(e["ts"] for e in found)
    most = [[name, round(took / times.total(), 4)] for name, took in times.most_common(12)]
    counted = {name: count / TEN for name, count in counts(events).items()}
    return {"busy": covered(found) / span, "launches": counted["launches"], "waits": counted["waits"], "kernels": most}


def generation(kind: str, folder: Path, small: bool, keep: Callable[..., None]) -> None:
    """Measure a model that writes one text, and many in either precision; `keep` takes a row's name and figures."""
    torch.manual_seed(0)
    generate = writer(kind, folder)
    many = 8 if small else 256
    for texts, precision in ((1, "float32"), (many, "float32"), (many, "bfloat16")):
        evaluations = generate(texts, precision)
        took = statistics.median(seconds(lambda: generate(texts, precision)) for _ in range(3))  # noqa: B023
        row = f"generate-{kind} {texts} {precision.replace('loat', '')}"
        keep(
            row, evaluations=evaluations, evaluation_ms=1e3 * took / evaluations,
            tokens_per_second=texts * LENGTH / took,
        )  # fmt: skip
        both = (ProfilerActivity.CPU, ProfilerActivity.CUDA) if CUDA else (ProfilerActivity.CPU,)
        events = trace(lambda: generate(texts, precision), *both)  # noqa: B023
        keep(row, **{name: count / evaluations for name, count in counts(events).items()})
        if CUDA:
            keep(row, busy=covered(e for e in events if e["cat"] == "kernel") / 1e6 / took)


def writer(kind: str, folder: Path) -> Callable[[int, str], int]:
    """What writes n texts of `LENGTH` tokens in a precision, and gives the evaluations that it took."""
    tokenizer = SentencePieceTokenizer.load(folder / "tokenizer.model")
    if kind == "gpt2":
        gpts = {name: peer(tokenizer.vocab_size).to(DEVICE, getattr(torch, name)) for name in ("float32", "bfloat16")}

        def generate(n: int, precision: str) -> int:
            write(gpts[precision], n)
            return LENGTH - 1

        return generate
    lm = model(tokenizer, OBJECTIVES[kind]).to(DEVICE)

    def sample(n: int, precision: str) -> int:
        steps = LENGTH if n == 1 else 16
        return max(made.nfe for made in lm.generate(n=n, length=LENGTH, steps=steps, precision=precision))

    return sample

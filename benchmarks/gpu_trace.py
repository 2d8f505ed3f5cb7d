"""Time and traces of work on whatever device there is: what `gpu_figures.py` measures with."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scorelm.device import pick_device

DEVICE = pick_device("auto")
CUDA = DEVICE.type == "cuda"
Event = dict[str, Any]


def wait() -> None:
    """Until the device has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Of some work, from an idle device to an idle device."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def typical_ms(work: Callable[[], object]) -> float:
    """The median of ten turns, after one that does not count."""
    return 1e3 * statistics.median([seconds(work) for _ in range(11)][1:])


def trace(work: Callable[[], object], *activities: ProfilerActivity) -> list[Event]:
    """What happens meanwhile, as Chrome's trace format has it; times are in microseconds."""
    with profile(activities=activities) as found:
        seconds(work)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and "cat" in event]


def covered(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of the events goes on."""
    total = end = 0.0
    for event in sorted(events, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        total += max(0.0, stop - max(event["ts"], end))
        end = max(end, stop)
    return total


def short(name: str) -> str:
    """A kernel's name without what says nothing."""
    return re.sub(r"\bvoid |\(anonymous namespace\)::|at::(native::|cuda::)?|<unnamed>::", "", name)[:60]


def counts(events: Iterable[Event]) -> dict[str, int]:
    """Launches of kernels, and what makes the host wait for the device."""
    names = Counter(event["name"].partition(" (")[0] for event in events)
    found = {"items": names["aten::_local_scalar_dense"], "nonzeros": names["aten::nonzero"]}
    if CUDA:
        found["launches"] = sum(event["cat"] == "kernel" for event in events)
        found |= {"copies_to_host": names["Memcpy DtoH"], "waits": names["cudaStreamSynchronize"]}
    return found

"""A process that has imported everything and forks children that run the command line, each with a fault of its own.

It reads one job a line from stdin, as JSON, and answers with the children's process ids, one for each rank, and then
with an exit code. A forked child saves the seconds that imports take; all else in it is what ``python -m scorelm`` is,
and several of them are what torchrun starts.
"""

import errno
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import datasets.io.generator  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp

import scorelm.evaluation.price
import scorelm.sampling.sample  # noqa: F401
from scorelm.cli import main
from scorelm.cli.verb import load
from scorelm.training import loop
from scorelm.training.trainer import Trainer

with suppress(ImportError):
    import scipy.io  # noqa: F401
loop.matmul_peak = lambda *_: 1.0  # what MFU is relative to, and a third of a child's start


def die(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at(moments: list[tuple[str, str, int]], act: Callable[[], None]) -> None:
    """Act in the last of some moments, each of which waits for the one before: (event, pattern, how often)."""
    left = [list(moment) for moment in moments]

    def note(event: str, arguments: Sequence[Any]) -> None:
        if left and event == left[0][0] and re.search(left[0][1], " ".join(map(str, arguments))):
            left[0][2] -= 1
            if left[0][2] == 0:
                left.pop(0)
                if not left:
                    act()

    def watched(event: str, real: Callable[..., Any], subject: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            note(event, (subject(*arguments),))
            return real(*arguments, **named)

        return call

    os.fsync = watched("fsync", os.fsync, lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    torch.save = watched("torch.save", torch.save, lambda *_: "")
    sys.addaudithook(note)


def before_step(act: Callable[[Trainer], Callable[[], None] | None]) -> None:
    """Call `act` before every step, and what it returns after the step."""
    real = Trainer.step

    def step(trainer: Trainer) -> None:
        undo = act(trainer)
        try:
            real(trainer)
        finally:
            if undo is not None:
                undo()

    Trainer.step = step


def kill_after(step: int, seconds: float, signum: int = signal.SIGKILL) -> None:
    """Get a signal `seconds` after the process has begun step number `step` of its own, wherever it is then."""
    left = [step]

    def count(trainer: Trainer) -> None:
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(seconds, die, (signum,)).start()

    before_step(count)


def slow_disk(seconds: float) -> None:
    """Wait whenever a checkpoint's file is opened."""

    def wait(event: str, arguments: Sequence[Any]) -> None:
        if event == "open" and re.search(r"/\.writing-\d+/", str(arguments[0])):
            time.sleep(seconds)

    sys.addaudithook(wait)


def poison(steps: list[int]) -> None:
    """Make a weight NaN during some steps, so that their loss and gradients are."""

    def spoil(trainer: Trainer) -> Callable[[], None] | None:
        if trainer.progress.step + 1 not in steps:
            return None
        weight = next(trainer.learner.denoiser.parameters()).data.view(-1)
        kept = weight[0].clone()
        weight[0] = torch.nan
        return lambda: weight[:1].copy_(kept)

    before_step(spoil)


def jumping_clock() -> None:
    """Let the wall clock jump by years at every look, and the time between two lines on stderr pass in an instant."""
    wall, monotonic, sign = time.time, time.monotonic, [1]

    def jump() -> float:
        sign[0] = -sign[0]
        return wall() + sign[0] * 1e9

    time.time, time.monotonic = jump, lambda: 1e6 * monotonic()


def arm(fault: dict[str, Any]) -> None:
    if "kill" in fault:
        at(fault["kill"], die)
    if "no_space" in fault:
        at(fault["no_space"], no_space)
    if "kill_after" in fault:
        kill_after(*fault["kill_after"])
    if "slow_disk" in fault:
        slow_disk(fault["slow_disk"])
    if "poison" in fault:
        poison(fault["poison"])
    if "clock" in fault:
        jumping_clock()
    if "largest_file" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["largest_file"],) * 2)


def child(job: dict[str, Any], rank: int, port: int) -> int:
    suffix = f"{job['errors']}.{rank}" if rank else job["errors"]
    for handle, path in ((0, os.devnull), (1, f"{suffix}.stdout"), (2, suffix)):
        os.dup2(os.open(path, os.O_RDWR if handle == 0 else os.O_WRONLY | os.O_CREAT), handle)
    if job["world"] > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": job["world"]}
        os.environ.update({key: str(value) for key, value in (meeting | {"RANK": rank, "LOCAL_RANK": rank}).items()})
    os.environ.update(job["environment"])
    torch.set_num_threads(2)
    arm(job["fault"])
    try:
        main(job["arguments"])
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
        return 99
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fork(job: dict[str, Any]) -> list[int]:
    """Start a child for each rank."""
    pids, port = [], free_port()
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            os._exit(child(job, rank, port))
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> int:
    """The first exit code that is not 0, if any; the other ranks are killed then, as torchrun does."""
    left, code = set(pids), 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if code == 0 and (code := os.waitstatus_to_exitcode(status)) != 0:
            for other in left:
                os.kill(other, signal.SIGKILL)
    return code


if __name__ == "__main__":
    for verb in ("train", "sample", "score"):
        load(verb)
    for line in sys.stdin:
        pids = fork(json.loads(line))
        print(json.dumps(pids), flush=True)
        print(wait(pids), flush=True)

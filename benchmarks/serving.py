"""The server under load: 200 clients at once against one request at a time, on the model that comes along.

    .venv/bin/python benchmarks/serving.py [SECONDS]     # writes benchmarks/results/serving.json, prints a table

The server is a process of its own on this machine; the clients share its cores. Requests have every path, 4 to 64
steps, one to four texts of 8 to 128 tokens; one client in twenty leaves before its answer, one in twenty sends
something malformed. Then: are the texts those that the requests get alone, does memory stay flat, and is everything
that was accepted answered, or told to come back, when the server is stopped under load? `tests/serving/test_load.py`
asks the same of the same load.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from runs import RESULTS
from scorelm import ScoreLM
from scorelm.cli import process

CLIENTS, CHECKED, SECONDS = 200, 100, 60.0
PATHS = ("bounded", "bounded", "bounded", "uniform", "surest", "blocks:4", "blocks:1", "ramp:0.5", "shuffled")


def request(k: int) -> dict[str, Any]:
    """Request k; the same for the same k."""
    rng = random.Random(k)
    path = rng.choice(PATHS)
    length = None if path.startswith("blocks") else rng.randint(8, 128)
    options = {"path": path, "steps": rng.choice((4, 8, 16, 32, 64)), "temperature": rng.choice((0.7, 1.0)), "seed": k}
    return {"n": rng.choice((1, 1, 2, 4)), "length": length, **options}


@dataclass
class Tally:
    """What clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    texts: dict[int, list[str]] = field(default_factory=dict)

    def figures(self, took: float) -> dict[str, Any]:
        """In numbers."""
        p50, p99 = np.percentile(self.seconds, (50, 99)) if self.seconds else (None, None)
        return {
            "requests_per_second": len(self.seconds) / took, "tokens_per_second": self.tokens / took,
            "p50_seconds": p50, "p99_seconds": p99, "statuses": dict(self.statuses),
        }  # fmt: skip


async def one(client: httpx.AsyncClient, k: int, tally: Tally) -> None:
    """Send a request and note what comes."""
    begin = time.monotonic()
    try:
        answer = await client.post("/v1/generate", json=request(k))
    except httpx.HTTPError as error:
        tally.statuses[type(error).__name__] += 1
        return
    tally.statuses[str(answer.status_code)] += 1
    if answer.status_code == 200:
        samples = answer.json()["samples"]
        tally.seconds.append(time.monotonic() - begin)
        tally.tokens += sum(len(sample["ids"]) for sample in samples)
        tally.texts[k] = [sample["text"] for sample in samples]
    elif answer.status_code in (429, 503):
        await asyncio.sleep(float(answer.headers["Retry-After"]) * random.random())


async def behave(client: httpx.AsyncClient, k: int, tally: Tally) -> None:
    """One request of a client: most are good, one in twenty leaves, one in twenty is malformed."""
    kind = random.Random(-k).random()
    if kind < 0.05:
        try:
            await asyncio.wait_for(client.post("/v1/generate", json=request(k)), 0.3)
            tally.statuses["left, answered before"] += 1
        except (TimeoutError, httpx.HTTPError):
            tally.statuses["left"] += 1
    elif kind < 0.1:
        body = random.Random(k).choice((b"{", b'{"steps": "x"}', b'{"path": "nowhere"}', b"\xff", b'{"n": 1e9}'))
        answer = await client.post("/v1/generate", content=body, headers={"content-type": "application/json"})
        tally.statuses[f"malformed, {answer.status_code}"] += 1
    else:
        await one(client, k, tally)


async def crowd(url: str, clients: int, seconds: float, first: int) -> tuple[Tally, float]:
    """So many clients at a time for so long; the last requests are waited for."""
    tally, begin = Tally(), time.monotonic()
    numbers = iter(range(first, 10**9))
    limits = httpx.Limits(max_connections=None)

    async def client_loop() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=150, limits=limits) as client:
            while time.monotonic() - begin < seconds:
                await (one if clients == 1 else behave)(client, next(numbers), tally)

    await asyncio.gather(*(client_loop() for _ in range(clients)))
    return tally, time.monotonic() - begin


async def stop_under_load(url: str, server: subprocess.Popen[str]) -> dict[str, Any]:
    """What a crowd sees when the server is told to stop."""
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, timeout=150, limits=httpx.Limits(max_connections=None)) as client:
        tasks = [asyncio.create_task(one(client, 10**6 + k, tally)) for k in range(CLIENTS)]
        await asyncio.sleep(5)  # all of them have been taken on
        server.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
    return {"statuses": dict(tally.statuses), "exit_code": server.wait(60)}


def resident(server: subprocess.Popen[str]) -> float:
    """Memory of the server in MB."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[0]) / 1e3


async def measure(url: str, server: subprocess.Popen[str], seconds: float) -> tuple[dict[str, Any], Tally]:
    """All figures."""
    alone, took = await crowd(url, 1, seconds / 3, 10**5)
    found: dict[str, Any] = {"one_at_a_time": alone.figures(took)}
    await crowd(url, CLIENTS, seconds / 3, 0)
    memory = [resident(server)]
    tally, took = await crowd(url, CLIENTS, seconds, 10**4)
    memory.append(resident(server))
    found |= {"crowd": tally.figures(took), "megabytes_after_warm_up_and_at_the_end": memory}
    found["ratio"] = found["crowd"]["tokens_per_second"] / found["one_at_a_time"]["tokens_per_second"]
    found["stopped"] = await stop_under_load(url, server)
    return found, tally


def run(seconds: float = SECONDS) -> dict[str, Any]:
    """Start a server, put it under load for so long, stop it, and check a sample of its texts."""
    command = [sys.executable, "-m", "scorelm", "serve", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = re.findall(r"http://\S+", server.stderr.readline())[0]
    try:
        found, tally = asyncio.run(measure(url, server, seconds))
    finally:
        server.kill()
    lm = ScoreLM.from_pretrained()
    checked = random.Random(0).sample(sorted(tally.texts), min(CHECKED, len(tally.texts)))
    same = sum([s.text for s in lm.generate(**request(k))] == tally.texts[k] for k in checked)
    return found | {"checked": len(checked), "same_as_alone": same, "clients": CLIENTS, "seconds": seconds}


def main() -> None:
    process.prepare()
    found = run(*map(float, sys.argv[1:2]))
    (RESULTS / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

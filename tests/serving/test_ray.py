"""Replicas on a real Ray of this machine, one of which is killed while requests come in."""

import os
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # ray's own

URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def deployed(make_lm, tmp_path_factory):
    """Two replicas of a small model."""
    path = tmp_path_factory.mktemp("ray") / "model"
    make_lm().save_pretrained(path)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    from ray import serve

    from scorelm.serving.ray import build

    serve.run(build({"model": str(path), "replicas": "2", "insecure": "true"}))
    yield
    serve.shutdown()
    ray.shutdown()


def replica_processes() -> list[int]:
    """Process ids of the replicas."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ServeReplica:default:scorelm" in line]


def ask(k: int) -> tuple[int, str]:
    """Status of a request, and its text where there is one; a broken connection is status 0."""
    try:
        answer = httpx.post(f"{URL}/v1/generate", json={"path": "bounded", "steps": 20, "seed": k % 5}, timeout=60)
    except httpx.HTTPError:
        return 0, ""
    return answer.status_code, answer.json()["samples"][0]["text"] if answer.status_code == 200 else ""


def test_requests_go_on_while_a_replica_is_killed(deployed, make_lm):
    expected = [make_lm().generate(path="bounded", steps=20, seed=k)[0].text for k in range(5)]
    before = replica_processes()
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, k) for k in range(100)]
        time.sleep(1)
        os.kill(before[0], signal.SIGKILL)
        found = [answer.result() for answer in answers]
    codes = Counter(code for code, _ in found)
    print(codes)
    assert codes[200] >= 90
    same = sum(text == expected[k % 5] for k, (_, text) in enumerate(found))
    assert same >= codes[200] - 3, "more than roundings"
    until = time.monotonic() + 60
    while len(set(replica_processes()) - {before[0]}) < 2:
        assert time.monotonic() < until
        time.sleep(0.5)
    assert ask(0) == (200, expected[0])

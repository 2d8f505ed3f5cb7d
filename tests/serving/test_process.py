"""``scorelm serve`` as a process: it says where it is, and ends well."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.thorough


@pytest.fixture
def started(make_lm, tmp_path):
    """Starts servers of a small model; each is a process and a client."""
    make_lm().save_pretrained(tmp_path / "small")
    processes = []

    def start(*words: str, **environment: str) -> tuple[subprocess.Popen[str], httpx.Client]:
        command = [sys.executable, "-m", "scorelm", "serve", str(tmp_path / "small"), "--port", "0", *words]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        processes.append(process)
        (url,) = re.findall(r"^small at (http://\S+)", process.stderr.readline())
        return process, httpx.Client(base_url=url, timeout=60)

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_is_answered(started, how):
    process, client = started()
    body = {"path": "uniform", "steps": 200, "n": 8}
    with client, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.post, "/v1/generate", json=body) for _ in range(4)]
        while "scorelm_rows 32.0" not in client.get("/metrics").text:
            time.sleep(0.02)
        process.send_signal(how)
        assert [len(answer.result().json()["samples"]) for answer in answers] == [8] * 4
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_the_token_comes_from_the_environment(started):
    _, client = started(SCORELM_TOKEN="sesame")
    with client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer sesame"}).json()["data"][0]["id"] == "small"

"""Models on the hub: pushed, fetched by name and revision, and refused in one line, by the hub's own client.

The client talks to `tests/hub.py` on the loopback interface. It uploads through Git LFS: its newer protocol, Xet, has
no server but the hub's own.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from scorelm import ScoreLM
from scorelm.cli import main
from scorelm.errors import InputError
from scorelm.model import hub as client
from scorelm.model.directory import Provenance
from scorelm.text.huggingface import HuggingFaceTokenizer

from .families import gpt2
from .hub import OWNER, TOKEN, Hub, point_client_at, serving

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client to its own httpx
NAME = f"{OWNER}/verses"
RECIPE = '[data]\nsource = "four.txt"\n'
MADE = Provenance(
    data="four.txt", steps=12, tokens=3456, holdout=0.02, fingerprint="0f1e", prices={"ordered": 2.5, "stderr": 0.1}
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, whose owner's token is set, and an empty cache."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    disable_progress_bars()
    with serving() as hub:
        point_client_at(hub.endpoint, monkeypatch)
        yield hub
    enable_progress_bars()


@pytest.fixture
def lm(make_lm) -> ScoreLM:
    lm = make_lm()
    lm.provenance, lm.recipe = MADE, RECIPE
    return lm


def same(one: ScoreLM, other: ScoreLM) -> bool:
    ours, theirs = one.denoiser.state_dict(), other.denoiser.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and one.manifest == other.manifest


def scorelm(*words: str) -> tuple[int, str, str]:
    with StringIO() as out, StringIO() as err:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(words)
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def test_what_is_pushed_is_what_is_fetched_with_a_card_that_the_hub_can_read(hub: Hub, lm: ScoreLM) -> None:
    address = lm.push_to_hub(NAME, licence="cc0-1.0", private=True, message="twelve steps")
    repository = hub.repositories[NAME]
    assert address == f"{hub.endpoint}/{NAME}/commit/{repository.branches['main']}"
    assert (repository.private, repository.messages[1:]) == (True, ["twelve steps"])
    assert repository.large == {"model.safetensors", "tokenizer.model"}
    again = ScoreLM.from_pretrained(NAME)
    assert same(again, lm) and again.recipe == RECIPE
    assert again.generate("the", steps=3) == lm.generate("the", steps=3)

    card = ModelCard(repository.commits[repository.branches["main"]]["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("cc0-1.0", "scorelm", NAME)
    assert [(one.metric_name, one.metric_value) for one in card.data.eval_results] == [("ordered", 2.5)]
    for part in ("ordered 2.500 (±0.100)", "`0f1e`", "cc0-1.0", f'from_pretrained("{NAME}")', RECIPE):
        assert part in card.text


def test_a_model_with_a_tokenizer_of_another_kind_takes_the_place_of_the_one_before(hub: Hub, lm: ScoreLM) -> None:
    lm.push_to_hub(NAME)
    tokenizer = HuggingFaceTokenizer(gpt2().to_str().encode())
    other = ScoreLM(lm.config, tokenizer, lm.schedule, lm.lengths)
    other.push_to_hub(NAME)
    assert same(ScoreLM.from_pretrained(NAME), other)


def test_a_revision_is_a_branch_or_a_commit_in_either_spelling(hub: Hub, lm: ScoreLM, make_lm) -> None:
    first = lm.push_to_hub(NAME).rpartition("/")[2]
    other = make_lm(dim=64)
    other.push_to_hub(NAME, branch="wide/one")
    for found in (ScoreLM.from_pretrained(f"{NAME}@wide/one"), ScoreLM.from_pretrained(NAME, revision="wide/one")):
        assert same(found, other)
    other.push_to_hub(NAME)
    assert same(ScoreLM.from_pretrained(NAME), other)
    assert same(ScoreLM.from_pretrained(f"{NAME}@{first}"), lm)
    with pytest.raises(InputError, match="give one of them"):
        ScoreLM.from_pretrained(f"{NAME}@main", revision=first)


def test_the_command_pushes_and_takes_the_name_wherever_a_model_is_wanted(
    hub: Hub, lm: ScoreLM, tmp_path: Path
) -> None:
    lm.save_pretrained(tmp_path / "model")
    words = ("--revision", "dev", "--message", "by hand", "--licence", "mit", "--private")
    code, out, err = scorelm("push", str(tmp_path / "model"), NAME, *words)
    repository = hub.repositories[NAME]
    commit = repository.branches["dev"]
    assert (code, out) == (0, f"{hub.endpoint}/{NAME}/commit/{commit}\n")
    assert f"scorelm sample {NAME}@dev" in err
    assert repository.private and repository.messages[-1] == "by hand"
    assert not repository.commits[repository.branches["main"]]
    assert b"license: mit" in repository.commits[commit]["README.md"]
    code, out, err = scorelm("sample", f"{NAME}@dev", "-n", "1", "--steps", "3", "--device", "cpu")
    assert (code, out.strip()) == (0, lm.generate(steps=3)[0].text.strip())
    assert f"asking the Hugging Face hub for {NAME}@dev" in err


def test_what_was_fetched_once_needs_no_hub(hub: Hub, lm: ScoreLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm.push_to_hub(NAME)
    ScoreLM.from_pretrained(NAME)
    point_client_at("http://127.0.0.1:9", monkeypatch)
    hub.requests.clear()
    assert same(ScoreLM.from_pretrained(NAME), lm)
    assert same(ScoreLM.from_pretrained(NAME, local_files_only=True), lm) and not hub.requests
    with pytest.raises(InputError, match="not in the cache"):
        ScoreLM.from_pretrained(f"{OWNER}/psalms", local_files_only=True)


def test_a_hub_that_is_silent_is_given_up(hub: Hub, lm: ScoreLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_client_at(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        for ask in (lambda: ScoreLM.from_pretrained(NAME), lambda: lm.push_to_hub(NAME)):
            began = time.monotonic()
            with pytest.raises(InputError, match=r"127\.0\.0\.1"):
                ask()
            assert time.monotonic() - began < 5


PUSH = ("push", "{model}")
BAD = {
    "no token": ((*PUSH, NAME), "HF_TOKEN", {"HF_TOKEN": ""}),
    "a wrong token": ((*PUSH, NAME), "HF_TOKEN", {"HF_TOKEN": "hf_wrong"}),
    "another's account": ((*PUSH, "ruth/verses"), "does not allow", {}),
    "no name for a repository": ((*PUSH, "a/b/c"), "user/name", {}),
    "a revision in the name": ((*PUSH, f"{NAME}@dev"), "user/name", {}),
    "no user": ((*PUSH, "verses"), "user/name", {}),
    "no network to push": ((*PUSH, NAME), "127.0.0.1:9", {"endpoint": "http://127.0.0.1:9"}),
    "nothing to push": (("push", "{model}/none", NAME), "none", {}),
    "no such model": (("sample", f"{OWNER}/psalms"), "no such model", {}),
    "no such revision": (("sample", f"{OWNER}/kept@dev"), "revision", {}),
    "private": (("sample", f"{OWNER}/kept"), "HF_TOKEN", {"HF_TOKEN": ""}),
    "no network": (("sample", NAME), "127.0.0.1:9", {"endpoint": "http://127.0.0.1:9"}),
    "no name": (("sample", "a/b/c"), "user/name", {}),
    "no model in there": (("sample", f"{OWNER}/empty"), "no config.json", {}),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_the_hub_refuses_is_one_line_with_exit_code_2(
    hub: Hub, lm: ScoreLM, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.save_pretrained(tmp_path / "model")
    lm.push_to_hub(f"{OWNER}/kept", private=True)
    hub.create(TOKEN, b'{"name": "empty"}')
    words, word, settings = BAD[kind]
    for name, value in settings.items():
        if name == "endpoint":
            point_client_at(value, monkeypatch)
        else:
            monkeypatch.setenv(name, value)
    code, out, err = scorelm(*(text.format(model=tmp_path / "model") for text in words))
    *before, message = err.splitlines()
    assert (code, out) == (2, ""), err
    assert message.startswith("scorelm: ") and word in message and len(message) < 500
    assert all(line.startswith("asking the Hugging Face hub for ") for line in before)
    assert hub.repositories.keys() == {f"{OWNER}/kept", f"{OWNER}/empty"}


@pytest.mark.thorough
def test_a_process_finds_the_hub_by_its_environment(hub: Hub, lm: ScoreLM, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path / "model")
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "scorelm", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("push", str(tmp_path / "model"), NAME).startswith(f"{hub.endpoint}/{NAME}/commit/")
    own, theirs = (run("info", str(model)) for model in (tmp_path / "model", NAME))
    assert own == theirs

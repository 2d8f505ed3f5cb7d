"""What the tests of training share: a text, recipes for it, runs, and a process that forks runs of the command."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from scorelm.config.recipe import Recipe
from scorelm.config.toml import to_toml
from scorelm.training import train

TINY = {
    "data": {"vocab_size": 300, "max_length": 32},
    "model": {"dim": 32, "layers": 2, "embedding_dim": 8},
    "training": {"rows": 4, "log_every": 1, "warmup": 3, "samples": 0, "ema": [0.9, 0.5], "device": "cpu"},
}


class Tools:
    """Functions that several test files need."""

    @staticmethod
    def recipe(text: Path, more: dict[str, Any] | None = None, **training: Any) -> Recipe:
        """The recipe of a tiny run, with other options of training, and of the rooms in `more`."""
        rooms = {room: TINY.get(room, {}) | (more or {}).get(room, {}) for room in (*TINY, "noise")}
        rooms["data"] |= {"source": str(text)}
        rooms["training"] |= training
        return Recipe.model_validate(rooms)

    @staticmethod
    def with_steps(recipe: Recipe, steps: int | None) -> Recipe:
        """The recipe with another end, or with none of its own."""
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})

    @staticmethod
    def train(recipe: Recipe, out: Path, **how: Any) -> list[str]:
        """What a run in this process says."""
        said: list[str] = []
        assert train(recipe, out, say=said.append, **how) == out / "model"
        return said

    @staticmethod
    def log(out: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    @classmethod
    def losses(cls, out: Path) -> list[float]:
        return [line["loss"] for line in cls.log(out)]

    @staticmethod
    def weights(out: Path) -> dict[str, torch.Tensor]:
        return load_file(out / "model" / "model.safetensors")

    @classmethod
    def assert_same(cls, one: Path, other: Path) -> None:
        """Two runs have equal losses, and models that are equal bit for bit."""
        assert cls.losses(one) == cls.losses(other)
        ours, theirs = cls.weights(one), cls.weights(other)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert (one / "model" / "config.json").read_text() == (other / "model" / "config.json").read_text()

    @staticmethod
    def checkpoints(out: Path) -> list[int]:
        """The steps of a run's checkpoints, all of which have to be sound."""
        steps = []
        for path in sorted((out / "checkpoints").glob("step-*")):
            written = json.loads((path / "checksums.json").read_text())["files"]
            found = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "checksums.json"}
            sums = {name: [len(v), blake2b(v, digest_size=32).hexdigest()] for name, v in found.items()}
            assert sums == {name: [v["size"], v["blake2b"]] for name, v in written.items()}, path
            steps.append(int(path.name.removeprefix("step-")))
        return steps


class Forks:
    """Starts runs of the command, with faults, as children of one process that has imported everything.

    Each child computes with two threads, as the command does where there are two cores.
    """

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | threads
        )
        self.errors = directory / "errors"

    def begin(
        self,
        *words: str,
        errors: Path | None = None,
        world: int = 1,
        environment: dict[str, str] | None = None,
        **fault: Any,
    ) -> list[int]:
        """Start a command on `world` ranks, with a fault in each; returns their process ids."""
        for path in self.errors.parent.glob(f"{self.errors.name}*"):
            path.unlink()
        job = {
            "arguments": words, "errors": str(errors or self.errors), "world": world, "fault": fault,
            "environment": environment or {},
        }  # fmt: skip
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pids: list[int] = json.loads(self.server.stdout.readline())
        return self.pids

    def end(self, patience: float = 120) -> int:
        """The exit code, of the first rank that failed if one did; what hangs is killed."""
        assert self.server.stdout is not None
        watch = threading.Timer(patience, lambda: [os.kill(pid, signal.SIGKILL) for pid in self.pids])
        watch.start()
        try:
            return int(self.server.stdout.readline())
        finally:
            watch.cancel()

    def __call__(self, *words: str, patience: float = 120, **how: Any) -> tuple[int, str]:
        """A command's exit code and what it said on stderr."""
        self.begin(*words, **how)
        return self.end(patience), self.errors.read_text()

    def output(self, *words: str, world: int = 1) -> str:
        """What a command that succeeds prints."""
        code, errors = self(*words, world=world)
        assert (code, "Warning" in errors) == (0, False), errors
        return Path(f"{self.errors}.stdout").read_text()


class Runs:
    """Runs of one recipe in forked children: whole ones, interrupted ones, and ones that go on."""

    def __init__(self, forks: Forks, recipe: Recipe, directory: Path) -> None:
        self.forks, self.recipe, self.directory = forks, recipe, directory
        self.steps, self.every = recipe.training.steps, recipe.training.save_every

    def words(self, out: Path, *flags: str) -> list[str]:
        """The command that starts a run, anew if it has no checkpoint yet, or resumes it."""
        start = ["--resume"]
        if not any(out.glob("checkpoints/step-*")):
            start = ["--recipe", str(self.directory / "recipe.toml"), *(["--overwrite"] if out.exists() else [])]
            Path(start[1]).write_text(to_toml(self.recipe))
        return ["train", "--out", str(out), *start, *flags]

    def __call__(self, out: Path, *flags: str, **how: Any) -> tuple[int, str]:
        """A run's exit code and what it said on stderr."""
        return self.forks(*self.words(out, *flags), **how)

    @cached_property
    def whole(self) -> Path:
        """A run that nothing disturbs."""
        out = self.directory / "whole"
        code, errors = self(out)
        assert code == 0, errors
        return out


@pytest.fixture(scope="package")
def tools() -> type[Tools]:
    return Tools


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names, verbs, things = ["Ruth", "Saul", "Amos", "Leah"], ["sees", "eats", "sells", "hides"], ["figs", "oil", "corn"]
    lines = [f"{a} {v} {t} and {b} {w}" for a in names for v in verbs for t in things for b in names for w in verbs]
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"{line} {k}.\n" for k, line in enumerate(lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    assert forks.server.stdin is not None
    forks.server.stdin.close()
    forks.server.wait()


@pytest.fixture(scope="package")
def make_runs(
    forks: Forks, tools: type[Tools], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Runs]:
    """Runs of the tiny recipe with other options, as `Tools.recipe` takes them."""

    def make(*more: dict[str, Any], **training: Any) -> Runs:
        return Runs(forks, tools.recipe(text, *more, **training), tmp_path_factory.mktemp("runs"))

    return make


@pytest.fixture(scope="package")
def runs(make_runs: Callable[..., Runs]) -> Runs:
    """Short runs with a checkpoint every three steps."""
    return make_runs({"model": {"layers": 1}}, steps=24, save_every=3, ema=[0.5])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As the command computes where there are two cores; tests have one thread otherwise."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, in letters that the tokenizer of the first one has."""
    pairs = [(a, b) for a in ("sails", "hills", "seas", "eels") for b in ("sand", "oil", "lead", "figs", "dills")] * 8
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text("".join(f"all {a} and all {b} die, {k}\n" for k, (a, b) in enumerate(pairs)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Networks with random weights and a tokenizer of letters, as they are published, of every family."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(97 + k) for k in range(26)] + [*"0123456789,."]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({n: k for k, n in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    sizes = {
        "vocab_size": len(names), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 40,
    }  # fmt: skip
    found = {}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    modern = ids | {"local_attention": 4, "global_attn_every_n_layers": 2}
    for family, kind, more in (
        ("Bert", "BertForMaskedLM", {}), ("ModernBert", "ModernBertForMaskedLM", modern),
        ("Llama", "LlamaForCausalLM", {}),
    ):  # fmt: skip
        torch.manual_seed(0)
        found[family] = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(**sizes, **more, initializer_range=0.3)
        getattr(transformers, kind)(config).save_pretrained(found[family])
        made.save(str(found[family] / "tokenizer.json"))
    return found

"""A run repeats bit for bit, with two threads as with one: no sum in it is in an order that threads decide."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scorelm.training.data import prepare
from scorelm.training.trainer import Trainer

ADDING = {"index_add", "scatter_add", "scatter_reduce", "index_reduce", "_embedding_bag"}
ADDING_IF_TOLD = {"index_put", "_index_put_impl", "_unsafe_index_put", "put"}
LARGE = {"model": {"dim": 64}}
"""With 32 rows, large enough for threads to share the work of every sum."""


class UnorderedSums(TorchDispatchMode):
    """Collects the operations that add many floats to one place in any order, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, told = func.overloadpacket.__name__.rstrip("_"), any(leaf is True for leaf in args)
        self.seen.add(name)
        if name in ADDING or (name in ADDING_IF_TOLD and (told or (kwargs or {}).get("accumulate"))):
            floats = [t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            self.found += [f"{name} of {floats[0]}"] * bool(floats)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operations that PyTorch knows to be in no order, and can't replace, raise an error."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_sums_of_an_indexed_gradient_would_be_found() -> None:
    table = torch.ones(5, 3, requires_grad=True)
    with UnorderedSums() as sums:
        table[torch.tensor([1, 1])].sum().backward()
    assert sums.found == ["index_put of torch.float32"]


@pytest.mark.parametrize("objective", ["score", "masked", "autoregressive"])
def test_no_sum_of_a_step_is_in_an_order_that_threads_decide(
    tools: Any, text: Path, tmp_path: Path, deterministic: None, objective: str
) -> None:
    rooms = {"model": {"noise_conditioning": "film"}}
    terms = {"likelihood_weight": 0.1, "z_loss": 0.1, "self_conditioning": 1}
    recipe = tools.recipe(text, rooms, objective=objective, optimizer="muon", **terms)
    trainer = Trainer(recipe, prepare(recipe.data, tmp_path, False, lambda text: None))
    with UnorderedSums() as sums:
        trainer.step()
        trainer.measure_heldout()
    assert {"embedding_dense_backward", "_fused_adamw"} <= sums.seen
    assert sums.found == []


def repeat(tools: Any, text: Path, directory: Path, times: int) -> None:
    """A run, as often again, is the same; so is one that goes on from its checkpoint."""
    recipe = tools.recipe(text, LARGE, rows=32, steps=12, save_every=6)
    tools.train(recipe, directory / "whole")
    for k in range(times):
        tools.train(recipe, directory / f"again-{k}")
        tools.assert_same(directory / f"again-{k}", directory / "whole")
        resumed = Path(shutil.copytree(directory / f"again-{k}", directory / f"resumed-{k}"))
        shutil.rmtree(resumed / "checkpoints" / "step-00000012")
        tools.train(recipe, resumed, resume=True)
        tools.assert_same(resumed, directory / "whole")


@pytest.mark.thorough
def test_two_threads_repeat_a_run_bit_for_bit(tools: Any, text: Path, tmp_path: Path, two_threads: None) -> None:
    repeat(tools, text, tmp_path, 1)


@pytest.mark.slow
def test_two_threads_repeat_a_run_ten_times(tools: Any, text: Path, tmp_path: Path, two_threads: None) -> None:
    repeat(tools, text, tmp_path, 10)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [40, 80])
def test_the_command_repeats_a_run_of_the_bible_ten_times(forks: Any, tools: Any, tmp_path: Path, steps: int) -> None:
    """Uninterrupted in a process of its own, then in forked ones, half of which are killed and resumed."""
    words = ["--data", "kjv", "--steps", str(steps), "--model.dim", "64", "--save-every", "20"]
    command = [sys.executable, "-m", "scorelm", "train", "--out", str(tmp_path / "whole"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    for k in range(10):
        out = tmp_path / f"again-{k}"
        begin = ["train", "--out", str(out)]
        if k % 2:
            assert forks(*begin, *words, kill_after=(21 + k, 0.02 * k))[0] == -9
        code, errors = forks(*begin, *(["--resume"] if k % 2 else words), patience=600)
        assert code == 0, errors
        tools.assert_same(out, tmp_path / "whole")

"""LoRA: the layers' own weights stay, adapters and the rest are trained, and the model that is written has neither."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scorelm import ScoreLM, train
from scorelm.cli import main
from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.errors import InputError
from scorelm.model.denoiser import Denoiser
from scorelm.model.layout import Layout
from scorelm.training.data import prepare
from scorelm.training.initial import read_initial
from scorelm.training.trainer import Trainer

pytest.importorskip("peft")
FAMILIES = "Bert", "ModernBert", "Llama"


def start(source: Path, network: Path, **training: Any) -> Recipe:
    options = {"rows": 4, "log_every": 1, "warmup": 3, "samples": 0, "ema": (0.5, 0.9), "device": "cpu", "lora": 2}
    data = DataConfig(source=str(source), max_length=32, holdout=0.2)
    given = TrainingConfig(init_from=network, **options | training)
    return Recipe(data=data, model=ModelConfig(embedding_dim=6), training=given)


def make(source: Path, network: Path, home: Path, **training: Any) -> Trainer:
    recipe, initial = read_initial(start(source, network, **training), network)
    return Trainer(recipe, prepare(recipe.data, home, False, print), initial=initial)


def says(denoiser: Denoiser, ids: int = 40) -> torch.Tensor:
    """What a denoiser says of a row without evidence behind a given token."""
    one, x = torch.ones(1, 7, dtype=torch.long), denoiser.embedding(torch.arange(7)[None] % ids)
    sigma = torch.tensor([[0.0, *[torch.inf] * 6]])
    with torch.no_grad():
        return denoiser.predict(x, sigma, Layout.one_stream(one, one.cumsum(1) - 1, one)).logits_NV


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_and_the_rest_are_trained_and_the_layers_stay(
    networks: dict[str, Path], other: Path, tmp_path: Path, family: str, optimizer: str
) -> None:
    plain = make(other, networks[family], tmp_path, lora=0)
    trainer = make(other, networks[family], tmp_path, optimizer=optimizer, lr=0.01)
    learner = trainer.learner
    assert torch.equal(says(learner.denoiser.eval()), says(plain.learner.denoiser.eval()))  # nothing is added at first
    before = {name: p.clone() for name, p in learner.denoiser.train().named_parameters()}
    for _ in range(4):
        trainer.step()
    stayed = {n for n, p in learner.denoiser.named_parameters() if torch.equal(p, before[n])}
    assert stayed == {n for n in before if ".blocks." in n and ".lora_" not in n}
    assert (
        {n.rpartition(".lora_")[0] for n in before if ".lora_" in n}
        == {n.removesuffix(".base_layer.weight") for n in before if n.endswith(".base_layer.weight")}
        != set()
    )
    held = {id(p) for one in learner.optimizers for group in one.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in learner.denoiser.named_parameters() if n not in stayed}
    for average in learner.averages.values():
        for (name, own), p in zip(average.named_parameters(), learner.denoiser.parameters(), strict=True):
            assert (own is p) == (name in stayed) and (name in stayed or not torch.equal(own, p)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_that_is_written_says_the_same_and_knows_of_no_adapters(
    networks: dict[str, Path], other: Path, tmp_path: Path, family: str
) -> None:
    trainer = make(other, networks[family], tmp_path, lr=0.05)
    for _ in range(4):
        trainer.step()
    trainer.progress.heldout = {"weights": 0.0}
    lm, learner = trainer.model(), trainer.learner
    assert lm is not None
    assert (
        lm.denoiser.state_dict().keys()
        == make(other, networks[family], tmp_path, lora=0).learner.denoiser.state_dict().keys()
    )
    found, expected = says(lm.denoiser), says(learner.denoiser.eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    network = make(other, networks[family], tmp_path, lora=0).learner.weights("weights")
    moved = {n for n, w in lm.denoiser.state_dict().items() if ".blocks." in n and not torch.equal(w, network[n])}
    assert moved == {n for n in network if ".blocks." in n and network[n].ndim == 2}


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_such_a_run_goes_on_bit_for_bit(
    tools: Any, networks: dict[str, Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    whole, halves, again = (tmp_path / name for name in ("whole", "halves", "again"))
    first = start(other, networks["Llama"], steps=4, decay=0.0, save_every=4, optimizer=optimizer)
    tools.train(tools.with_steps(first, 8), whole)
    tools.train(first, halves)
    monkeypatch.setattr("scorelm.training.run.read_initial", None)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--out", str(halves), "--resume", "--steps", "8"])
    tools.assert_same(whole, halves)
    with pytest.raises(InputError, match="--lora can't change"):
        train(start(other, networks["Llama"], steps=9, lora=3, optimizer=optimizer), halves, resume=True)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert ScoreLM.from_pretrained(whole).generate(n=1, steps=4, path="blocks:2")[0].nfe > 0
    tools.train(start(other, whole, steps=1, lora=0), again)


def test_the_first_line_says_how_much_is_trained(
    tools: Any, networks: dict[str, Path], other: Path, tmp_path: Path
) -> None:
    said = tools.train(start(other, networks["Bert"], steps=1), tmp_path / "run")
    assert any("M of them trained, from " in line for line in said)


def test_what_cannot_be_is_refused_in_one_line(
    networks: dict[str, Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["train", "--out", str(tmp_path / "run"), "--data", str(other), "--steps", "2", "--lora", "2"]
    monkeypatch.setitem(sys.modules, "peft", None)
    for words, says in (
        ([], "lora adapts a model: name it with init_from"),
        (["--init-from", str(networks["Bert"]), "--max-length", "32"], "pip install 'scorelm[lora]'"),
        (["--init-from", str(networks["Bert"]), "--lora", "-1"], "lora"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main([*command, *words])
        assert says in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()

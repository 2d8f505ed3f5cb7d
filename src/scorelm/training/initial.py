"""What a run starts from where it does not start from nothing: a model whose weights, sizes and tokenizer it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from scorelm.config.recipe import ModelConfig, NoiseConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.errors import InputError
from scorelm.lm import ScoreLM
from scorelm.model.directory import Provenance, find_directory, read_manifest
from scorelm.model.gguf import find_gguf, unpack
from scorelm.model.pretrained_files import is_network, read_network
from scorelm.noise.schedule import Gumbel, Schedule
from scorelm.text.tokenizer import find_tokenizer, load_tokenizer

NETWORK_LR = 5e-4
"""Peak learning rate that suits weights which others have trained; our own default would undo them."""


class Initial(NamedTuple):
    """What a model gives to a run that starts from it."""

    weights: dict[str, Tensor]
    """Of its denoiser: the average that it was saved with, or what a pretrained network has of them."""
    schedule: Schedule | None = None
    provenance: Provenance | None = None
    tells_next_token: bool = False
    """Whether its given tokens have learned to tell the next one."""

    def start_schedule(self, made: Schedule, noise: NoiseConfig) -> Schedule:
        """The schedule to begin with: where it is fitted, the model's own in place of `made`, over the range given."""
        if not (isinstance(made, Gumbel) and isinstance(self.schedule, Gumbel)):
            return made
        given = {"sigma_min": noise.sigma_min, "sigma_max": noise.sigma_max}
        return replace(self.schedule, **{name: value for name, value in given.items() if value is not None})


def describe_model(recipe: Recipe, name: Path) -> Recipe:
    """What a model says of a run that starts from it: its sizes, its tokenizer and its objective, as a recipe.

    A pretrained network can learn any objective, with embeddings of any size, at a learning rate of its own.

    Raises:
        InputError: no such model.
    """
    directory = find_start(name)
    place, training, normalize = find_tokenizer(directory), recipe.training, recipe.data.normalize
    if is_network(directory):
        network, weights = open_network(directory)
        vocab_size, objective, lr = len(weights["token_in"]), training.objective, NETWORK_LR
        model = network.model_copy(update={"embedding_dim": recipe.model.embedding_dim})
    else:
        manifest = read_manifest(directory / "config.json")
        model, vocab_size, objective = manifest.model, manifest.vocab_size, manifest.objective
        lr = TrainingConfig().lr
        normalize = manifest.provenance.normalize
    data = DataConfig(tokenizer=place, vocab_size=vocab_size, normalize=normalize)
    return Recipe(data=data, model=model, training=TrainingConfig(objective=objective, init_from=name, lr=lr))


def find_start(name: Path) -> Path:
    """The directory of the model of that name, which may be a GGUF file, or be on the hub.

    Raises:
        InputError: there is none, or the file cannot be unpacked.
    """
    file = find_gguf(name)
    return find_directory(name, {}) if file is None else unpack(file)


def open_network(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A pretrained network's sizes and weights, with a table for all tokens of its tokenizer; see `read_network`."""
    return read_network(directory, load_tokenizer(find_tokenizer(directory)).vocab_size)


def adopt(recipe: Recipe, own: Recipe) -> Recipe:
    """A recipe with the sizes and the tokenizer of the model that it starts from, and its learning rate if none is set.

    Args:
        recipe: the sizes and the tokenizer that are set in it must be those of the model.
        own: what `describe_model` says of the model, or the recipe of a run that has started from it.

    Raises:
        InputError: options that contradict the model; names their flags.
    """
    sizes = dict(own.model) | own.model.size._asdict()
    text = own.data.model_dump(include={"tokenizer", "vocab_size", "byte_fallback", "normalize"})
    model, data = recipe.model, recipe.data
    wrong = [f"--model.{k}" for k in model.model_fields_set if getattr(model, k) not in (None, sizes[k])]
    wrong += [f"--{k}" for k in data.model_fields_set & text.keys() if getattr(data, k) not in (None, text[k])]
    if wrong:
        flags = ", ".join(sorted(wrong)).replace("_", "-")
        raise InputError(
            f"{flags}: a run with --init-from has the sizes and the tokenizer of the model that it starts from, and "
            f"{own.training.init_from} has others: leave {'it' if len(wrong) == 1 else 'them'} out"
        )
    training = recipe.training
    if "lr" not in training.model_fields_set:
        training = training.model_copy(update={"lr": own.training.lr})
    return recipe.model_copy(update={"model": own.model, "data": data.model_copy(update=text), "training": training})


def read_initial(recipe: Recipe, name: Path) -> tuple[Recipe, Initial]:
    """A new run's recipe with what the model of that name decides, and what the run takes from it.

    Raises:
        InputError: no such model, another objective, other sizes, or longer rows than a pretrained network can read.
    """
    own = describe_model(recipe, name)
    if own.training.objective != recipe.training.objective:
        raise InputError(
            f"--init-from {name}: its objective is {own.training.objective}, and that of the run "
            f"{recipe.training.objective}: add --objective {own.training.objective}, or start from another model"
        )
    recipe, directory = adopt(recipe, own), find_start(name)
    if not is_network(directory):
        lm = ScoreLM.from_pretrained(directory)
        return recipe, Initial(lm.denoiser.state_dict(), lm.schedule, lm.provenance, lm.denoiser.tells_next_token)
    network, length = own.model.network, recipe.data.max_length
    if network is not None and length > network.positions:
        raise InputError(f"--max-length {length}: {name} has positions for {network.positions} tokens")
    return recipe, Initial(open_network(directory)[1], tells_next_token=network is not None and network.causal)


def check_held_out(recipe: Recipe, fingerprint: str, before: Provenance | None) -> None:
    """Refuse to hold out text that a model which a run starts from, directly or not, has learned.

    What a smaller share holds out is part of what a larger one does.

    Args:
        recipe: the run.
        fingerprint: of its text.
        before: how the model came about.

    Raises:
        InputError: it has learned text that would be held out.
    """
    while before is not None:
        share, asked = before.holdout, recipe.data.holdout
        if before.fingerprint == fingerprint and share is not None and share < asked:
            raise InputError(
                f"--holdout {asked:g}: {recipe.training.init_from} was trained on this text with {share:g} of it held "
                f"out, and has learned the rest: give --holdout {share:g} or less"
            )
        before = before.before

"""``scorelm info``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from scorelm.cli.model import NAMES, Device, open_model
from scorelm.cli.printing import show
from scorelm.cli.verb import Verb
from scorelm.errors import InputError, brief

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM


class InfoVerb(Verb):
    """Options of ``scorelm info``.

    Of a model: what kind it is, its sizes and noise levels, what it was trained on and for how long. Of a text (kjv, a
    file, a directory of files, or with --hub-split or --hub-config a Hugging Face dataset): how large it is, and what
    scorelm train would choose for it on this machine.
    """

    model: Annotated[Path | None, Positional, arg(metavar="[MODEL OR TEXT]", help=f"{NAMES}. Or a text.")] = None
    field: Annotated[str, arg(help="Of a text: column that holds it, in files with columns.")] = "text"
    csv_separator: Annotated[str | None, arg(help="CSV separator of a text; by default found in its header.")] = None
    split: Annotated[str | None, arg(help="Of a text: what is one example; default as in scorelm train.")] = None
    hub_split: Annotated[str | None, arg(help="Of a Hugging Face dataset: its split; by default train.")] = None
    hub_config: Annotated[str | None, arg(help="Of a Hugging Face dataset: configuration; by default its own.")] = None
    device: Device = "auto"
    as_json: Annotated[bool, arg(name="json")] = False
    """Print JSON."""

    def run(self) -> int:
        """Print the facts."""
        of_hub = self.hub_split is not None or self.hub_config is not None
        if of_hub and self.model is None:
            raise InputError("--hub-split and --hub-config are of a Hugging Face dataset: name it")
        if self.model is not None and (of_hub or is_text(self.model)):
            return self.propose(str(self.model))
        facts = describe(open_model(self.model))
        known = {name: value for name, value in facts.items() if value not in (None, ()) and value is not False}
        show(json.dumps(facts, indent=2) if self.as_json else "\n".join(map(line, known, known.values())))
        return 0

    def propose(self, source: str) -> int:
        """Print what would be trained on the text."""
        from scorelm.config.recipe import Recipe, TrainingConfig
        from scorelm.config.text import DataConfig
        from scorelm.training.proposal import propose

        data = DataConfig(
            source=source, field=self.field, csv_separator=self.csv_separator, split=self.split,
            hub_split=self.hub_split, hub_config=self.hub_config,
        )  # fmt: skip
        recipe, lines = propose(Recipe(data=data, training=TrainingConfig(device=self.device)))
        how = {"--field": self.field if self.field != "text" else None, "--csv-separator": self.csv_separator,
               "--split": self.split, "--hub-split": self.hub_split, "--hub-config": self.hub_config}  # fmt: skip
        words = [word for flag, value in how.items() if value is not None for word in (flag, value)]
        command = shlex.join(["scorelm", "train", "--data", source, *words, "--out", "runs/mine"])
        if self.as_json:
            show(json.dumps({"says": lines, "recipe": recipe.model_dump(mode="json")}, indent=2))
        else:
            show("\n".join([*lines, f"to train it: {command}"]))
        return 0


def is_text(path: Path) -> bool:
    """Whether a name is that of a text rather than of a model."""
    if path.is_dir():
        return not any((path / name).exists() for name in ("config.json", "model", "recipe.toml"))
    return path.is_file() or str(path) == "kjv"


def describe(lm: ScoreLM) -> dict[str, Any]:
    """What is known of a model, by name."""
    return {
        "objective": lm.objective.name,
        "parameters": lm.parameters_count,
        **lm.config.model_dump(exclude={"network"}),
        **lm.config.size._asdict(),
        "vocab_size": lm.tokenizer.vocab_size,
        "max_length": lm.max_length,
        "schedule": type(lm.schedule).__name__.lower(),
        "sigma_min": lm.schedule.sigma_min,
        "sigma_max": lm.schedule.sigma_max,
        **lm.provenance.model_dump(exclude={"prices", "before", "heldout_loss"}),
        "heldout_training_loss": lm.provenance.heldout_loss,
        **{f"heldout_{name}": value for name, value in lm.provenance.prices.items()},
    }


def line(name: str, value: object) -> str:
    """A fact as a line of text."""
    words = "yes" if value is True else value
    words = f"{words:,}" if isinstance(words, int) else f"{words:.4g}" if isinstance(words, float) else words
    words = ", ".join(map(str, words)) if isinstance(words, tuple) else words
    return f"{name.replace('_', ' '):<22} {brief(str(words))}"

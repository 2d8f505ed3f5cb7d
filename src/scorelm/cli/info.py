"""``scorelm info``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from scorelm.cli.model import DEFAULT_MODEL, Model, open_model
from scorelm.cli.printing import show
from scorelm.cli.verb import Verb
from scorelm.errors import brief

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM


class InfoVerb(Verb):
    """Options of ``scorelm info``.

    Prints what kind of model it is, its sizes and noise levels, what it was trained on and for how long.
    """

    model: Model = DEFAULT_MODEL
    as_json: Annotated[bool, arg(name="json")] = False
    """Print JSON."""

    def run(self) -> int:
        """Print the facts."""
        facts = describe(open_model(self.model))
        show(json.dumps(facts, indent=2) if self.as_json else "\n".join(map(line, facts, facts.values())))
        return 0


def describe(lm: ScoreLM) -> dict[str, Any]:
    """What is known of a model, by name."""
    return {
        "objective": lm.objective.name,
        "parameters": lm.parameters_count,
        **lm.config.size._asdict(),
        "embedding_dim": lm.config.embedding_dim,
        "noise_conditioning": lm.config.noise_conditioning,
        "vocab_size": lm.tokenizer.vocab_size,
        "max_length": lm.max_length,
        "schedule": type(lm.schedule).__name__.lower(),
        "sigma_min": lm.schedule.sigma_min,
        "sigma_max": lm.schedule.sigma_max,
        **lm.provenance.model_dump(),
    }


def line(name: str, value: object) -> str:
    """A fact as a line of text."""
    return f"{name.replace('_', ' '):<20} {f'{value:,}' if isinstance(value, int) else brief(value)}"

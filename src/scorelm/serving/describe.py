"""What the server says of its model: sizes, paths, solvers, limits, and something to try."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from scorelm.config.generation import Infilling
from scorelm.config.registry import summary
from scorelm.config.serving import Serving
from scorelm.errors import InputError
from scorelm.lm import ScoreLM
from scorelm.model.directory import Provenance
from scorelm.sampling.halting import CRITERIA
from scorelm.sampling.paths import PATHS
from scorelm.sampling.request import MOST_STEPS, Settings
from scorelm.sampling.solvers import SOLVERS

EXAMPLES = {
    "kjv": {
        "prompts": ["And it came to pass", "In the beginning", "Blessed are they that"],
        "blanks": [
            "And God said, Let there be ____: and there was light.",
            "The LORD is my ____; I shall not want.",
            "Blessed are the ____: for they shall see ____.",
        ],
    }
}
"""By the text that a model was trained on."""


def describe(lm: ScoreLM, name: str, limits: Serving) -> dict[str, Any]:
    """The answer of ``GET /v1/model``."""
    made = lm.provenance
    return {
        "name": name,
        "title": f"{lm.objective.title} language model".removeprefix("A ").removeprefix("An "),
        "objective": lm.objective.name,
        "about": trained(made),
        "parameters": lm.parameters_count,
        "vocab_size": lm.tokenizer.vocab_size,
        "max_length": lm.max_length,
        "norm": lm.norm,
        "infills": fills(lm, None),
        "defaults": Infilling(steps=min(MOST_STEPS, limits.most_steps)).model_dump()
        | {"path": lm.objective.default_path, "length": None},
        "paths": [one | {"infills": fills(lm, one["name"])} for one in registry(PATHS)],
        "solvers": registry(SOLVERS),
        "halting": registry(CRITERIA),
        "limits": {
            "texts": limits.most_texts,
            "steps": limits.most_steps,
            "length": min(limits.most_length, lm.max_length),
            "bytes": limits.most_bytes,
            "seconds": limits.timeout,
        },
        "examples": EXAMPLES.get(made.data or "", {"prompts": [], "blanks": []}),
    }


def trained(made: Provenance) -> str:
    """What the model was trained on, after what the model that it started from was; nothing where that is not known."""
    if not made.data:
        return ""
    own, earlier = f"{made.tokens:,} tokens of {made.data}", trained(made.before) if made.before else ""
    return f"{earlier}, then on {own}" if earlier else f"trained on {own}"


def registry(entries: Mapping[str, Callable[..., object]]) -> list[dict[str, str]]:
    """The names of a registry, how they are written with their numbers, and what they do."""
    found = []
    for name, function in entries.items():
        numbers = ",".join(parameter.upper() for parameter in inspect.signature(function).parameters)
        usage = f"{name}:{numbers}" if numbers else name
        found.append({"name": name, "usage": usage, "about": summary(function)})
    return found


def fills(lm: ScoreLM, path: str | None) -> bool:
    """Whether the model can fill in blanks along a path."""
    try:
        lm.objective.allows_infilling(Settings.of(Infilling(path=path), lm.objective.default_path))
    except InputError:
        return False
    return True

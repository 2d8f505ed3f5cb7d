"""Paths, solvers and halting criteria as ``--help`` lists them: from their registries, and from nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from scorelm.cli.printing import filled
from scorelm.config.registry import summary


def generation_help() -> str:
    """What a text can be written with."""
    from scorelm.sampling.halting import CRITERIA
    from scorelm.sampling.paths import PATHS
    from scorelm.sampling.solvers import SOLVERS

    return "\n\n".join(
        (
            listed("Paths, for --path: which noise goes first", PATHS),
            listed("Solvers, for --solver: how a position goes from one noise level to the next", SOLVERS),
            listed("Criteria, for --halt: when a text has settled", CRITERIA),
            "Numbers may be left out: ramp and ramp:0.25 are the same.",
        )
    )


def pricing_help() -> str:
    """What a text can be priced on."""
    from scorelm.sampling.paths import PATHS

    return listed("Paths, for --path with --steps: which noise goes first", PATHS)


def listed(title: str, registry: Mapping[str, Callable[..., object]]) -> str:
    """A registry as lines of text: a name with its numbers, and below it the first line of its docstring.

    Args:
        title: stands above.
        registry: functions by name, whose arguments are the numbers that may follow the name.
    """
    lines = [title]
    for name, function in registry.items():
        lines += [f"  {written(name, function)}", filled(summary(function), indent=6)]
    return "\n".join(lines)


def written(name: str, function: Callable[..., object]) -> str:
    """A name with the numbers it takes and their defaults: ``ramp:SLOPE (default: 0.25)``."""
    parameters = inspect.signature(function).parameters.values()
    if not parameters:
        return name
    full = f"{name}:{','.join(p.name.upper() for p in parameters)}"
    if any(p.default is None for p in parameters):
        return f"{name}, or {full}"
    return f"{full} (default: {','.join(f'{p.default:g}' for p in parameters)})"

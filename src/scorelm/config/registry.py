"""Registries of things that are written as a name with numbers: ``ramp:0.25``, ``posterior:50,0.9``, ``patience:5``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from scorelm.errors import InputError, brief

Made = TypeVar("Made")


def read(text: str, registry: Mapping[str, Callable[..., Made]], what: str) -> Made:
    """Call the entry of `registry` that `text` names, with the numbers that stand after a colon.

    Raises:
        InputError: no such name, something that is not a number, or too many numbers.
    """
    name, _, arguments = text.partition(":")
    if name not in registry:
        raise InputError(f"no {what} {brief(name)!r}: choose {', '.join(registry)}")
    numbers = []
    for argument in arguments.split(",") if arguments else []:
        try:
            numbers.append(float(argument))
        except ValueError:
            raise InputError(f"{what} {brief(text)!r}: {brief(argument)!r} is not a number") from None
    try:
        inspect.signature(registry[name]).bind(*numbers)
    except TypeError:
        raise InputError(f"{what} {name!r} takes fewer numbers than {brief(arguments)!r}") from None
    return registry[name](*numbers)


def summary(function: Callable[..., object]) -> str:
    """The first line of a docstring, without marks of code."""
    return (inspect.getdoc(function) or "").partition("\n")[0].replace("`", "")


def need(name: str, quantity: str, value: float) -> float:
    """The value, if it is 0 or more and finite.

    Raises:
        InputError: it is not.
    """
    if not 0 <= value < math.inf:
        raise InputError(f"{name} needs a {quantity} of 0 or more, got {value:g}")
    return value

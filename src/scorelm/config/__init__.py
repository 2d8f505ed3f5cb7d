"""Every option, declared once: `recipe` is a training run, `generation` a request to a trained model.

The attribute docstrings of these models are the text of ``--help`` and of ``help(lm.generate)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from scorelm.errors import InputError, at_home, brief


class Options(BaseModel):
    """Base of all options: immutable, finite, unknown names refused, attribute docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        return at_home(value) if isinstance(value, Path) else value

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The options with these values, the others at their defaults.

        Raises:
            InputError: an unknown name, with the nearest right one, or a bad value.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "extra_forbidden":
                raise InputError(unknown(str(first["loc"][0]), list(cls.model_fields))) from None
            raise InputError(explain(error)) from None


def unknown(name: str, known: list[str]) -> str:
    """What to say of an option that there is not."""
    near = get_close_matches(name, known, 1)
    return f"no option {brief(name)!r}: " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}")


def named(name: str, *aliases: str) -> Any:
    """A command-line flag called ``--name``, with aliases, wherever the option sits in the tree."""
    return tyro.conf.arg(name=name, aliases=aliases or None, prefix_name=False)


def explain(error: ValidationError) -> str:
    """The first problem of a validation error in one line: `model.dim: Input should be ... (got 'x')`."""
    return explain_problem(error.errors()[0])


def explain_problem(problem: Mapping[str, Any]) -> str:
    """A problem, as pydantic lists it, in one line."""
    where = brief(".".join(str(part) for part in problem["loc"]))
    message = brief(problem["msg"].removeprefix("Value error, "))
    return (
        f"{where}: {message} (got {brief(problem['input'])})" if where and problem["type"] != "value_error" else message
    )

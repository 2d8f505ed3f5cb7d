"""Recipes as TOML files: read with care, written so that they read back the same."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scorelm.config import Options, explain
from scorelm.config.recipe import Recipe
from scorelm.errors import InputError, brief, exists, read_bounded

MOST_RECIPE_BYTES = 1 << 20


def recipe_directory() -> Path:
    """Where the named recipes are: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).parents[1]
    return next(d for d in (package / "recipes", package.parents[1] / "recipes") if d.is_dir())


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name (`demo`) or file.

    Raises:
        InputError: no such recipe, not TOML, an unknown option or a bad value; names the file and the option.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = recipe_directory() / f"{name}.toml"
    if not exists(path) or path.is_dir():
        known = ", ".join(sorted(p.stem for p in recipe_directory().glob("*.toml")))
        raise InputError(f"no recipe {brief(repr(name))}: give a .toml file or one of {known}")
    try:
        return Recipe.model_validate(tomllib.loads(read_bounded(path, MOST_RECIPE_BYTES).decode("utf-8")))
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {brief(str(error))}") from None


def to_toml(options: Options) -> str:
    """Write options as TOML that `load_recipe` reads back to an equal tree; unset options are left out."""
    lines: list[str] = []

    def write(table: dict[str, Any], path: str) -> None:
        nested = {k: v for k, v in table.items() if isinstance(v, dict)}
        plain = {k: v for k, v in table.items() if k not in nested and v is not None}
        if path and plain:
            lines.append(f"\n[{path}]")
        lines.extend(f"{key} = {toml_value(value)}" for key, value in plain.items())
        for key, value in nested.items():
            write(value, f"{path}.{key}" if path else key)

    write(options.model_dump(mode="json"), "")
    return "\n".join(lines).strip() + "\n"


def toml_value(value: Any) -> str:
    """A scalar or list in TOML's notation: JSON's, with the one control character escaped that JSON leaves."""
    if isinstance(value, bool | int | float | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(toml_value(item) for item in value) + "]"

"""What a verb is, and how its words become its options: tyro, told how the options are to be shown."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

import tyro
from pydantic import ValidationError
from pydantic_core import PydanticUndefined
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from scorelm.cli.printing import filled, show
from scorelm.config import Options, explain
from scorelm.errors import InputError

Kind = TypeVar("Kind", bound="Verb")
METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


class Verb(Options):
    """The options of a verb, as fields, and what it does with them.

    The help of the verb shows its summary, its docstring without the first line, its options, and `more_help`.
    """

    less_memory: ClassVar[str] = "use a smaller model"
    """What to do where memory is not enough."""

    @abstractmethod
    def run(self) -> int:
        """Do it, and return the exit code."""

    @classmethod
    def before(cls, words: Sequence[str]) -> Self | None:
        """The options that the words of the command line are put on top of; None for the class's own defaults."""
        return None

    @classmethod
    def more_help(cls) -> str:
        """What ``--help`` says below the options."""
        return ""


def load(name: str) -> type[Verb]:
    """The class of a verb: `SampleVerb` of `scorelm.cli.sample`, and so on."""
    kind: type[Verb] = getattr(import_module(f"scorelm.cli.{name}"), f"{name.title()}Verb")
    return kind


def parse(name: str, summary: str, words: Sequence[str]) -> Verb:
    """A verb with the options that the words give.

    Raises:
        InputError: a value that is out of range.
        SystemExit: help was asked for (0), or tyro has said what it cannot read (2).
    """
    kind = load(name)
    details = (kind.__doc__ or "").partition("\n\n")[2]
    try:
        return read(kind, words, kind.before(words), f"scorelm {name}", f"{summary}\n{filled(details, indent=2)}")
    except SystemExit:
        if asks_for_help(words) and (more := kind.more_help()):
            show(f"\n{more}")
        raise


def read(kind: type[Kind], words: Sequence[str], start: Kind | None, prog: str = "scorelm", about: str = "") -> Kind:
    """The options that words give, on top of those to start from; see `parse` for what is raised."""
    default = tyro.MISSING_NONPROP if start is None else start
    try:
        found: Kind = tyro.cli(kind, args=words, default=default, prog=prog, description=about, registry=registry())
    except Refused as refused:
        raise InputError(str(refused)) from None
    return found


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the words ask for help and for nothing else."""
    return bool({"-h", "--help"} & set(words))


class Refused(Exception):
    """A value that an option does not take; no ValueError, which tyro would print in a box of its own."""


def registry() -> ConstructorRegistry:
    """How tyro makes our options."""
    rules = ConstructorRegistry()
    rules.struct_rule(make_options)
    return rules


def make_options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The flags of an `Options` class, and what makes an instance of their values; None for another class."""
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, Options)):
        return None

    def instance(**values: Any) -> Options:
        try:
            return kind(**values)
        except ValidationError as error:
            raise Refused(explain(error)) from None

    fields = []
    for name, field in kind.model_fields.items():
        default = getattr(info.default, name) if isinstance(info.default, kind) else field.get_default()
        default = tyro.MISSING_NONPROP if default is PydanticUndefined else default
        own = [mark for mark in field.metadata if hasattr(mark, "metavar")]
        text = " ".join((field.description or next((mark.help for mark in own), None) or "").split())
        sign = next((mark.metavar for mark in own), None) or metavar(field.annotation)
        shown = [tyro.conf.arg(metavar=sign, help_behavior_hint=hint(text))]
        if field.annotation is bool and issubclass(kind, Verb) and not field.default:
            shown.append(tyro.conf.FlagCreatePairsOff)
        annotated: Any = Annotated[(field.rebuild_annotation(), *shown)]
        fields.append(StructFieldSpec(name, annotated, default, text))
    return StructConstructorSpec(instance, tuple(fields))


def metavar(annotation: Any) -> str | None:
    """What stands for the value of an option that may be left unset; None where tyro knows by itself."""
    parts = get_args(annotation)
    if NoneType not in parts:
        return None
    (kind,) = (part for part in parts if part is not NoneType)
    while get_args(kind):  # Annotated
        kind = get_args(kind)[0]
    return METAVARS.get(kind)


def hint(text: str) -> Callable[[str], str]:
    """How a default is told: not at all where it is unset and the text says what happens then."""

    def told(default: str) -> str:
        if not default or (default == "None" and "default" in text):
            return ""
        return f"(default: {({'None': 'off', 'False': 'off', 'True': 'on'}).get(default, default)})"

    return told

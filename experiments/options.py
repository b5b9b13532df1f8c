"""Command-line options of a preset: every field of every component, by tyro."""

import dataclasses
import inspect
import pathlib
import types
import typing
from typing import Annotated, Any, TypeVar

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from experiments.console import UsageError

Config = TypeVar("Config")

_REGISTRY = ConstructorRegistry()


@dataclasses.dataclass(frozen=True)
class Launch:
    """Options of a run; those of its configuration follow below.

    Attributes:
        config: the configuration.
        out: folder for everything that the run leaves behind.
        resume: go on with the run that is in the folder.
    """

    config: Annotated[Any, tyro.conf.arg(name="")]
    out: pathlib.Path
    resume: bool = False


def parse(default: Config, arguments: list[str], *, command: str) -> Config:
    """Returns `default` with the fields that `arguments` override.

    A preset decides the classes, options decide their fields: `--estimator.window 20`.
    Prints help or errors and exits as usual for a command line.

    Args:
        default: a frozen dataclass, components and all.
        arguments: what was typed.
        command: what was typed before them, for the help.

    Raises:
        UsageError: if the fields of `default` itself do not belong together.
    """
    try:
        return tyro.cli(
            type(default),
            default=default,
            args=arguments,
            prog=command,
            description=(inspect.getdoc(type(default)) or "").partition("\n")[0],
            registry=_REGISTRY,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (TypeError, ValueError) as error:
        # Of a field of a component tyro tells it, of those of the whole it does not.
        raise UsageError(f"{error} See {command} --help.") from error


@_REGISTRY.struct_rule
def _component(info: StructTypeInfo) -> StructConstructorSpec | None:
    # By the default's class and not by the annotation, which may be a protocol or a
    # union that tyro could not look into.
    default = info.default
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return None
    cls = type(default)
    if cls.__module__.startswith("tyro."):
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    help_of = _field_help(cls)
    fields = [
        StructFieldSpec(
            name=f.name,
            type=_narrow(hints[f.name], getattr(default, f.name)),
            default=getattr(default, f.name),
            helptext=help_of.get(f.name),
        )
        for f in dataclasses.fields(cls)
        if f.init
    ]
    return StructConstructorSpec(instantiate=cls, fields=tuple(fields))


def _narrow(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is Annotated:
        inner, *extras = typing.get_args(hint)
        return Annotated[_narrow(inner, value), *extras]
    if dataclasses.is_dataclass(value):
        return type(value)
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return types.GenericAlias(tuple, tuple(type(v) for v in value))
    if any(map(dataclasses.is_dataclass, typing.get_args(hint))):
        return type(value)
    return hint


def _field_help(cls: type) -> dict[str, str]:
    found = {}
    for base in reversed(cls.__mro__):
        for entry in docstring_parser.parse(base.__doc__ or "").params:
            found[entry.arg_name] = entry.description or ""
    return found

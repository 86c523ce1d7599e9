"""Options of a process: from flags, STAGEMESH_* variables and a TOML file into a frozen dataclass.

An option is a field of a dataclass, declared with `option`; its name is the same everywhere:
`--max-kv-memory`, `STAGEMESH_MAX_KV_MEMORY`, `max_kv_memory = "2GiB"`. Flags win over variables,
variables over the file, the file over defaults. In the file, the table of a role ([worker], say)
wins over the keys at its top, which all roles share.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from stagemesh.errors import ConfigError
from stagemesh.option_file import OptionFile
from stagemesh.option_values import Kind, read_value
from stagemesh.plan import Span

T = TypeVar("T")
Instance = TypeVar("Instance")

_METADATA = "stagemesh.option"
_KINDS: dict[object, Kind] = {
    str: Kind.STR,
    int: Kind.INT,
    float: Kind.FLOAT,
    bool: Kind.BOOL,
    Path: Kind.PATH,
    Span: Kind.SPAN,
    tuple[str, ...]: Kind.LIST,
}
_UNIT_SUFFIXES = {Kind.SIZE: "_bytes", Kind.DURATION: "_s"}


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,  # noqa: A002 - what argparse calls it
    flag: str | None = None,
    kind: Kind | None = None,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field that is an option; without a default it must be given.

    `flag` names it otherwise than the field ("block-size"). `kind` is Kind.SIZE for bytes written
    as "2GiB" or Kind.DURATION for seconds written as "500ms" (the name of the option is then the
    field's without its `_bytes` or `_s`); else the annotation decides: str, int, float, bool, Path,
    Span, tuple[str, ...], or one of these `| None`. `choices`, `minimum` and `maximum` are checked
    by `check_options`. `positional` options have no flag and need no name on the command line.
    """
    details = {
        "help": help,
        "flag": flag,
        "kind": kind,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "positional": positional,
    }
    return dataclasses.field(default=default, metadata={_METADATA: details})


@dataclass(frozen=True, slots=True)
class Option:
    """One option as declared; `name` is its key in a file."""

    field: str
    name: str
    kind: Kind
    default: Any
    help: str
    choices: Sequence[str] | None
    minimum: float | None
    maximum: float | None
    positional: bool

    @property
    def flag(self) -> str:
        return self.name if self.positional else "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "STAGEMESH_" + self.name.upper()

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    def check(self, value: Any) -> None:
        """Raises ValueError that goes on from the option's name."""
        if value is None:
            return
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}, not {value!r}")
        if self.minimum is not None and not value >= self.minimum:
            raise ValueError(f"must be at least {self.minimum:g}, not {value:g}")
        if self.maximum is not None and not value <= self.maximum:
            raise ValueError(f"must be at most {self.maximum:g}, not {value:g}")


def options_of(cls: type[Any]) -> list[Option]:
    """The options that a dataclass declares, in order."""
    hints = typing.get_type_hints(cls)
    return [
        _declared(field, hints[field.name])
        for field in dataclasses.fields(cls)
        if _METADATA in field.metadata
    ]


def check_options(instance: Any) -> None:
    """For `__post_init__`: choices and limits of every option. Raises ConfigError, naming it."""
    for declared in options_of(type(instance)):
        try:
            declared.check(getattr(instance, declared.field))
        except ValueError as error:
            raise ConfigError(f"{declared.flag} {error}") from None


def parse_options(
    cls: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    environ: Mapping[str, str] | None = None,
    role: str | None = None,
    description: str | None = None,
) -> T:
    """An instance of `cls` from `argv` (None: this process's), the environment and a file.

    `role` names the table of the file, by default the last word of `prog`. Prints a help text and
    exits where that is asked for. Raises ConfigError, which names the option and its origin.
    """
    (parsed,) = parse_groups(
        (cls,), argv, prog=prog, environ=environ, role=role, description=description
    )
    return typing.cast(T, parsed)


def parse_groups(
    classes: Sequence[type[Any]],
    argv: Sequence[str] | None,
    *,
    prog: str,
    environ: Mapping[str, str] | None = None,
    role: str | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Like parse_options for options that are spread over several dataclasses."""
    environ = os.environ if environ is None else environ
    declared = {option.name: option for cls in classes for option in options_of(cls)}
    parser = _parser(list(declared.values()), prog, description)
    flags = _parse_flags(parser, sys.argv[1:] if argv is None else argv)
    path = flags.get("config") or environ.get("STAGEMESH_CONFIG")
    file = OptionFile.read(Path(path).expanduser()) if path else OptionFile.empty()
    settings = file.settings(role or prog.split()[-1], list(declared))
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, each in declared.items():
        if name in flags:
            raw, origins[name] = flags[name], each.flag
            if each.kind is Kind.LIST:  # given several times, it goes on
                raw = ",".join(raw)
        elif environ.get(each.variable):
            raw, origins[name] = environ[each.variable], each.variable
        elif name in settings:
            raw, origins[name] = settings[name].value, settings[name].origin
        else:
            continue
        given[name] = _read(each, raw, origins[name])
    return tuple(_construct(cls, given, origins) for cls in classes)


def _declared(field: dataclasses.Field[Any], hint: Any) -> Option:
    details = dict(field.metadata[_METADATA])
    kind = details.pop("kind") or _KINDS[_without_none(hint)]
    flag = details.pop("flag")
    name = flag.replace("-", "_") if flag else field.name.removesuffix(_UNIT_SUFFIXES.get(kind, ""))
    return Option(field=field.name, name=name, kind=kind, default=field.default, **details)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _read(declared: Option, raw: Any, origin: str) -> Any:
    try:
        value = read_value(raw, declared.kind)
        declared.check(value)
    except ValueError as error:
        raise ConfigError(f"{origin} {error}") from None
    return value


def _construct(
    cls: type[Instance], given: Mapping[str, Any], origins: Mapping[str, str]
) -> Instance:
    values = {}
    for declared in options_of(cls):
        if declared.name in given:
            values[declared.field] = given[declared.name]
        elif declared.required:
            raise ConfigError(f"{declared.flag} must be given ({declared.help})")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_with_origins(cls, str(error), origins)) from None


def _with_origins(cls: type[Any], message: str, origins: Mapping[str, str]) -> str:
    """A class's own check knows flags only; say where those came from that were not flags."""
    words = {word.strip(".,:;()'\"") for word in message.split()}
    named = [option for option in options_of(cls) if option.flag in words]
    notes = [
        f"{option.flag} is from {origins[option.name]}"
        for option in named
        if origins.get(option.name, option.flag) != option.flag
    ]
    return f"{message} ({'; '.join(notes)})" if notes else message


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser(
    declared: Sequence[Option], prog: str, description: str | None
) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for each in declared:
        extra: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(each)}
        if each.positional:
            extra |= {"nargs": "?", "metavar": each.name.upper()}
        elif each.kind is Kind.BOOL:
            extra |= {"dest": each.name, "action": argparse.BooleanOptionalAction}
        else:
            if each.kind is Kind.LIST:
                extra["action"] = "append"
            choices = "{" + ",".join(each.choices) + "}" if each.choices else None
            extra |= {"dest": each.name, "metavar": choices or each.kind.value}
        parser.add_argument(each.flag, **extra)
    if not any(each.name == "config" for each in declared):
        parser.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="TOML file with options"
        )
    return parser


def _parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f" (see {parser.prog} --help)"
        raise ConfigError(f"unknown option {unknown[0]}{hint}")
    return vars(namespace)


def _help(declared: Option) -> str:
    text = declared.help.replace("%", "%%")
    if declared.required or declared.default in (None, "", (), False):
        return text
    return f"{text} [{str(declared.default).replace('%', '%%')}]"

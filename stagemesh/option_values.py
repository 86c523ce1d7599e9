"""Texts and TOML values to the values of options: sizes, durations, spans and the plain types.

Knows nothing of flags, files and variables; `stagemesh.options` says where a bad value came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from stagemesh.plan import Span


class Kind(Enum):
    """How the text of an option is read. The value is what a help text calls it."""

    STR = "TEXT"
    INT = "N"
    FLOAT = "X"
    BOOL = "BOOL"
    PATH = "PATH"
    SIZE = "SIZE"
    DURATION = "DURATION"
    SPAN = "FIRST:END"
    LIST = "TEXT,..."


_SIZE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_DURATION_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
_NUMBERS = frozenset({Kind.INT, Kind.SIZE, Kind.FLOAT, Kind.DURATION})
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def read_value(value: object, kind: Kind) -> object:
    """`value`, a text or what TOML made of one, as an option of `kind` holds it.

    Raises ValueError whose text goes on from the option's name: "must be a whole number, not 'x'".
    """
    if isinstance(value, str):
        return _READERS[kind](value)
    if kind is Kind.BOOL and isinstance(value, bool):
        return value
    if kind is Kind.LIST and isinstance(value, list):
        return tuple(str(item) for item in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and kind in _NUMBERS:
        return _READERS[kind](repr(value))
    raise ValueError(f"must be {_DESCRIPTIONS[kind]}, not {value!r}")


def read_size_bytes(text: str) -> int:
    """ "2GiB", "1.5GB", "4096" in bytes."""
    number, unit = _split_quantity(text, Kind.SIZE)
    if unit.lower() not in _SIZE_UNITS:
        raise ValueError(f"has the unknown unit {unit!r}: take KiB, MiB, GiB, KB, MB or GB")
    return int(number * _SIZE_UNITS[unit.lower()])


def read_duration_s(text: str) -> float:
    """ "500ms", "2s", "1.5m", "3" (seconds) in seconds."""
    number, unit = _split_quantity(text, Kind.DURATION)
    if unit.lower() not in _DURATION_UNITS:
        raise ValueError(f"has the unknown unit {unit!r}: take ms, s, m or h")
    return number * _DURATION_UNITS[unit.lower()]


def read_span(text: str) -> Span:
    """ "0:12" as layers [0, 12)."""
    match = re.fullmatch(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"must be {_DESCRIPTIONS[Kind.SPAN]}, not {text!r}")
    return Span(int(match[1]), int(match[2]))


def _split_quantity(text: str, kind: Kind) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"must be {_DESCRIPTIONS[kind]}, not {text!r}")
    return float(match[1]), match[2]


def _read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be {_DESCRIPTIONS[Kind.INT]}, not {text!r}") from None


def _read_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be {_DESCRIPTIONS[Kind.FLOAT]}, not {text!r}")
    return number


def _read_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"must be {_DESCRIPTIONS[Kind.BOOL]}, not {text!r}")
    return word in _TRUE


def _read_list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


_READERS: dict[Kind, Callable[[str], object]] = {
    Kind.STR: str,
    Kind.INT: _read_int,
    Kind.FLOAT: _read_float,
    Kind.BOOL: _read_bool,
    Kind.PATH: lambda text: Path(text).expanduser(),
    Kind.SIZE: read_size_bytes,
    Kind.DURATION: read_duration_s,
    Kind.SPAN: read_span,
    Kind.LIST: _read_list,
}

_DESCRIPTIONS = {
    Kind.STR: "a text",
    Kind.INT: "a whole number",
    Kind.FLOAT: "a finite number",
    Kind.BOOL: "true or false",
    Kind.PATH: "a path",
    Kind.SIZE: "a size such as 2GiB",
    Kind.DURATION: "a duration such as 500ms or 2s",
    Kind.SPAN: "layers FIRST:END such as 0:12, END not included",
    Kind.LIST: "a list of texts",
}

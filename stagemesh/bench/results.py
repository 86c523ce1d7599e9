"""What a whole benchmark found, as one JSON document, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from stagemesh.bench.report import Report


@dataclass(frozen=True, slots=True)
class MeshStart:
    """An own mesh: from the first process until it served."""

    stages: int
    threads: int
    round: int
    startup_s: float


@dataclass(slots=True)
class Results:
    """`interrupted`: it was stopped before all runs were made."""

    machine: Mapping[str, Any]
    target: str
    model: str = ""
    seed: int = 0
    objective: Mapping[str, float | None] = field(default_factory=dict)
    temperature: float = 0.0
    starts: list[MeshStart] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=_plain) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} is no value of JSON")

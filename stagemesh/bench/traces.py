"""Traces of real traffic: when requests came, how long their prompts and outputs were.

Azure's: CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake's: JSON lines with timestamp
in milliseconds, input_length, output_length, hash_ids. JSON lines without hash_ids have their
timestamp in seconds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One request. Where two prompts have the same leading `blocks`, they were the same there."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


def read_trace(path: Path, max_entries: int | None = None) -> list[TraceEntry]:
    """In the order of arrival. Raises ConfigError that says what is wrong, and in which line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path} cannot be read: {error}") from None
    lines = text.splitlines()
    if not lines:
        raise ConfigError(f"--trace {path} is empty")
    read = _json_entry if lines[0].lstrip().startswith("{") else _azure_entry
    rows = map(json.loads, lines) if read is _json_entry else csv.DictReader(lines)
    entries = _entries(path, rows, read, 1 if read is _json_entry else 2)
    if not entries:
        raise ConfigError(f"--trace {path} has no requests")
    entries.sort(key=lambda entry: entry.arrival_s)
    return entries[:max_entries]


def _entries(path: Path, rows: Iterable[Mapping[str, Any]], read: Any, line: int) -> list[Any]:
    entries = []
    try:
        for row in rows:
            entries.append(read(row))
            line += 1
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"--trace {path}, line {line}: {what}") from None
    return entries


def _azure_entry(row: Mapping[str, Any]) -> TraceEntry:
    # Seven digits of a second, of which datetime takes six.
    arrival = datetime.fromisoformat(row["TIMESTAMP"][:26])
    seconds = (arrival - datetime(1970, 1, 1)).total_seconds()
    return _checked(TraceEntry(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"])))


def _json_entry(row: Mapping[str, Any]) -> TraceEntry:
    blocks = tuple(int(block) for block in row.get("hash_ids", ()))
    return _checked(
        TraceEntry(
            arrival_s=float(row["timestamp"]) / (1000 if "hash_ids" in row else 1),
            prompt_tokens=int(row["input_length"]),
            output_tokens=int(row["output_length"]),
            blocks=blocks,
            block_tokens=MOONCAKE_BLOCK_TOKENS if blocks else 0,
        )
    )


def _checked(entry: TraceEntry) -> TraceEntry:
    if entry.prompt_tokens < 1 or entry.output_tokens < 0:
        raise ValueError("a prompt has one token at least, an output no fewer than none")
    return entry

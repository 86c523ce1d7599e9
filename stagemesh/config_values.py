"""Values of a parsed config.json, checked: what is of another type or range is named.

All raise CheckpointError. A key that is null counts as one that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagemesh.errors import CheckpointError


def integer(
    config: Mapping[str, Any], key: str, default: int | None = None, minimum: int = 1
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise CheckpointError(f"config.json: {key} must be an integer >= {minimum}, not {value!r}")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive one."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def numbers(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A list of positive ones."""
    values = config.get(key)
    if not isinstance(values, list) or not values:
        raise CheckpointError(f"config.json: {key} must be a list of numbers, not {values!r}")
    return tuple(number({key: value}, key, 0.0) for value in values)


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in ids):
        raise CheckpointError(f"{key} must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))

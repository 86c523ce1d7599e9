"""What `make test` leaves to `make test-all`, for hours when nobody waits: more seeds, cuts, stages
and layouts of what it tests already, and the memory of tied and of 16-bit checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
THOROUGH = os.environ.get("STAGEMESH_THOROUGH", "0") != "0"
thorough = pytest.mark.skipif(not THOROUGH, reason="more of the same: make test-all")


def more(*values: Any) -> list[Any]:
    """Parameters of a test that are left out unless this is thorough."""
    return [pytest.param(value, marks=thorough) for value in values]


def sample(cases: Sequence[T], number: int, size: int) -> list[T]:
    """All cases if this is thorough, else `size` of them, others for the next number."""
    if THOROUGH:
        return list(cases)
    return [cases[(number * size + i) % len(cases)] for i in range(size)]

"""Where the tests find data. What lies in ../shared is used where it is, and skipped where not."""

from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"
DEMO_MODEL = REPO / "models" / "demo"


def shared(relative: str) -> Path:
    """The path of `relative` under ../shared; skips the test or module that has no such data."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}", allow_module_level=True)
    return path

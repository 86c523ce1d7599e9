"""Runs a service in this process, exactly as `python -m` would."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence


def run_module(name: str, argv: Sequence[str]) -> int:
    """Its exit code comes out as SystemExit."""
    sys.argv = [name, *argv]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0

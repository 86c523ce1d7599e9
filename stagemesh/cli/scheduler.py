"""`stagemesh scheduler`: the same as `python -m scheduler`."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.cli.run_module import run_module


def run(argv: Sequence[str]) -> int:
    return run_module("scheduler", argv)

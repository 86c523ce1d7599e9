"""`stagemesh gateway`: the same as `python -m gateway`."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.cli.run_module import run_module


def run(argv: Sequence[str]) -> int:
    return run_module("gateway", argv)

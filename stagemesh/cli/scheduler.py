"""`stagemesh scheduler`: the same as `python -m scheduler`."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    from scheduler.__main__ import main

    return main(argv)

"""`stagemesh gateway`: the same as `python -m gateway`."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    from gateway.__main__ import main

    return main(argv)

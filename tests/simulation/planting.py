"""What the simulator says of a bug that was planted: the first seed that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from simulation.mesh_world import MeshWorld
from simulation.world import World

MAX_SEEDS = 250


def caught(check_integrity: bool = False, max_seeds: int = MAX_SEEDS) -> Exception:
    """In the world of the core alone. Its integrity check is off unless a test says otherwise, so
    that what clients see is what gives the bug away."""
    return _first_failure(lambda seed: World(seed, check_integrity=check_integrity), max_seeds)


def caught_in_mesh(max_seeds: int = MAX_SEEDS) -> Exception:
    """In the larger world."""
    return _first_failure(lambda seed: MeshWorld(seed, check_integrity=False), max_seeds)


def _first_failure(make: Callable[[int], Any], max_seeds: int) -> Exception:
    for seed in range(max_seeds):
        try:
            make(seed).run()
        except Exception as error:
            print(f"seed {seed}: {error!r}")
            return error
    pytest.fail(f"{max_seeds} seeds did not find the planted bug")

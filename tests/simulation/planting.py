"""What the simulator says of a bug that was planted: the first seed that fails."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from simulation.mesh_scenario import MeshScenario, draw_mesh
from simulation.mesh_world import MeshWorld
from simulation.world import World

MAX_SEEDS = 250


def caught(check_integrity: bool = False, max_seeds: int = MAX_SEEDS) -> Exception:
    """In the world of the core alone. Its integrity check is off unless a test says otherwise, so
    that what clients see is what gives the bug away."""
    return _first_failure(lambda seed: World(seed, check_integrity=check_integrity), max_seeds)


def caught_in_mesh(
    max_seeds: int = MAX_SEEDS, num_replicas: int = 0, first_seed: int = 0
) -> Exception:
    """In the larger world; with a number of replicas, in meshes that have them and no spare."""

    def make(seed: int) -> MeshWorld:
        scenario = draw_mesh(Random(seed), num_replicas) if num_replicas else None
        return MeshWorld(seed, scenario=scenario, check_integrity=False)

    return _first_failure(make, max_seeds, first_seed)


def caught_in(scenario: MeshScenario) -> Exception:
    """In a mesh that was made for it."""
    return _first_failure(lambda seed: MeshWorld(seed, scenario=scenario), 1)


def _first_failure(make: Callable[[int], Any], max_seeds: int, first_seed: int = 0) -> Exception:
    for seed in range(first_seed, first_seed + max_seeds):
        try:
            make(seed).run()
        except Exception as error:
            print(f"seed {seed}: {error!r}")
            return error
    pytest.fail(f"{max_seeds} seeds did not find the planted bug")

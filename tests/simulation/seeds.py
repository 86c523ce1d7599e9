"""Runs seeds, and says of one that fails how to see it again, made small."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from simulation.mesh_scenario import MeshScenario
from simulation.mesh_world import MeshWorld
from simulation.shrink import AnyScenario, literal, shrink
from simulation.world import World

MAX_SHRINKING_RUNS = 400
# Of those that every run of the tests looks at. Other ones find other bugs.
FIRST_SEED = int(os.environ.get("STAGEMESH_FIRST_SEED", "0"))


def check_seed(
    make: type[World] | type[MeshWorld], seed: int, trace: Callable[[str], None] | None = None
) -> None:
    """Raises AssertionError with a report."""
    world = make(seed, trace=trace)
    try:
        world.run()
    except Exception as error:
        small = shrink_failure(seed, world.scenario, error)
        raise AssertionError(report(seed, small, error)) from error


def shrink_failure(
    seed: int, scenario: AnyScenario, error: Exception, max_runs: int = MAX_SHRINKING_RUNS
) -> AnyScenario:
    def fails(candidate: AnyScenario) -> bool:
        found = failure_of(seed, candidate)
        return found is not None and _kind(found) == _kind(error)

    return shrink(scenario, fails, max_runs)


def _kind(error: Exception) -> tuple[object, ...]:
    """What a failure is about, whatever its numbers are."""
    return type(error), *sorted(set(re.findall("[a-z]{3,}", str(error))))


def failure_of(seed: int, scenario: AnyScenario) -> Exception | None:
    make: Any = MeshWorld if isinstance(scenario, MeshScenario) else World
    try:
        make(seed, scenario=scenario).run()
    except Exception as error:
        return error
    return None


def report(seed: int, small: AnyScenario, error: Exception) -> str:
    is_mesh = isinstance(small, MeshScenario)
    arguments = f"SEED={seed} ARGS='--world {'mesh' if is_mesh else 'core'}'"
    return (
        f"seed {seed}: {type(error).__name__}: {error}\n"
        f"See it: make sim {arguments}\n"
        f"Made small, it says: {failure_of(seed, small)!r}\n"
        f"{'MeshWorld' if is_mesh else 'World'}({seed}, scenario={literal(small)}).run()"
    )

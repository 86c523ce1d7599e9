"""The real membership and core in a mesh where everything breaks, hundreds of seeds of it.

`make sim SEED=n ARGS='--world mesh'` shows one. STAGEMESH_FIRST_SEED in the environment begins
elsewhere.
"""

from __future__ import annotations

from collections import Counter

import pytest
from simulation.mesh_world import MeshWorld
from simulation.seeds import FIRST_SEED, check_seed
from support.thorough import THOROUGH

NUM_SEEDS = 192 if THOROUGH else 96
SEEDS_PER_TEST = 16


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + NUM_SEEDS, SEEDS_PER_TEST))
def test_no_fault_costs_a_token_or_a_request(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        print(f"seed {seed}")
        check_seed(MeshWorld, seed)


def test_a_mesh_of_a_seed_is_always_the_same() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        MeshWorld(3, trace=trace.append).run()
    assert traces[0] == traces[1]
    assert any("fault" in line for line in traces[0])


def test_the_meshes_meet_what_they_are_for() -> None:
    met: Counter[str] = Counter()
    for seed in range(1000, 1060):
        met += MeshWorld(seed).run().met
    print(met)
    assert all(met[kind] > 10 for kind in ("crash", "freeze", "slow", "control", "data", "silence"))
    assert met["rows from a log"] > 10
    assert met["rows without writing"] > 5
    assert met["lent"] > 10
    assert met["given back with pages"] > 5
    assert met["grown"] > 10
    assert met["shrunk with preemption"] > 0

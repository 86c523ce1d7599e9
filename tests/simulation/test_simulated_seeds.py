"""The real core under the simulator, hundreds of seeds of it. `make sim SEED=n` shows one.

STAGEMESH_FIRST_SEED in the environment begins elsewhere.
"""

from __future__ import annotations

from collections import Counter

import pytest
from simulation.seeds import FIRST_SEED, check_seed
from simulation.world import World
from support.thorough import THOROUGH

NUM_SEEDS = 480 if THOROUGH else 192
SEEDS_PER_TEST = 48


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + NUM_SEEDS, SEEDS_PER_TEST))
def test_every_stream_is_right_whatever_happens(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        print(f"seed {seed}")
        check_seed(World, seed)


def test_a_seed_is_always_the_same_run() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        World(12, trace=trace.append).run()
    assert traces[0] == traces[1]
    assert any("event Finished" in line for line in traces[0])


def test_the_seeds_meet_what_they_are_for() -> None:
    """A simulator that never preempts or loses a result would prove little."""
    met: Counter[str] = Counter()
    for seed in range(60):
        world = World(seed, check_integrity=False).run()
        stats = world.core.stats()
        met += world.rebuilds
        met["preemptions"] += stats.num_preempted
        met["cached tokens"] += stats.cached_prompt_tokens
        met["results out of order"] += world.num_wrong_orders
        met["epochs"] += sum(pipeline.epoch.n for pipeline in stats.pipelines)
        met["stages lost"] += sum(pipeline.num_losses for pipeline in world.pipelines.values())
        met["stages moved"] += sum(pipeline.num_moves for pipeline in world.pipelines.values())
    print(met)
    assert met["preemptions"] > 50
    assert met["cached tokens"] > 200
    assert met["results out of order"] > 0
    assert met["epochs"] > 300
    assert met["stages lost"] > 200
    assert met["stages moved"] > 30
    assert met["from a log"] > 200
    assert met["computed without writing"] > 100
    assert met["several stages at once"] > 20

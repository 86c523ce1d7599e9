"""The real core under the simulator, some hundred seeds of it. `make sim SEED=n` replays one."""

from __future__ import annotations

import pytest
from simulation.world import World

NUM_SEEDS = 256
SEEDS_PER_TEST = 16


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_every_stream_is_right_whatever_happens(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        print(f"seed {seed}")
        World(seed).run()


def test_a_seed_is_always_the_same_run() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        World(12, trace=trace.append).run()
    assert traces[0] == traces[1]
    assert any("event Finished" in line for line in traces[0])


def test_the_seeds_meet_what_they_are_for() -> None:
    """A simulator that never preempts or loses a result would prove little."""
    preempted = cached = out_of_order = epochs = 0
    for seed in range(40):
        world = World(seed, check_integrity=False).run()
        stats = world.core.stats()
        preempted += stats.num_preempted
        cached += stats.cached_prompt_tokens
        out_of_order += world.num_wrong_orders
        epochs += sum(pipeline.epoch.n for pipeline in stats.pipelines)
    assert preempted > 20
    assert cached > 100
    assert out_of_order > 0
    assert epochs > 100

"""Meshes that are not drawn but said: what must come out of them is known beforehand."""

from __future__ import annotations

from dataclasses import replace

from simulation.clock import MS
from simulation.examples import arrival, mesh, shape
from simulation.scenario import Break, Scenario
from simulation.world import World


def run(scenario: Scenario, seed: int = 0) -> World:
    return World(seed, scenario=scenario).run()


def last_end_ns(scenario: Scenario) -> int:
    """When the last request ended."""
    ends: list[int] = []
    world = World(0, scenario=scenario)
    world.on_end = lambda: ends.append(world.clock.now_ns)
    world.run()
    return ends[-1]


def test_a_pipeline_under_load_is_full() -> None:
    """Four equal stages, 16 streams: a step leaves every millisecond, but for filling and end."""
    arrivals = tuple(arrival(number, num_prompt=4, max_tokens=60) for number in range(16))
    taken_ns = last_end_ns(mesh(shape(4), arrivals=arrivals))
    # 60 rounds of 4 steps each, plus the pipeline's depth once, plus its late forming.
    assert taken_ns <= (60 * 4 + 4 + 5) * MS * 1.03


def test_two_replicas_serve_twice_as_much() -> None:
    arrivals = tuple(arrival(number, num_prompt=30, max_tokens=40) for number in range(12))
    one = last_end_ns(mesh(shape(2), arrivals=arrivals, max_running_requests=3))
    two = last_end_ns(mesh(shape(2), shape(2), arrivals=arrivals, max_running_requests=3))
    assert two < 0.6 * one


def test_long_prompts_do_not_stop_those_who_decode() -> None:
    """With chunks, a stream that decodes gets a token in nearly every round of the pipeline."""
    story = arrival(0, num_prompt=4, max_tokens=60)
    prompts = tuple(
        arrival(number, num_prompt=120, max_tokens=1, at_ns=number * MS) for number in range(1, 9)
    )
    alone = last_end_ns(mesh(shape(2), arrivals=(story,)))
    together = last_end_ns(mesh(shape(2), arrivals=(story, *prompts), max_step_tokens=16))
    assert together < 1.35 * alone


def test_more_streams_than_blocks_all_come_through() -> None:
    arrivals = tuple(arrival(number, num_prompt=20, max_tokens=20) for number in range(12))
    tight = replace(shape(3, num_blocks=16), max_model_len=64)
    world = run(mesh(tight, arrivals=arrivals))
    stats = world.core.stats()
    assert stats.num_preempted > 0
    assert stats.num_finished == 12
    assert stats.generated_tokens == 12 * 20


def test_breaks_in_mid_generation_lose_and_double_nothing() -> None:
    arrivals = tuple(arrival(number, num_prompt=10, max_tokens=60) for number in range(6))
    breaks = tuple(Break(at_ns=(7 + 15 * n) * MS, lost=(n % 3,) * (n % 2)) for n in range(12))
    scenario = mesh(shape(3), arrivals=arrivals)
    for seed in range(5):
        world = run(replace(scenario, breaks=breaks, lost=0.01, doubled=0.1), seed)
        assert world.core.stats().num_finished == 6
        assert world.core.stats().generated_tokens == 6 * 60
        assert world.core.stats().pipelines[0].epoch.n > 3

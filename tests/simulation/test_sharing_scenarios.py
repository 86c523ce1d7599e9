"""Two replicas without a spare, and workers that serve both of them for a while."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from simulation.arrivals import Arrival
from simulation.clock import MS, S
from simulation.examples import arrival
from simulation.mesh_scenario import Fault, MeshScenario, WorkerShape
from simulation.mesh_world import MeshWorld
from simulation.uneven_replicas import SCENARIOS

from scheduler.core import SchedulerLimits
from scheduler.core.lacks import Lacks
from scheduler.limits import MembershipLimits

STRUCK_NS = 3 * S
# Later than whatever grows has grown.
LATE_NS = 20 * S
# A context of 64 tokens takes half of them.
NUM_BLOCKS = 32


def two_replicas(
    *faults: Fault, num_streams: int = 4, num_blocks: int = NUM_BLOCKS, log_blocks: int = NUM_BLOCKS
) -> MeshScenario:
    """Of three stages each; streams when it serves, and one when all is over."""
    streams: tuple[Arrival, ...] = tuple(
        arrival(number, num_prompt=20, max_tokens=40, at_ns=2 * S + number * MS)
        for number in range(num_streams)
    )
    return MeshScenario(
        limits=SchedulerLimits(),
        membership=MembershipLimits(num_stages=3, num_replicas=2, settle_ns=S),
        workers=tuple(
            WorkerShape(
                f"w{number}",
                num_blocks,
                log_blocks,
                load_ns=200 * MS,
                compute_ns=20 * MS,
                start_ns=number * 20 * MS,
            )
            for number in range(6)
        ),
        arrivals=(*streams, arrival(num_streams, num_prompt=8, max_tokens=4, at_ns=LATE_NS)),
        faults=faults,
    )


def run(scenario: MeshScenario) -> MeshWorld:
    world = MeshWorld(0, scenario=scenario).run()
    held = world.gateways["gateway0"].held
    assert len(held) == len(scenario.arrivals)
    assert all(each.is_complete for each in held.values())
    return world


def crash(*names: str, for_ns: int, at_ns: int = STRUCK_NS) -> tuple[Fault, ...]:
    return tuple(Fault(at_ns, "crash", name, for_ns) for name in names)


def gone(name: str, at_ns: int = STRUCK_NS) -> Fault:
    return Fault(at_ns, "gone", name)


def num_blocks(world: MeshWorld) -> list[int]:
    pipelines = world.scheduler.core.stats().pipelines
    assert len(pipelines) == 2
    return sorted(pipeline.num_blocks for pipeline in pipelines)


@pytest.mark.parametrize("lost", ["w0", "w1", "w2", "w3"])
def test_a_worker_that_does_not_come_back_costs_its_stage_and_half_a_worker(lost: str) -> None:
    world = run(two_replicas(gone(lost)))
    assert world.met["lent"] == 1
    assert world.met["resumed with a loss"] == 1
    assert world.met["removed"] == 0
    assert num_blocks(world) == [16, 16]


def test_one_that_comes_back_has_its_place_with_pages_and_all_blocks_are_used() -> None:
    world = run(two_replicas(*crash("w1", for_ns=S)))
    assert world.met["lent"] == 1
    assert world.met["given back with pages"] == 1
    assert world.met["resumed with a loss"] == 1
    assert num_blocks(world) == [32, 32]


def test_two_that_are_gone_from_different_places() -> None:
    world = run(two_replicas(gone("w0"), gone("w4")))
    assert world.met["lent"] == 2
    assert world.met["resumed with a loss"] == 2
    assert world.met["removed"] == 0
    assert num_blocks(world) == [16, 16]


def test_the_shared_one_dies_as_well() -> None:
    """Nobody holds its layers then: both wait for whoever comes back."""
    world = run(two_replicas(gone("w1"), *crash("w4", at_ns=4 * S, for_ns=S)))
    assert world.met["lent"] >= 2
    assert num_blocks(world) == [16, 16]


def test_blocks_that_go_are_computed_anew() -> None:
    world = run(two_replicas(gone("w1"), num_streams=10))
    assert world.met["shrunk with preemption"] >= 1


def test_a_worker_that_is_drained_finds_a_successor_in_the_other_replica() -> None:
    world = run(two_replicas(Fault(STRUCK_NS, "sigterm", "w1")))
    assert world.met["lent"] == 1
    assert world.met["drained with pages"] == 1
    assert world.met["given back with pages"] == 1
    assert world.met["resumed with a loss"] == 0
    assert num_blocks(world) == [32, 32]


def long_lived_on_a_short_log() -> MeshScenario:
    """The worker at w0's place has half of its log while w3 is away, and then all of it again; then
    the stage after it is lost, with sequences that were there all the time."""
    scenario = two_replicas(
        *crash("w3", at_ns=3 * S, for_ns=S),
        *crash("w1", "w4", at_ns=13 * S, for_ns=S),
        num_streams=2,
        num_blocks=96,
        log_blocks=10,
    )
    slow = tuple(replace(worker, compute_ns=90 * MS) for worker in scenario.workers)
    return replace(scenario, workers=slow)


def test_what_was_not_logged_while_the_log_was_shared_is_not_read_from_it() -> None:
    world = run(long_lived_on_a_short_log())
    assert world.met["grown"] >= 1
    assert world.met["rows without writing"] >= 1


def test_the_same_with_a_log_that_is_believed_to_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def believe(self: Lacks, num_log_blocks: tuple[int, ...], in_use: object) -> None:
        self._num_log_blocks = num_log_blocks

    monkeypatch.setattr(Lacks, "resize_logs", believe)
    with pytest.raises(AssertionError, match="right is"):
        MeshWorld(0, scenario=long_lived_on_a_short_log()).run()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kv_that_moves_or_waits_where_two_pipelines_are(
    scenario: Callable[[], MeshScenario],
) -> None:
    run(scenario())

"""Meshes and their faults, said rather than drawn: what it costs is known beforehand."""

from __future__ import annotations

from simulation.clock import MS, S
from simulation.mesh_scenario import SCHEDULER, Kind, MeshScenario
from simulation.mesh_world import MeshWorld
from simulation.three_stages import STRUCK_NS, mesh, pages_do_not_come, struck


def run(scenario: MeshScenario) -> MeshWorld:
    world = MeshWorld(0, scenario=scenario).run()
    gateway = world.gateways["gateway0"]
    assert len(gateway.held) == 4
    assert all(held.is_complete for held in gateway.held.values())
    return world


def tokens_executed(world: MeshWorld) -> dict[str, int]:
    workers = world.workers.items()
    return {name: worker.num_tokens_executed for name, worker in workers if worker.tenants}


def test_a_calm_mesh_serves_with_one_epoch() -> None:
    world = run(mesh())
    assert [pipeline.epoch.n for pipeline in world.scheduler.membership.pipelines] == [1]
    assert world.met["resumed whole"] == world.met["resumed with a loss"] == 0


def test_a_killed_worker_costs_its_own_stage_alone() -> None:
    for who in ("w0", "w1", "w2"):
        world = run(mesh(struck("crash", who, for_ns=10 * S), num_spares=1))
        assert world.met["resumed with a loss"] == 1
        assert world.met["removed"] == 0
        survivors = {name: n for name, n in tokens_executed(world).items() if name != "w3"}
        survivors.pop(who, None)
        # Prompts, outputs, and what was in flight when it happened.
        assert max(survivors.values()) <= 4 * (20 + 40) + 24


def test_two_workers_killed_at_once_without_a_spare() -> None:
    faults = (struck("crash", "w1", for_ns=S), struck("crash", "w2", for_ns=S))
    world = run(mesh(*faults))
    assert world.met["resumed with a loss"] == 1


def test_killed_again_while_it_is_rebuilt() -> None:
    faults = tuple(
        struck("crash", f"w{1 + n % 2}", at_ns=STRUCK_NS + n * 700 * MS) for n in range(6)
    )
    run(mesh(*faults, log_blocks=2))


def test_a_stream_that_hiccups_costs_no_kv() -> None:
    kinds: tuple[Kind, ...] = ("control", "data")
    for kind in kinds:
        world = run(mesh(struck(kind, "w1")))
        assert world.met["resumed whole"] == 1
        assert world.met["resumed with a loss"] == 0


def test_a_short_freeze_is_waited_for_and_a_long_one_is_not() -> None:
    short = run(mesh(struck("freeze", "w1", for_ns=S), num_spares=1))
    assert short.met["resumed whole"] == short.met["resumed with a loss"] == 0
    long = run(mesh(struck("freeze", "w1", for_ns=10 * S), num_spares=1))
    assert long.met["resumed with a loss"] == 1


def test_a_drain_moves_pages_and_computes_nothing_anew() -> None:
    world = run(mesh(struck("drain", "w1"), num_spares=1))
    assert world.met["drained with pages"] == 1
    assert world.met["resumed with a loss"] == 0
    assert world.met["resumed whole"] == 1


def test_pages_that_do_not_come_are_computed_anew() -> None:
    world = run(pages_do_not_come())
    assert world.met["resumed with a loss"] == 1
    assert world.met["drained with pages"] == 0


def test_a_rolling_restart_of_all_loses_nothing() -> None:
    faults = tuple(struck("sigterm", f"w{n}", at_ns=STRUCK_NS + n * S) for n in range(3))
    world = run(mesh(*faults, num_spares=1, max_tokens=44))
    assert world.met["drained with pages"] >= 2
    assert world.met["resumed with a loss"] <= 1


def test_a_scheduler_that_dies_is_followed_by_one_that_goes_on() -> None:
    world = run(mesh(struck("crash", SCHEDULER, for_ns=2 * S)))
    assert world.scheduler.term == 2
    assert all(held.attempt == 2 for held in world.gateways["gateway0"].held.values())


def test_nobody_follows_a_scheduler_that_was_replaced() -> None:
    world = run(mesh(struck("usurp", SCHEDULER, for_ns=16 * S)))
    assert world.scheduler.term == 2


def test_those_who_remain_take_the_layers_over() -> None:
    world = run(mesh(struck("gone", "w1")))
    spans = world.scheduler.membership.pipelines[0].spans
    assert [(span.start, span.end) for span in spans] == [(0, 2), (2, 4)]


def test_a_device_that_hangs_is_noticed_though_its_process_talks() -> None:
    world = run(mesh(struck("hang", "w1", for_ns=30 * S), num_spares=1))
    assert world.met["resumed with a loss"] == 1

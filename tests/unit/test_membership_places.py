"""Who takes the place of a worker that was lost or goes on failing: the ladder, rung by rung."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.members import LIMITS, MS, FakeMesh, S, two_stages

from scheduler.messages import LoadedSpan
from stagemesh.errors import InternalError, OutOfMemory, PeerLost
from stagemesh.plan import Span

# What a worker of a mesh of two must have free to take all layers.
ENOUGH = 300


def fail(mesh: FakeMesh, worker_id: str) -> None:
    """The worker ends the epoch by itself."""
    pipeline = mesh.members.pipelines[0]
    worker = mesh.workers[worker_id]
    error = InternalError("out of order")
    mesh.members.epochs.broken(worker.session, "p0", pipeline.epoch, error, "", mesh.now_ns)
    mesh.wait(10 * S)


# ---- spares ------------------------------------------------------------------------------------


def test_spares_load_what_the_fewest_hold() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=3, num_replicas=1))
    for worker_id in ["a", "b", "c", "d", "e", "f", "g"]:
        mesh.register(worker_id)
        mesh.run()
    assert mesh.stages() == ["a", "b", "c"]
    spares = [mesh.workers[worker_id].loads_told for worker_id in "defg"]
    assert spares == [[(0, 2)], [(2, 4)], [(4, 6)], [(0, 2)]]


def test_a_spare_that_has_the_layers_is_there_at_once() -> None:
    mesh = two_stages(num_replicas=1)
    mesh.register("c")
    mesh.register("d")
    mesh.run()
    mesh.kill("b")
    mesh.wait(250 * MS)
    assert mesh.stages() == ["a", "d"]
    assert mesh.serving == ["p0"]
    assert mesh.workers["d"].loads_told == [(3, 6)]


def test_a_spare_with_as_many_ranks_is_preferred_and_any_other_will_do() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2, num_replicas=1))
    for worker_id, ranks in (("a", 1), ("b", 2), ("c", 1), ("d", 1), ("e", 2)):
        span = (0, 3) if worker_id == "a" else (3, 6)
        mesh.register(worker_id, span=span, tensor_parallel=ranks)
        mesh.run()
    assert mesh.stages() == ["a", "b"]
    mesh.kill("b")
    mesh.wait(250 * MS)
    assert mesh.stages() == ["a", "e"]
    mesh.kill("e")
    mesh.wait(250 * MS)
    assert mesh.stages() == ["a", "c"]


def test_a_spare_with_other_layers_loads_where_there_is_no_better_one() -> None:
    mesh = two_stages()
    mesh.register("c")
    mesh.run()
    mesh.kill("b")
    mesh.wait(S)
    assert mesh.workers["c"].loads_told == [(0, 3), (3, 6)]
    assert mesh.stages() == ["a", "c"]
    assert mesh.serving == ["p0"]


def test_all_candidates_load_at_once_and_the_first_takes_the_place() -> None:
    mesh = two_stages(num_replicas=1)
    mesh.kill("b")
    mesh.wait(S)
    slow = mesh.register("slow", worker={"loads": False})
    mesh.run()
    restarted = mesh.register("b", incarnation=2, worker={"loads": False})
    mesh.run()
    assert slow.loads_told == restarted.loads_told == [(3, 6)]
    mesh.finish_load(restarted, Span(3, 6))
    mesh.run()
    assert mesh.stages() == ["a", "b"]
    assert mesh.serving == ["p0"]
    mesh.finish_load(slow, Span(3, 6))
    mesh.kill("b")
    mesh.wait(S)
    assert mesh.stages() == ["a", "slow"]


def test_a_spare_that_can_hold_nothing_is_left_alone() -> None:
    mesh = two_stages(num_replicas=1)
    spare = mesh.register("c", worker={"loads": False})
    mesh.run()
    mesh.members.failed(spare.session, OutOfMemory("too much"), mesh.now_ns)
    mesh.wait(S)
    assert spare.loads_told == [(0, 3)]
    mesh.kill("b")
    mesh.wait(S)
    assert mesh.stages() == ["a", None]


# ---- failing workers ---------------------------------------------------------------------------


def test_a_worker_that_goes_on_failing_is_exchanged_for_a_spare_and_set_aside() -> None:
    mesh = two_stages(num_replicas=1)
    mesh.register("c")
    mesh.run()
    assert mesh.workers["c"].loads_told == [(0, 3)]
    for num in range(3):
        assert mesh.stages() == ["a", "b"], num
        fail(mesh, "b")
    assert mesh.workers["c"].loads_told == [(0, 3), (3, 6)], "it is wanted there"
    assert mesh.stages() == ["a", "c"]
    assert mesh.serving == ["p0"]
    mesh.register("d", loaded=LoadedSpan(Span(3, 6), 100, 16))
    mesh.kill("c")
    mesh.wait(S)
    assert mesh.stages() == ["a", "d"], "b is set aside"
    mesh.kill("d")
    mesh.wait(S)
    assert mesh.stages() == ["a", "b"], "b is better than nobody"


def test_without_a_spare_a_failing_worker_keeps_its_place() -> None:
    mesh = two_stages()
    for _ in range(5):
        fail(mesh, "b")
    assert mesh.stages() == ["a", "b"]
    assert mesh.serving == ["p0"]


def test_who_does_not_join_for_so_long_is_exchanged_at_once() -> None:
    mesh = two_stages(num_replicas=1)
    mesh.register("c")
    mesh.run()
    assert mesh.workers["c"].loads_told == [(0, 3)]
    mesh.workers["a"].joins = False
    mesh.members.epochs.stream_broken(
        "p0", mesh.members.pipelines[0].epoch, PeerLost("cut"), mesh.now_ns
    )
    mesh.wait(11 * S)
    assert mesh.stages() == ["c", "b"]
    assert mesh.serving == ["p0"]


# ---- the layers cut anew -----------------------------------------------------------------------


def team(available: int, **changes: int) -> FakeMesh:
    """Three workers that serve, with so many bytes free beside what they hold."""
    mesh = FakeMesh(replace(LIMITS, num_stages=3, **changes))
    for worker_id in "abc":
        mesh.register(worker_id, available_memory_bytes=available, worker={"num_blocks": 40})
    mesh.run()
    assert mesh.serving == ["p0"]
    return mesh


@pytest.mark.parametrize(("lost", "left"), [("a", ["b", "c"]), ("b", ["a", "c"])])
def test_those_who_are_left_take_the_layers_of_one_who_does_not_come_back(
    lost: str, left: list[str]
) -> None:
    mesh = team(ENOUGH)
    mesh.kill(lost)
    mesh.wait(10 * S)
    assert not mesh.serving
    mesh.wait(S)
    assert mesh.stages() == left
    assert mesh.spans() == [(0, 3), (3, 6)]
    assert mesh.serving == list(mesh.core) == ["p1"]


def test_the_layers_stay_where_memory_does_not_allow_it() -> None:
    mesh = team(0)
    mesh.kill("b")
    mesh.wait(60 * S)
    assert mesh.stages() == ["a", None, "c"]
    mesh.register("d")
    mesh.run()
    assert mesh.serving == ["p0"]


def test_a_mesh_that_was_cut_anew_stays_so_when_the_worker_is_back() -> None:
    mesh = team(ENOUGH)
    mesh.kill("b")
    mesh.wait(20 * S)
    joined = mesh.workers["a"].last_join.epoch
    back = mesh.register("b", incarnation=2, available_memory_bytes=ENOUGH)
    mesh.wait(60 * S)
    assert mesh.workers["a"].last_join.epoch == joined
    assert back.loads_told == [(0, 3)], "a spare"
    mesh.kill("c")
    mesh.wait(S)
    assert mesh.stages() == ["a", "b"]


def test_a_candidate_that_loads_is_waited_for() -> None:
    mesh = team(ENOUGH)
    mesh.kill("b")
    mesh.wait(5 * S)
    slow = mesh.register("b", incarnation=2, worker={"loads": False})
    mesh.wait(60 * S)
    assert mesh.stages() == ["a", "b", "c"]
    mesh.kill("b")
    mesh.wait(6 * S)
    assert mesh.spans() == [(0, 3), (3, 6)], "five seconds were waited before"
    assert slow.loads_told == [(2, 4)]


def test_a_worker_that_has_not_the_room_it_was_believed_to_have_is_asked_for_less() -> None:
    mesh = team(ENOUGH)
    mesh.workers["c"].loads = False
    mesh.kill("b")
    mesh.wait(11 * S)
    assert mesh.spans() == [(0, 3), (3, 6)]
    mesh.members.failed(mesh.workers["c"].session, OutOfMemory("no room"), mesh.now_ns)
    mesh.workers["c"].loads = True
    mesh.wait(11 * S)
    assert mesh.spans() == [(0, 4), (4, 6)]
    assert mesh.stages() == ["a", "c"]
    assert len(mesh.serving) == 1


def test_everybody_but_one_is_lost() -> None:
    mesh = team(1000, takeover_after_ns=S)
    mesh.kill("a")
    mesh.kill("c")
    mesh.wait(2 * S)
    assert mesh.stages() == ["b"]
    assert mesh.spans() == [(0, 6)]
    assert len(mesh.serving) == 1


def test_a_fixed_span_stays_what_it_is() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=3))
    mesh.register("a", available_memory_bytes=ENOUGH)
    mesh.register("b", available_memory_bytes=ENOUGH)
    mesh.register("c", span=(4, 6))
    mesh.run()
    mesh.kill("b")
    mesh.wait(11 * S)
    assert mesh.spans() == [(0, 4), (4, 6)]
    assert mesh.stages() == ["a", "c"]

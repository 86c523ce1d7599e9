"""Workers that leave in good order, whatever happens. The fake mesh checks whose KV is whose."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from support.members import LIMITS, FakeMesh, S, two_stages

from scheduler.messages import DrainDone, ShutdownWorker
from stagemesh.errors import InvalidRequest, MeshUnavailable
from stagemesh.plan import Span


def drain(mesh: FakeMesh, worker_id: str, to: str = "", *, stay: bool = False) -> int:
    number = mesh.members.drain(worker_id, to, stay=stay, now_ns=mesh.now_ns)
    mesh.run()
    return number


def with_spare(**spare: object) -> FakeMesh:
    """Two stages, and a worker "c" that could take either."""
    mesh = two_stages(num_replicas=1)
    mesh.register("c", worker=spare)
    mesh.run()
    return mesh


def test_a_stage_is_handed_over_with_its_kv_and_its_worker_released() -> None:
    mesh = with_spare()
    old = mesh.workers["a"]
    number = drain(mesh, "a")
    assert mesh.stages() == ["c", "b"]
    assert mesh.serving == ["p0"]
    assert mesh.resumes == [("p0", set())]
    assert isinstance(old.commands[-1], ShutdownWorker)
    assert mesh.ended[old.session] is None
    assert mesh.drained[number] == DrainDone(number, "c")
    assert [worker.worker_id for worker in mesh.members.workers] == ["b", "c"]


def test_the_old_worker_serves_on_while_the_new_one_loads() -> None:
    mesh = with_spare(loads=False)
    number = drain(mesh, "b")
    spare = mesh.workers["c"]
    assert mesh.members.workers[1].is_draining
    mesh.finish_load(spare, Span(0, 3))
    mesh.run()
    assert spare.loads_told == [(0, 3), (3, 6)]
    assert mesh.stages() == ["a", "b"]
    assert mesh.serving == ["p0"]
    assert not mesh.drained
    mesh.finish_load(spare, Span(3, 6))
    mesh.run()
    assert mesh.stages() == ["a", "c"]
    assert mesh.resumes == [("p0", set())]
    assert mesh.drained[number].successor_id == "c"


def test_pages_that_do_not_come_are_rebuilt() -> None:
    mesh = with_spare(fetches=False)
    number = drain(mesh, "a")
    assert mesh.resumes == [("p0", {0})]
    assert mesh.drained[number].successor_id == "c"
    assert "a" not in mesh.workers


def test_without_a_successor_a_worker_is_released_at_once() -> None:
    mesh = two_stages()
    number = drain(mesh, "b")
    assert mesh.stages() == ["a", None]
    assert mesh.drained[number] == DrainDone(number)
    assert "b" not in mesh.workers
    mesh.register("b", incarnation=2)
    mesh.run()
    assert mesh.resumes == [("p0", {1})]


@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_rolling_restart_leaves_every_kv_but_the_restarted_ones(num_spares: int) -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=3, num_replicas=1))
    for worker_id in ["a", "b", "c", "spare"][: 3 + num_spares]:
        mesh.register(worker_id)
    mesh.run()
    incarnations = count(2)
    for worker_id in list(mesh.workers):
        drain(mesh, worker_id)
        mesh.wait(S)
        mesh.register(worker_id, incarnation=next(incarnations))
        mesh.run()
        assert mesh.serving == ["p0"]
    most_lost = 0 if num_spares else 1
    assert all(len(lost) <= most_lost for _, lost in mesh.resumes)
    assert len(mesh.resumes) >= 3


def test_a_worker_that_stays_is_a_spare_afterwards() -> None:
    mesh = with_spare()
    number = drain(mesh, "a", "c", stay=True)
    assert mesh.stages() == ["c", "b"]
    assert mesh.drained[number].successor_id == "c"
    assert not any(isinstance(command, ShutdownWorker) for command in mesh.workers["a"].commands)
    drain(mesh, "c", "a", stay=True)
    assert mesh.stages() == ["a", "b"]
    assert mesh.resumes == [("p0", set())] * 2


def test_what_cannot_be_done_is_said() -> None:
    mesh = with_spare()
    for worker_id, to, why in [
        ("nobody", "", "no worker nobody"),
        ("a", "nobody", "no worker nobody"),
        ("a", "b", "b is not free"),
        ("a", "a", "a is not free"),
        ("c", "a", "a is not free"),
    ]:
        with pytest.raises(InvalidRequest, match=why):
            mesh.members.drain(worker_id, to, now_ns=mesh.now_ns)
    mesh.register("fixed", span=(3, 6))
    with pytest.raises(InvalidRequest, match="cannot hold the layers of a"):
        mesh.members.drain("a", "fixed", now_ns=mesh.now_ns)


def test_nobody_to_stay_for_is_an_error_and_nothing_changes() -> None:
    mesh = two_stages()
    number = drain(mesh, "a", stay=True)
    assert isinstance(mesh.drained[number].error, MeshUnavailable)
    assert mesh.serving == ["p0"]
    assert not mesh.members.workers[0].is_draining


def test_a_spare_just_leaves() -> None:
    mesh = with_spare()
    number = drain(mesh, "c")
    assert mesh.drained[number] == DrainDone(number)
    assert "c" not in mesh.workers
    assert mesh.serving == ["p0"]
    assert mesh.resumes == []


def test_a_worker_is_drained_once_however_often_it_is_asked_for() -> None:
    mesh = with_spare(joins=False)
    number = drain(mesh, "a", stay=True)
    assert drain(mesh, "a") == number
    mesh.members.draining(mesh.workers["a"].session, mesh.now_ns)
    mesh.workers["c"].joins = True
    mesh.wait(60 * S)
    assert list(mesh.drained) == [number]
    assert "a" not in mesh.workers, "it was asked to leave as well"


def test_two_drains_of_one_pipeline() -> None:
    mesh = with_spare()
    mesh.register("d")
    mesh.run()
    numbers = [mesh.members.drain(worker_id, now_ns=mesh.now_ns) for worker_id in ("a", "b")]
    mesh.run()
    assert mesh.stages() == ["c", "d"]
    assert sorted(mesh.drained) == numbers
    assert mesh.resumes == [("p0", set())] * 2


def test_two_drains_and_one_spare() -> None:
    mesh = with_spare()
    for worker_id in ("a", "b"):
        mesh.members.drain(worker_id, now_ns=mesh.now_ns)
    mesh.run()
    assert mesh.stages() == ["c", None]
    assert mesh.suspended == {"p0"}
    mesh.register("b", incarnation=2)
    mesh.run()
    assert mesh.resumes[-1] == ("p0", {1})


def test_the_successor_dies_before_it_has_loaded() -> None:
    mesh = with_spare()
    mesh.register("d", worker={"loads": False})
    mesh.run()
    drain(mesh, "b", "d")
    mesh.kill("d")
    mesh.wait(S)
    assert mesh.stages() == ["a", "b"]
    assert isinstance(mesh.drained[1].error, MeshUnavailable), "d was asked for, nobody else"


def test_the_successor_dies_while_pages_move_and_the_old_one_is_there_again() -> None:
    mesh = with_spare(joins=False)
    number = drain(mesh, "a")
    assert mesh.stages() == ["c", "b"]
    mesh.register("d")
    mesh.kill("c")
    mesh.wait(S)
    assert mesh.stages() == ["d", "b"], "another one took over"
    assert mesh.resumes[-1] == ("p0", set())
    assert mesh.drained[number].successor_id == "d"


def test_a_named_successor_that_does_not_join_gives_the_place_back() -> None:
    mesh = with_spare(joins=False)
    number = drain(mesh, "a", "c", stay=True)
    mesh.wait(60 * S)
    assert mesh.stages() == ["a", "b"]
    assert mesh.serving == ["p0"]
    assert mesh.resumes == [("p0", set())]
    assert isinstance(mesh.drained[number].error, MeshUnavailable)


def test_the_old_one_dies_while_pages_move() -> None:
    mesh = with_spare(joins=False)
    number = drain(mesh, "a")
    mesh.kill("a")
    mesh.wait(S)
    assert mesh.drained[number].successor_id == "c"
    mesh.workers["c"].joins = True
    mesh.wait(60 * S)
    assert mesh.stages() == ["c", "b"]
    assert mesh.resumes == [("p0", {0})]


def test_the_old_one_dies_before_it_is_replaced() -> None:
    mesh = with_spare(loads=False)
    number = drain(mesh, "b")
    mesh.kill("b")
    mesh.wait(S)
    assert mesh.drained[number] == DrainDone(number)
    spare = mesh.workers["c"]
    spare.loads = True
    mesh.finish_load(spare, Span(0, 3))
    mesh.wait(S)
    assert mesh.stages() == ["a", "c"]
    assert mesh.serving == ["p0"]


def test_a_vacant_place_comes_before_a_drain() -> None:
    mesh = with_spare()
    mesh.disconnect("b")
    mesh.wait(S // 4 - 1, deaf=["b"])
    mesh.members.drain("a", now_ns=mesh.now_ns)
    del mesh.workers["b"]
    mesh.now_ns += 1
    mesh.run()
    assert mesh.stages() == [None, "c"]


def test_a_worker_that_loses_patience_says_goodbye() -> None:
    mesh = with_spare(loads=False)
    number = drain(mesh, "a")
    mesh.members.goodbye(mesh.workers["a"].session, "told to stop", mesh.now_ns)
    mesh.run()
    assert mesh.drained[number] == DrainDone(number)
    assert mesh.stages() == ["c", "b"], "it loads yet"

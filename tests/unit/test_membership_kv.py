"""Whose KV survives the end of an epoch. That it is really there the fake mesh checks."""

from __future__ import annotations

from dataclasses import replace

from support.members import LIMITS, TERM, FakeMesh, S, two_stages

from stagemesh.plan import Epoch


def test_a_worker_that_finds_its_place_vacant_has_its_kv_yet() -> None:
    mesh = two_stages()
    mesh.disconnect("a")
    mesh.wait(5 * S, deaf=["a"])
    mesh.come_back("a")
    mesh.run()
    assert mesh.serving == ["p0"]
    assert mesh.resumes == [("p0", set())]
    assert mesh.core["p0"].epoch == Epoch(TERM, 2)


def test_a_network_that_is_down_for_all_costs_nobody_its_kv() -> None:
    mesh = two_stages()
    for worker_id in "ab":
        mesh.disconnect(worker_id)
    mesh.wait(5 * S, deaf=["a", "b"])
    assert mesh.stages() == [None, None]
    mesh.come_back("b")
    mesh.wait(5 * S)
    mesh.come_back("a")
    mesh.run()
    assert mesh.stages() == ["a", "b"]
    assert mesh.resumes == [("p0", set())]


def test_whoever_replaces_a_worker_lacks_its_stage_and_the_others_keep_theirs() -> None:
    mesh = two_stages()
    mesh.register("spare", worker={"num_blocks": 60})
    mesh.disconnect("b")
    mesh.wait(S, deaf=["b"])
    assert mesh.stages() == ["a", "spare"]
    assert mesh.resumes == [("p0", {1})]
    assert mesh.workers["a"].last_join.keep_kv
    assert not mesh.workers["spare"].last_join.keep_kv
    assert mesh.core["p0"].num_blocks == mesh.workers["a"].last_join.num_blocks == 60
    mesh.come_back("b")
    mesh.wait(S)
    mesh.members.goodbye(mesh.workers["spare"].session, "gone", mesh.now_ns)
    mesh.run()
    assert mesh.stages() == ["a", "b"]
    assert mesh.resumes[1:] == [("p0", {1})], "what b has is of an earlier epoch"
    assert mesh.core["p0"].num_blocks == 100


def test_a_join_that_came_to_nothing_changes_nothing_about_who_has_the_kv() -> None:
    mesh = two_stages()
    spare = mesh.register("spare", worker={"joins": False})
    mesh.disconnect("b")
    mesh.wait(S, deaf=["b"])
    assert mesh.stages() == ["a", "spare"]
    assert not mesh.serving
    mesh.come_back("b")
    mesh.members.goodbye(spare.session, "gone", mesh.now_ns)
    mesh.run()
    assert mesh.stages() == ["a", "b"]
    assert mesh.resumes == [("p0", set())]


def test_kv_is_given_up_by_whoever_joins_another_pipeline() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=1))
    mesh.register("a")
    mesh.register("b")
    mesh.run()
    assert mesh.serving == ["p0", "p1"]
    mesh.disconnect("b")
    mesh.wait(S, deaf=["b"])
    mesh.members.goodbye(mesh.workers["a"].session, "gone", mesh.now_ns)
    mesh.come_back("b")
    mesh.run()
    assert mesh.stages() == ["b"]
    assert list(mesh.core) == mesh.serving == ["p1"]


def test_nobody_waits_for_ever_for_kv_that_may_come_back_while_another_pipeline_serves() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=1))
    mesh.register("a")
    mesh.register("b")
    mesh.run()
    mesh.kill("b")
    mesh.wait(9 * S)
    assert mesh.suspended == {"p1"}
    mesh.wait(2 * S)
    assert list(mesh.core) == ["p0"]
    mesh.kill("a")
    mesh.wait(600 * S)
    assert mesh.suspended == {"p0"}, "there is no other"

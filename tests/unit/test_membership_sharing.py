"""Workers that serve two pipelines: when they are lent, what each has of them, when that ends.

The fake mesh checks all the while that blocks of two pipelines never meet, and whose KV is whose.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.members import LIMITS, MS, FakeMesh, FakeWorker, S

from scheduler.messages import DrainDone, JoinEpoch, LoadedSpan
from scheduler.workers import WorkerPhase
from stagemesh.errors import InternalError, PeerLost
from stagemesh.plan import Span

# Blocks of 16 tokens, a context of 128: eight blocks hold the longest.
NUM_BLOCKS = 100


def replicas(num: int = 2, worker: dict[str, object] | None = None, **changes: object) -> FakeMesh:
    """Pipelines p0 of workers a and b, p1 of c and d, …, all of which serve."""
    limits = replace(LIMITS, num_stages=2, num_replicas=num)
    mesh = FakeMesh(replace(limits, **changes))  # type: ignore[arg-type]
    for worker_id in "abcdef"[: 2 * num]:
        mesh.register(worker_id, worker={"num_log_blocks": NUM_BLOCKS, **(worker or {})})
        mesh.run()
    assert mesh.serving == [f"p{number}" for number in range(num)]
    return mesh


def lose(mesh: FakeMesh, *worker_ids: str) -> None:
    """The processes are gone, and their places vacant."""
    for worker_id in worker_ids:
        mesh.kill(worker_id)
    mesh.wait(250 * MS)


def blocks(mesh: FakeMesh) -> dict[str, int]:
    return {pipeline_id: facts.num_blocks for pipeline_id, facts in mesh.core.items()}


def last_join(worker: FakeWorker, pipeline_id: str) -> JoinEpoch:
    return [join for join in worker.joins_told if join.pipeline_id == pipeline_id][-1]


def epoch(mesh: FakeMesh, number: int) -> int:
    return mesh.members.pipelines[number].epoch.n


def spoil(mesh: FakeMesh, worker_id: str) -> None:
    """The worker serves on, but has failed so often that it is not lent."""
    worker = next(each for each in mesh.members.workers if each.worker_id == worker_id)
    worker.conduct.num_failures = 3


# ---- lending -----------------------------------------------------------------------------------


def test_a_replica_s_worker_stands_in_for_a_lost_one() -> None:
    mesh = replicas()
    mesh.kill("b")
    mesh.wait(240 * MS)
    assert mesh.stages(0) == ["a", "b"], "it may come back"
    mesh.wait(10 * MS)
    assert mesh.stages(0) == ["a", "d"]
    assert mesh.stages(1) == ["c", "d"]
    assert mesh.serving == ["p0", "p1"]
    assert sorted(mesh.resumes) == [("p0", {1}), ("p1", set())]
    assert blocks(mesh) == {"p0": NUM_BLOCKS // 2, "p1": NUM_BLOCKS // 2}
    shared = mesh.members.workers[-1]
    assert [pipeline.pipeline_id for pipeline in shared.pipelines] == ["p1", "p0"]
    assert shared.phase is WorkerPhase.SERVING


def test_each_pipeline_has_an_end_of_the_worker_s_blocks_and_of_its_log() -> None:
    mesh = replicas()
    lose(mesh, "a")
    own, lent = (last_join(mesh.workers["c"], pipeline_id) for pipeline_id in ("p1", "p0"))
    assert (own.from_end, own.keep_kv, own.num_blocks, own.num_log_blocks) == (False, True, 50, 50)
    assert (lent.from_end, lent.keep_kv, lent.num_blocks, lent.num_log_blocks) == (
        *(True, False, 50, 50),
    )
    assert mesh.core["p0"].num_log_blocks == mesh.core["p1"].num_log_blocks == (50, 0)
    assert last_join(mesh.workers["b"], "p0").num_blocks == 50, "the smallest stage's"


def test_a_spare_that_holds_the_layers_comes_first() -> None:
    mesh = replicas()
    mesh.register("spare")
    mesh.run()
    assert mesh.workers["spare"].loads_told == [(0, 3)]
    lose(mesh, "a")
    assert mesh.stages(0) == ["spare", "b"]
    assert mesh.stages(1) == ["c", "d"]
    assert epoch(mesh, 1) == 1, "nobody else was disturbed"


def test_one_that_must_load_is_not_waited_for_and_has_the_place_when_it_has_loaded() -> None:
    mesh = replicas()
    spare = mesh.register("spare", worker={"num_log_blocks": NUM_BLOCKS})
    mesh.run()
    spare.loads = False
    lose(mesh, "b")
    assert spare.loads_told == [(0, 3), (3, 6)]
    assert mesh.stages(0) == ["a", "d"]
    assert mesh.serving == ["p0", "p1"]
    mesh.resumes.clear()
    mesh.finish_load(spare, Span(3, 6))
    mesh.run()
    assert mesh.stages(0) == ["a", "spare"]
    assert mesh.resumes == [("p0", set())], "its pages came along"
    assert last_join(spare, "p0").pages_from == "d:1"


def test_whoever_need_not_shrink_is_lent_first() -> None:
    mesh = replicas(3)
    mesh.workers["d"].joins = False  # p1 is not at work, so that nobody is disturbed
    broken = mesh.members.pipelines[1].epoch
    mesh.members.epochs.stream_broken("p1", broken, PeerLost("cut"), mesh.now_ns)
    mesh.disconnect("c")
    lose(mesh, "b")
    assert mesh.stages(0) == ["a", "d"]
    assert epoch(mesh, 2) == 1


def test_nobody_is_lent_where_the_operator_does_not_want_it() -> None:
    mesh = replicas(share_workers=False)
    lose(mesh, "b")
    assert mesh.stages(0) == ["a", None]
    assert mesh.serving == ["p1"]


def test_nobody_is_lent_to_a_pipeline_that_would_not_be_complete_by_it() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=3, num_replicas=2))
    for worker_id in "abcdef":
        mesh.register(worker_id)
        mesh.run()
    spoil(mesh, "d")
    lose(mesh, "a", "b")
    assert mesh.stages(0) == [None, None, "c"]
    assert epoch(mesh, 1) == 1


def test_nobody_is_lent_to_a_pipeline_without_any_kv_left() -> None:
    """Its requests begin anew anyway: where they are, or in the other pipeline."""
    mesh = replicas()
    lose(mesh, "a", "b")
    assert mesh.stages(0) == [None, None]
    assert epoch(mesh, 1) == 1


@pytest.mark.parametrize(("num_blocks", "is_lent"), [(15, False), (16, True)])
def test_nobody_is_lent_where_the_longest_context_would_have_no_room(
    num_blocks: int, is_lent: bool
) -> None:
    mesh = replicas(worker={"num_blocks": num_blocks, "num_log_blocks": num_blocks})
    lose(mesh, "b")
    assert mesh.stages(0) == ["a", "d" if is_lent else None]
    assert set(blocks(mesh).values()) == {8 if is_lent else 15}


def test_nobody_is_lent_where_little_would_be_left() -> None:
    mesh = replicas()
    mesh.kill("d")
    mesh.register("small", loaded=LoadedSpan(Span(3, 6), 40, 16))
    mesh.wait(S)
    assert mesh.stages(1) == ["c", "small"]
    lose(mesh, "b")
    assert mesh.stages(0) == ["a", None], "20 blocks of 100"


def test_a_worker_that_goes_on_failing_is_not_lent() -> None:
    mesh = replicas()
    spoil(mesh, "d")
    lose(mesh, "b")
    assert mesh.stages(0) == ["a", None]


def test_two_losses_at_once_in_different_places() -> None:
    """Each has what the other one lacks: nothing is computed anew but the lost stages."""
    mesh = replicas()
    lose(mesh, "a", "d")
    assert mesh.stages(0) == mesh.stages(1) == ["c", "b"]
    assert mesh.serving == ["p0", "p1"]
    assert sorted(mesh.resumes) == [("p0", {0}), ("p1", {1})]
    assert blocks(mesh) == {"p0": 50, "p1": 50}
    for worker_id in ("x", "y"):
        mesh.register(worker_id)
        mesh.run()
    mesh.wait(20 * S)
    assert [set(mesh.stages(0)) | set(mesh.stages(1))] == [{"b", "c", "x", "y"}]
    assert blocks(mesh) == {"p0": 100, "p1": 100}
    assert len(mesh.members.pipelines) == 2


def test_two_losses_one_after_the_other_in_one_pipeline() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.resumes.clear()
    lose(mesh, "a")
    assert mesh.stages(0) == mesh.stages(1) == ["c", "d"]
    assert mesh.resumes == [("p0", {0})], "p0 has its KV on d, and p1 has shrunk already"
    assert blocks(mesh) == {"p0": 50, "p1": 50}


# ---- giving back -------------------------------------------------------------------------------


def test_a_worker_that_was_started_again_has_its_place_back_with_pages() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.resumes.clear()
    back = mesh.register("b", incarnation=2, worker={"num_log_blocks": NUM_BLOCKS})
    mesh.run()
    assert mesh.stages(0) == ["a", "b"]
    assert mesh.stages(1) == ["c", "d"]
    assert mesh.resumes == [("p0", set())]
    assert last_join(back, "p0").pages_from == "d:1"
    assert blocks(mesh) == {"p0": 100, "p1": 50}
    assert not any(worker.is_shared for worker in mesh.members.workers)


def test_pages_that_do_not_come_are_rebuilt() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.register("b", incarnation=2, worker={"fetches": False})
    mesh.run()
    assert mesh.stages(0) == ["a", "b"]
    assert mesh.resumes[-1] == ("p0", {1})


def test_while_pages_are_fetched_the_other_one_does_not_grow() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.register("b", incarnation=2, worker={"joins": False})
    mesh.wait(9 * S)
    assert mesh.stages(0) == ["a", "b"]
    assert blocks(mesh)["p1"] == 50
    mesh.members.epochs.stream_broken(
        "p1", mesh.members.pipelines[1].epoch, PeerLost("cut"), mesh.now_ns
    )
    mesh.wait(S)
    assert blocks(mesh)["p1"] == 50, "the fetched pages are there yet"
    mesh.workers["b"].joins = True
    mesh.wait(60 * S)
    assert blocks(mesh) == {"p0": 100, "p1": 100}


def test_whoever_is_alone_again_grows_once_and_after_a_while() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.register("b", incarnation=2)
    mesh.run()
    before = epoch(mesh, 1)
    mesh.wait(5 * S - 1)
    assert epoch(mesh, 1) == before
    mesh.wait(1)
    assert epoch(mesh, 1) == before + 1
    assert mesh.resumes[-1] == ("p1", set())
    assert blocks(mesh) == {"p0": 100, "p1": 100}
    assert all(worker.conduct.num_failures == 0 for worker in mesh.members.workers)
    mesh.wait(60 * S)
    assert epoch(mesh, 1) == before + 1


def test_a_lender_is_disturbed_once_for_a_loss() -> None:
    mesh = replicas()
    lose(mesh, "b")
    assert epoch(mesh, 1) == 2
    mesh.wait(600 * S)
    assert epoch(mesh, 1) == 2


def test_a_pipeline_that_lacks_somebody_else_gives_back_what_was_lent() -> None:
    mesh = replicas()
    lose(mesh, "b")
    spoil(mesh, "c")
    lose(mesh, "a")
    assert mesh.stages(0) == [None, "d"]
    mesh.wait(5 * S)
    assert mesh.stages(0) == [None, None]
    assert mesh.stages(1) == ["c", "d"]
    assert blocks(mesh)["p1"] == 50
    mesh.wait(5 * S)
    assert blocks(mesh)["p1"] == 100


def test_a_dead_lender_keeps_its_half_for_a_while() -> None:
    """Whoever it lacks comes back, and finds all of its KV."""
    mesh = FakeMesh(replace(LIMITS, num_stages=3, num_replicas=2))
    for worker_id in "abcdef":
        few = {"num_blocks": 15} if worker_id == "c" else {}  # too few to be lent
        mesh.register(worker_id, worker=few)
        mesh.run()
    mesh.disconnect("f")
    mesh.wait(S, deaf=["f"])
    mesh.kill("a")
    mesh.wait(S, deaf=["f"])
    assert mesh.stages(0) == ["d", "b", "c"]
    assert mesh.stages(1) == ["d", "e", None]
    mesh.come_back("f")
    mesh.run()
    assert mesh.resumes == [("p0", {0}), ("p1", set())]
    assert blocks(mesh) == {"p0": 15, "p1": 50}
    mesh.wait(10 * S)
    assert blocks(mesh) == {"p0": 15, "p1": 50}, "half of d is still p0's"


def test_who_comes_again_soon_finds_what_was_given_back_and_disturbs_nobody() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.disconnect("a")
    mesh.wait(S, deaf=["a"])
    assert mesh.stages(0) == ["c", "d"], "both are lent"
    mesh.come_back("a")
    mesh.run()
    assert mesh.stages(0) == ["a", "d"]
    assert blocks(mesh) == {"p0": 50, "p1": 50}
    assert mesh.stages(1) == ["c", "d"]


def test_a_lender_that_breaks_for_good_leaves_the_worker_to_the_other_one() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=3, num_replicas=2))
    for worker_id in "abcdef":
        mesh.register(worker_id)
        mesh.run()
    lose(mesh, "a")
    spoil(mesh, "c")
    lose(mesh, "f")
    assert mesh.stages(0) == ["d", "b", "c"]
    assert mesh.stages(1) == ["d", "e", None]
    mesh.wait(5 * S)
    assert mesh.stages(1) == [None, "e", None]
    assert blocks(mesh)["p0"] == 50
    mesh.wait(5 * S)
    assert blocks(mesh)["p0"] == 100
    assert mesh.resumes[-1] == ("p0", set()), "it keeps what it has at the end"
    assert last_join(mesh.workers["d"], "p0").from_end


def test_a_loan_that_is_in_vain_ends() -> None:
    mesh = replicas()
    mesh.workers["a"].joins = False
    lose(mesh, "b")
    assert mesh.stages(0) == ["a", "d"]
    for _ in range(6):
        broken = mesh.members.pipelines[0].epoch
        mesh.members.epochs.stream_broken("p0", broken, PeerLost("cut"), mesh.now_ns)
        mesh.wait(9 * S)
    assert mesh.stages(0) == ["a", None]
    assert blocks(mesh)["p1"] == 100
    mesh.workers["a"].joins = True
    mesh.wait(50 * S)
    assert mesh.stages(0) == ["a", None], "it is not tried again at once"
    mesh.wait(20 * S)
    assert mesh.stages(0) == ["a", "d"]
    assert mesh.serving == ["p0", "p1"]


def test_free_workers_are_for_places_that_are_lent_before_they_are_a_replica() -> None:
    mesh = replicas(num=2)
    mesh.members._formation._num_replicas = 0  # as many as can be made, from now on
    lose(mesh, "b")
    lose(mesh, "a")
    for worker_id in ("x", "y"):
        mesh.register(worker_id)
    mesh.run()
    mesh.wait(10 * S)
    assert len(mesh.members.pipelines) == 2
    assert blocks(mesh) == {"p0": 100, "p1": 100}


# ---- losses and drains of shared workers -------------------------------------------------------


def test_the_loss_of_a_shared_worker_is_one_for_both() -> None:
    mesh = replicas(3)
    lose(mesh, "b")
    assert mesh.stages(0) == ["a", "d"]
    mesh.resumes.clear()
    lose(mesh, "d")
    assert mesh.stages(0) == ["a", "f"]
    assert mesh.stages(1) == ["c", None], "nobody serves three"
    assert mesh.serving == ["p0", "p2"]
    assert sorted(mesh.resumes) == [("p0", {1}), ("p2", set())]


def test_a_stream_of_a_shared_worker_that_hiccups_costs_both_an_epoch_and_no_kv() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.resumes.clear()
    mesh.disconnect("d")
    mesh.run()
    assert not mesh.serving
    mesh.come_back("d")
    mesh.wait(S // 2)
    assert sorted(mesh.resumes) == [("p0", set()), ("p1", set())]


def test_a_shared_worker_that_cannot_go_on_leaves_both() -> None:
    mesh = replicas()
    lose(mesh, "b")
    mesh.members.failed(mesh.workers["d"].session, InternalError("no"), mesh.now_ns)
    mesh.wait(S)
    assert "d" not in mesh.stages(0) + mesh.stages(1)


def drain(mesh: FakeMesh, worker_id: str) -> DrainDone:
    mesh.resumes.clear()
    number = mesh.members.drain(worker_id, now_ns=mesh.now_ns)
    mesh.wait(60 * S)
    return mesh.drained[number]


def test_both_places_of_a_drained_worker_are_handed_over() -> None:
    mesh = replicas()
    lose(mesh, "b")
    for worker_id in ("x", "y"):
        mesh.register(worker_id, span=(3, 6), worker={"loads": False})
        mesh.run()
    mesh.resumes.clear()
    number = mesh.members.drain("d", now_ns=mesh.now_ns)
    mesh.run()
    for worker_id in ("x", "y"):
        assert mesh.serving == ["p0", "p1"], "it serves on while they load"
        mesh.finish_load(mesh.workers[worker_id], Span(3, 6))
        mesh.run()
    mesh.wait(10 * S)
    assert mesh.drained[number].error is None
    assert "d" not in mesh.workers
    assert {mesh.stages(0)[1], mesh.stages(1)[1]} == {"x", "y"}
    assert all(not lost for _, lost in mesh.resumes)
    assert blocks(mesh) == {"p0": 100, "p1": 100}


def test_one_successor_takes_both_places_where_there_is_no_other() -> None:
    mesh = replicas()
    lose(mesh, "b")
    spare = mesh.register("x", worker={"loads": False, "num_log_blocks": NUM_BLOCKS})
    mesh.run()
    mesh.resumes.clear()
    number = mesh.members.drain("d", now_ns=mesh.now_ns)
    mesh.run()
    mesh.finish_load(spare, Span(3, 6))
    mesh.run()
    assert mesh.stages(0) == ["a", "x"]
    assert mesh.stages(1) == ["c", "x"]
    assert mesh.drained[number] == DrainDone(number, "x")
    assert all(not lost for _, lost in mesh.resumes), "pages came along for both"
    assert mesh.serving == ["p0", "p1"]


def test_a_shared_worker_without_a_successor_is_released_at_once() -> None:
    mesh = replicas()
    lose(mesh, "b")
    done = drain(mesh, "d")
    assert done == DrainDone(done.drain_id)
    assert "d" not in mesh.workers


def test_a_drained_worker_hands_over_to_one_of_a_replica_where_there_is_no_spare() -> None:
    mesh = replicas()
    done = drain(mesh, "a")
    assert done.successor_id == "c"
    assert mesh.stages(0) == ["c", "b"]
    assert ("p0", set()) in mesh.resumes
    assert blocks(mesh) == {"p0": 50, "p1": 50}

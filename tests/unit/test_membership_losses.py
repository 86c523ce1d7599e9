"""What becomes of a pipeline when workers come and go: its epochs, and the KV of its stages."""

from __future__ import annotations

from dataclasses import replace

from support.members import LIMITS, MS, TERM, FakeMesh, S, two_stages

from scheduler.mesh_view import view_of
from scheduler.messages import JoinEpoch, LeaveEpoch, LoadedSpan, LoadSpan
from stagemesh.errors import CheckpointError, InternalError, PeerLost
from stagemesh.plan import Epoch, Span


def test_a_stream_that_hiccups_costs_an_epoch_and_no_kv() -> None:
    mesh = two_stages()
    mesh.disconnect("a")
    mesh.run()
    assert not mesh.serving
    assert "p0" in mesh.core, "its requests wait"
    assert isinstance(mesh.workers["b"].commands[-1], LeaveEpoch)
    mesh.come_back("a")
    mesh.wait(S // 2)
    assert mesh.serving == ["p0"]
    assert mesh.resumes == [("p0", set())]
    assert mesh.workers["b"].last_join.keep_kv
    assert mesh.core["p0"].epoch == Epoch(TERM, 2)


def test_a_worker_that_does_not_come_back_at_once_loses_its_place() -> None:
    mesh = two_stages()
    mesh.disconnect("a")
    mesh.wait(240 * MS, deaf=["a"])
    assert mesh.stages() == ["a", "b"]
    mesh.wait(20 * MS, deaf=["a"])
    assert mesh.stages() == [None, "b"]
    assert mesh.suspended == {"p0"}, "its requests wait"


def test_a_step_that_kills_its_workers_is_given_up() -> None:
    mesh = two_stages()
    for incarnation in range(2, 8):
        mesh.members.epochs.step_sent("p0")
        mesh.register("b", incarnation=incarnation)
        mesh.run()
        assert mesh.serving == ["p0"]
        assert mesh.failed_steps == (["p0"] if incarnation == 7 else [])
    assert [lost for _, lost in mesh.resumes] == [{1}] * 6


def test_a_silent_worker_is_lost_when_its_lease_ends() -> None:
    mesh = two_stages()
    session = mesh.workers["b"].session
    mesh.wait(3 * S, deaf=["b"])
    assert mesh.ended == {session: None}, "it may come back"
    assert mesh.suspended == {"p0"}
    assert mesh.stages() == ["a", None]
    assert view_of(mesh.members).detail == "1 of 2 stages: waiting for layers 3:6"


def test_a_restarted_process_takes_its_place_before_the_old_lease_ends() -> None:
    mesh = two_stages()
    old = mesh.workers["a"].session
    mesh.register("a", incarnation=2)
    mesh.run()
    assert "another process" in str(mesh.ended[old])
    assert mesh.serving == ["p0"]
    assert mesh.workers["a"].commands[0] == LoadSpan(Span(0, 3))
    assert mesh.resumes == [("p0", {0})]
    assert mesh.core["p0"].epoch == Epoch(TERM, 2)
    mesh.members.disconnected(old, mesh.now_ns)
    mesh.run()
    assert mesh.serving == ["p0"], "the end of the old stream is no news"


def test_a_restarted_worker_with_a_fixed_span_completes_the_pipeline() -> None:
    mesh = FakeMesh()
    mesh.register("a", span=(0, 3))
    mesh.register("b", span=(3, 6))
    mesh.run()
    mesh.disconnect("b")
    mesh.wait(60 * S, deaf=["b"])
    assert not mesh.serving
    mesh.register("b", incarnation=2, span=(3, 6))
    mesh.run()
    assert mesh.serving == ["p0"]


def test_a_spare_takes_the_place_of_a_lost_worker() -> None:
    mesh = two_stages()
    mesh.register("spare")
    mesh.disconnect("a")
    mesh.wait(3 * S, deaf=["a"])
    assert mesh.serving == ["p0"]
    assert mesh.stages() == ["spare", "b"]


def test_a_worker_that_holds_the_layers_is_preferred_to_one_that_must_load_them() -> None:
    mesh = two_stages(num_replicas=1)
    mesh.register("idle")
    mesh.register("holder", loaded=LoadedSpan(Span(0, 3), 100, 16))
    mesh.disconnect("a")
    mesh.wait(3 * S, deaf=["a"])
    assert mesh.stages() == ["holder", "b"]


def test_two_broken_replicas_make_one_that_serves() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2, share_workers=False))
    for worker_id in "abcd":
        mesh.register(worker_id)
    mesh.run()
    assert mesh.serving == ["p0", "p1"]
    mesh.members.goodbye(mesh.workers["a"].session, "gone", mesh.now_ns)
    mesh.members.goodbye(mesh.workers["d"].session, "gone", mesh.now_ns)
    mesh.run()
    assert mesh.stages() == ["c", "b"]
    assert mesh.serving == ["p0"]
    assert list(mesh.core) == ["p0"]


def test_a_loss_while_loading() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.register("b", worker={"loads": False})
    mesh.run()
    mesh.members.goodbye(mesh.workers["b"].session, "gone", mesh.now_ns)
    mesh.run()
    assert mesh.stages() == ["a", None]
    mesh.register("c")
    mesh.run()
    assert mesh.serving == ["p0"]
    assert mesh.core["p0"].epoch == Epoch(TERM, 1)


def test_a_loss_while_joining() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.register("b", worker={"joins": False})
    mesh.run()
    assert not mesh.serving
    mesh.register("b", incarnation=2)
    mesh.run()
    assert mesh.serving == ["p0"]
    assert mesh.core["p0"].epoch == Epoch(TERM, 2)
    joins = [c for c in mesh.workers["a"].commands if isinstance(c, JoinEpoch)]
    assert [join.epoch.n for join in joins] == [1, 2]
    assert LeaveEpoch("p0", Epoch(TERM, 1)) in mesh.workers["a"].commands


def test_a_word_about_an_epoch_that_is_over_is_ignored() -> None:
    mesh = two_stages()
    mesh.disconnect("a")
    mesh.come_back("a")
    mesh.workers["a"].joins = False
    mesh.wait(S // 2)
    session = mesh.workers["a"].session
    mesh.members.epochs.joined(session, "p0", Epoch(TERM, 1))
    mesh.members.epochs.stream_broken("p0", Epoch(TERM, 1), PeerLost("late"), mesh.now_ns)
    mesh.members.epochs.broken(session, "p0", Epoch(TERM, 1), PeerLost("late"), "", mesh.now_ns)
    mesh.run()
    assert not mesh.serving
    mesh.members.epochs.joined(session, "p0", Epoch(TERM, 2))
    mesh.run()
    assert mesh.serving == ["p0"]


def test_a_join_that_takes_too_long_is_tried_again_and_says_who_was_late() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    late = mesh.register("b", worker={"joins": False})
    mesh.run()
    mesh.wait(10 * S)
    assert "b did not join in time" in view_of(mesh.members).detail
    mesh.wait(S)
    assert late.last_join.epoch.n == 2
    late.joins = True
    mesh.wait(20 * S)
    assert mesh.serving == ["p0"]


def test_the_schedulers_own_stream_is_part_of_the_epoch() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.streams_open = False
    mesh.register("a")
    mesh.register("b")
    mesh.run()
    assert not mesh.serving
    epoch = mesh.members.pipelines[0].epoch
    mesh.members.epochs.stream_opened("p0", epoch)
    mesh.run()
    assert mesh.serving == ["p0"]
    mesh.members.epochs.stream_broken("p0", epoch, PeerLost("cut"), mesh.now_ns)
    mesh.streams_open = True
    mesh.wait(S)
    assert mesh.serving == ["p0"]
    assert mesh.resumes == [("p0", set())]


def test_a_failing_step_is_tried_again_with_growing_pauses_and_at_last_without_kv() -> None:
    mesh = two_stages()
    pauses_ns = []
    for _ in range(5):
        pipeline = mesh.members.pipelines[0]
        session = mesh.workers["b"].session
        error = InternalError("cannot execute")
        mesh.members.epochs.step_sent("p0")
        mesh.members.epochs.broken(session, "p0", pipeline.epoch, error, "", mesh.now_ns)
        mesh.run()
        failed_ns = mesh.now_ns
        while not mesh.serving:
            mesh.wait(10 * MS)
        pauses_ns.append(mesh.now_ns - failed_ns)
    assert pauses_ns == sorted(pauses_ns)
    assert pauses_ns[-1] >= 4 * pauses_ns[0]
    assert mesh.resumes == [("p0", set())] * 2
    assert mesh.failed_steps == ["p0"] * 3
    assert mesh.members.workers[1].conduct.num_failures == 5
    assert mesh.members.workers[0].conduct.num_failures == 0
    mesh.members.epochs.step_done("p0")
    assert mesh.members.workers[1].conduct.num_failures == 0


def test_a_worker_that_cannot_load_is_named_and_not_asked_again() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    broken = mesh.register("b", worker={"loads": False})
    mesh.run()
    error = CheckpointError("model-2.safetensors ends too early")
    mesh.members.failed(broken.session, error, mesh.now_ns)
    mesh.run()
    assert "worker b: model-2.safetensors ends too early" in view_of(mesh.members).detail
    assert len(broken.commands) == 1
    mesh.register("c")
    mesh.run()
    assert mesh.serving == ["p0"]


def test_all_workers_lost_and_others_come() -> None:
    mesh = two_stages()
    mesh.wait(3 * S, deaf=["a", "b"])
    assert mesh.members.workers == []
    mesh.register("c")
    mesh.register("d")
    mesh.run()
    assert mesh.serving == ["p0"]
    assert mesh.resumes == [("p0", {0, 1})]


def test_all_workers_leave_and_nothing_is_left_of_the_pipeline() -> None:
    mesh = two_stages()
    for worker in mesh.workers.values():
        mesh.members.goodbye(worker.session, "done", mesh.now_ns)
    mesh.run()
    assert mesh.members.pipelines == []
    assert not mesh.core


def test_two_processes_of_one_name_do_not_fight_for_ever() -> None:
    mesh = two_stages()
    first = mesh.workers["a"].session
    mesh.register("a", incarnation=2)
    mesh.run()
    assert mesh.ended[first] is not None, "the first is refused and does not come back"


def test_the_only_worker_is_started_again_before_its_grace_is_over() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=1))
    mesh.register("a", worker={"loads": False})
    mesh.run()
    mesh.disconnect("a")
    mesh.register("a", incarnation=2)
    mesh.run()
    assert len(mesh.serving) == 1


def test_progress_of_loading_is_known() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    worker = mesh.register("a", worker={"loads": False})
    mesh.run()
    mesh.members.load_progress(worker.session, 30, 120)
    assert mesh.members.workers[0].load_fraction == 0.25
    assert view_of(mesh.members).detail.startswith("0 of 2 stages: worker a loads layers 0:3")


def test_nothing_is_due_without_members() -> None:
    mesh = FakeMesh()
    assert mesh.members.wakeup_ns() is None
    assert view_of(mesh.members).detail == "no worker has registered"


def test_how_long_each_phase_of_mending_took() -> None:
    mesh = two_stages()
    mesh.disconnect("b")
    mesh.wait(S, deaf=["b"])
    joiner = mesh.register("c", worker={"joins": False})
    mesh.run()
    mending = mesh.members.pipelines[0].mending
    assert mending is not None
    assert (mending.fill_ns, mending.join_ns) == (S, 0)
    mesh.wait(S // 2)
    mesh.members.epochs.joined(joiner.session, "p0", Epoch(TERM, 2))
    mesh.run()
    assert mending.join_ns == S // 2
    assert mesh.members.epochs.rebuilding == mesh.members.pipelines
    mesh.wait(S)
    mesh.members.pipelines[0].rebuilt(17, mesh.now_ns)
    assert not mesh.members.epochs.rebuilding
    assert (mending.rebuild_ns, mending.num_tokens_rebuilt) == (S, 17)
    assert "worker b broke" in mending.reason

"""Who forms a pipeline, and what becomes of it when workers come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.members import LIMITS, MS, TERM, FakeMesh, S, model

from scheduler.mesh_view import view_of
from scheduler.messages import JoinEpoch, LeaveEpoch, LoadedSpan, LoadSpan
from stagemesh.errors import (
    CheckpointError,
    InternalError,
    ModelMismatch,
    PeerLost,
    SpanError,
)
from stagemesh.plan import Epoch, Span


def two_stages(**changes: int) -> FakeMesh:
    """A mesh of two workers that serves."""
    mesh = FakeMesh(replace(LIMITS, num_stages=2, **changes))
    mesh.register("a")
    mesh.register("b")
    mesh.run()
    assert mesh.serving == ["p0"]
    return mesh


# ---- forming -----------------------------------------------------------------------------------


def test_two_workers_make_the_two_stages_that_were_asked_for() -> None:
    mesh = two_stages()
    assert mesh.stages() == ["a", "b"]
    assert mesh.spans() == [(0, 3), (3, 6)]
    facts = mesh.core["p0"]
    assert (facts.epoch, facts.num_stages, facts.num_blocks) == (Epoch(TERM, 1), 2, 100)
    first, last = mesh.workers["a"].last_join, mesh.workers["b"].last_join
    assert (first.stage, first.next_address) == (0, "b:1")
    assert (last.stage, last.next_address) == (1, "scheduler:1")
    assert not first.keep_kv


def test_the_smallest_stage_bounds_the_blocks() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.register("b", worker={"num_blocks": 7})
    mesh.run()
    assert mesh.core["p0"].num_blocks == 7
    assert mesh.workers["a"].last_join.num_blocks == 7
    assert view_of(mesh.members).max_model_len == 7 * 16


def test_the_first_worker_loads_while_the_second_is_awaited() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.run()
    assert mesh.workers["a"].commands == [LoadSpan(Span(0, 3))]
    assert view_of(mesh.members).detail == "1 of 2 stages: waiting for layers 3:6"
    mesh.register("b")
    mesh.run()
    assert view_of(mesh.members) == replace(
        view_of(mesh.members), serving=True, num_pipelines=1, detail="", max_model_len=128
    )


def test_without_a_number_of_stages_all_that_come_within_the_settle_time_make_one() -> None:
    mesh = FakeMesh()
    mesh.register("a")
    mesh.wait(4 * S)
    mesh.register("b")
    mesh.wait(4 * S)
    mesh.register("c")
    mesh.wait(4 * S)
    assert not mesh.serving
    mesh.wait(S + MS)
    assert mesh.serving == ["p0"]
    assert mesh.spans() == [(0, 2), (2, 4), (4, 6)]


def test_later_workers_make_a_replica_when_there_are_enough_else_they_are_spares() -> None:
    mesh = FakeMesh()
    mesh.register("a")
    mesh.register("b")
    mesh.wait(6 * S)
    mesh.register("c")
    mesh.wait(60 * S)
    assert mesh.serving == ["p0"]
    mesh.register("d")
    mesh.run()
    assert mesh.serving == ["p0", "p1"]
    assert mesh.stages(1) == ["c", "d"]


def test_the_number_of_replicas_bounds_the_pipelines() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=1, num_replicas=2))
    for worker_id in "abc":
        mesh.register(worker_id)
    mesh.run()
    assert mesh.serving == ["p0", "p1"]
    assert mesh.workers["c"].commands == []


def test_a_worker_that_comes_while_the_first_pipeline_still_loads_is_counted_in() -> None:
    mesh = FakeMesh()
    slow = mesh.register("a", worker={"loads": False})
    mesh.wait(6 * S)
    assert slow.commands == [LoadSpan(Span(0, 6))]
    mesh.register("b")
    mesh.wait(6 * S)
    assert mesh.spans() == [(0, 3), (3, 6)]
    assert slow.commands == [LoadSpan(Span(0, 6))], "it is told when it has done the first"
    slow.loads = True
    mesh.finish_load(slow, Span(0, 6))
    mesh.run()
    assert slow.commands[1] == LoadSpan(Span(0, 3))
    assert mesh.serving


def test_fixed_spans_that_cover_the_model_serve_at_once() -> None:
    mesh = FakeMesh()
    mesh.register("a", span=(4, 6))
    mesh.register("b", span=(0, 4))
    mesh.run()
    assert mesh.stages() == ["b", "a"]
    assert mesh.serving == ["p0"]


def test_a_worker_without_a_fixed_span_fills_the_gap() -> None:
    mesh = FakeMesh()
    mesh.register("a", span=(0, 2))
    mesh.register("b", span=(5, 6))
    mesh.wait(20 * S)
    assert not mesh.serving
    mesh.register("c")
    mesh.wait(6 * S)
    assert mesh.spans() == [(0, 2), (2, 5), (5, 6)]
    assert mesh.stages() == ["a", "c", "b"]


def test_a_fixed_span_that_fits_no_place_has_the_layers_cut_anew() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.run()
    mesh.register("b", span=(2, 6))
    mesh.run()
    assert mesh.spans() == [(0, 2), (2, 6)]
    assert mesh.stages() == ["a", "b"]
    assert mesh.serving


def test_workers_with_layers_from_before_take_them_up_again() -> None:
    """A scheduler that starts anew finds the workers as the one before left them."""
    mesh = FakeMesh()
    mesh.register("a", loaded=LoadedSpan(Span(4, 6), 50, 16))
    mesh.wait(8 * S)
    assert not mesh.serving
    mesh.register("b", loaded=LoadedSpan(Span(0, 4), 50, 16))
    mesh.run()
    assert mesh.serving == ["p0"]
    assert mesh.stages() == ["b", "a"]
    assert not any(isinstance(command, LoadSpan) for command in mesh.workers["a"].commands)


# ---- refusals ----------------------------------------------------------------------------------


def test_the_holder_of_a_later_stage_that_comes_first_does_not_load_the_first() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("b", loaded=LoadedSpan(Span(3, 6), 100, 16))
    mesh.run()
    mesh.register("a", loaded=LoadedSpan(Span(0, 3), 100, 16))
    mesh.run()
    assert mesh.stages() == ["a", "b"]
    told = mesh.workers["a"].commands + mesh.workers["b"].commands
    assert not any(isinstance(command, LoadSpan) for command in told)


def test_a_worker_with_another_model_is_refused_by_what_differs() -> None:
    mesh = two_stages()
    other = model(structure_hash="other", num_layers=4, name="large")
    with pytest.raises(ModelMismatch, match=r"large.*num_layers is 4, not 6"):
        mesh.register("c", model=other)
    config = model(structure_hash="other")
    with pytest.raises(ModelMismatch, match="config or its tensors"):
        mesh.register("c", model=config)
    mesh.run()
    assert mesh.serving


def test_a_worker_with_other_weights_is_refused_by_their_names() -> None:
    mesh = two_stages()
    hashes = {**model().part_hashes, "layer.3": "x", "head": "y"}
    with pytest.raises(ModelMismatch, match=r"layer\.3, head"):
        mesh.register("c", model=model(part_hashes=hashes))


def test_a_worker_that_has_only_its_own_parts_is_taken() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    first = {"embedding": "e", "layer.0": "0", "layer.1": "1", "layer.2": "2"}
    last = {"layer.3": "3", "layer.4": "4", "layer.5": "5", "norm": "n", "head": "h"}
    mesh.register("a", span=(0, 3), model=model(part_hashes=first))
    mesh.register("b", span=(3, 6), model=model(part_hashes=last))
    mesh.run()
    assert mesh.serving
    whole = FakeMesh(replace(LIMITS, num_stages=1))
    whole.register("c", model=model(part_hashes={**first, **last}))
    whole.run()
    assert view_of(whole.members).identity == view_of(mesh.members).identity != ""


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [("dtype", "bfloat16", "--dtype bfloat16"), ("batch_invariant", True, "--batch-invariant")],
)
def test_other_numerics_are_refused(field: str, value: object, option: str) -> None:
    mesh = two_stages()
    with pytest.raises(ModelMismatch, match=option):
        mesh.register("c", **{field: value})  # type: ignore[arg-type]


def test_a_span_outside_the_model_is_refused() -> None:
    mesh = FakeMesh()
    with pytest.raises(SpanError, match=r"4:9.*0:6"):
        mesh.register("a", span=(4, 9))
    with pytest.raises(SpanError, match=r"7 stages.*6 layers"):
        FakeMesh(replace(LIMITS, num_stages=7)).register("a")


def test_blocks_of_another_size_are_refused() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    odd = mesh.register("b", worker={"block_size_tokens": 32})
    mesh.run()
    assert "32 tokens" in str(mesh.ended[odd.session])
    assert not mesh.serving
    mesh.register("b", incarnation=2)
    mesh.run()
    assert mesh.serving


def test_a_mesh_that_never_served_may_begin_again_with_another_model() -> None:
    mesh = FakeMesh()
    worker = mesh.register("a")
    mesh.members.goodbye(worker.session, "wrong model", mesh.now_ns)
    mesh.register("a", incarnation=2, model=model(structure_hash="other"))


def test_a_mesh_that_served_keeps_its_model() -> None:
    mesh = two_stages()
    for worker in mesh.workers.values():
        mesh.members.goodbye(worker.session, "done", mesh.now_ns)
    with pytest.raises(ModelMismatch):
        mesh.register("a", incarnation=2, model=model(structure_hash="other"))


# ---- losses ------------------------------------------------------------------------------------


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


def test_a_worker_that_stays_away_for_its_lease_is_lost_with_its_kv() -> None:
    mesh = two_stages()
    mesh.disconnect("a")
    mesh.wait(1900 * MS, deaf=["a"])
    assert "p0" in mesh.core
    mesh.wait(200 * MS, deaf=["a"])
    assert not mesh.core
    assert mesh.stages() == [None, "b"]
    mesh.come_back("a")
    mesh.wait(S // 2)
    assert mesh.serving == ["p0"]
    assert not mesh.workers["b"].last_join.keep_kv
    assert mesh.workers["b"].last_join.epoch == Epoch(TERM, 2)


def test_a_silent_worker_is_lost_when_its_lease_ends() -> None:
    mesh = two_stages()
    session = mesh.workers["b"].session
    mesh.wait(3 * S, deaf=["b"])
    assert mesh.ended == {session: None}, "it may come back"
    assert not mesh.core
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
    assert mesh.resumes == []
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
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
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
    mesh.members.epoch_joined(session, "p0", Epoch(TERM, 1))
    mesh.members.stream_broken("p0", Epoch(TERM, 1), PeerLost("late"), mesh.now_ns)
    mesh.members.epoch_broken(session, "p0", Epoch(TERM, 1), PeerLost("late"), "", mesh.now_ns)
    mesh.run()
    assert not mesh.serving
    mesh.members.epoch_joined(session, "p0", Epoch(TERM, 2))
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
    mesh.members.stream_opened("p0", epoch)
    mesh.run()
    assert mesh.serving == ["p0"]
    mesh.members.stream_broken("p0", epoch, PeerLost("cut"), mesh.now_ns)
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
        mesh.members.epoch_broken(session, "p0", pipeline.epoch, error, "", mesh.now_ns)
        mesh.run()
        failed_ns = mesh.now_ns
        while not mesh.serving:
            mesh.wait(10 * MS)
        pauses_ns.append(mesh.now_ns - failed_ns)
    assert pauses_ns == sorted(pauses_ns)
    assert pauses_ns[-1] >= 4 * pauses_ns[0]
    assert mesh.resumes == [("p0", set())] * 2
    assert mesh.failed_steps == ["p0"] * 3
    assert mesh.members.workers[1].num_failures == 5
    assert mesh.members.workers[0].num_failures == 0
    mesh.members.step_done("p0")
    assert mesh.members.workers[1].num_failures == 0


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
    assert len(mesh.serving) == 1
    assert mesh.serving[0] != "p0"


def test_two_processes_of_one_name_do_not_fight_for_ever() -> None:
    mesh = two_stages()
    first = mesh.workers["a"].session
    mesh.register("a", incarnation=2)
    mesh.run()
    assert mesh.ended[first] is not None, "the first is refused and does not come back"


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

"""Busy shares and bytes of stages from looks at a mesh, and which looks may be taken."""

from __future__ import annotations

import pytest

from protos import mesh_pb2
from stagemesh.bench.stage_usage import has_caught_up, stage_usage, steady_pair

SECOND_NS = 10**9


def worker(
    name: str,
    steps: int,
    busy_s: float = 0.0,
    waiting_s: float = 0.0,
    serialise_s: float = 0.0,
    incarnation: int = 1,
) -> mesh_pb2.WorkerStatus:
    stats = mesh_pb2.WorkerStats(
        steps_executed=steps,
        rows_executed=3 * steps,
        compute_ns=round(busy_s * SECOND_NS),
        busy_ns=round(busy_s * SECOND_NS),
        input_wait_ns=round(waiting_s * SECOND_NS),
        serialise_ns=round(serialise_s * SECOND_NS),
        bytes_sent=1000 * steps,
        messages_sent=steps,
    )
    return mesh_pb2.WorkerStatus(worker_id=name, incarnation=incarnation, stats=stats)


def look(
    steps_done: int, *workers: mesh_pb2.WorkerStatus, unscheduled_s: float = 0.0
) -> mesh_pb2.GetStatusResponse:
    """One pipeline of all the workers."""
    pipeline = mesh_pb2.PipelineStatus(
        pipeline_id="p0",
        worker_ids=[each.worker_id for each in workers],
        steps_done=steps_done,
        unscheduled_ns=round(unscheduled_s * SECOND_NS),
    )
    return mesh_pb2.GetStatusResponse(workers=workers, pipelines=[pipeline])


def test_shares_are_of_the_steady_time_and_counts_of_all() -> None:
    before = look(10, worker("a", 10), worker("b", 10))
    # Of four seconds that a counted, nothing was under way for half a one.
    first = look(20, worker("a", 20, 1.0, 9.0), worker("b", 20, 2.0, 8.0))
    last = look(40, worker("a", 40, 3.0, 10.0, 1.0), worker("b", 40, 3.0, 11.0), unscheduled_s=0.5)
    after = look(50, worker("a", 50, 4.5, 30.0), worker("b", 50, 3.5, 31.0))
    a, b = stage_usage(before, after, (first, last))
    assert (a.worker, a.stage, b.worker, b.stage) == ("a", 0, "b", 1)
    assert a.shares == pytest.approx(
        {
            "busy": 0.5,
            "serialise": 0.25,
            "output wait": 0.0,
            "input wait": 0.125,
            "unscheduled": 0.125,
        }
    )
    assert a.bubble_share == pytest.approx(0.375)
    assert b.busy_share == pytest.approx(0.25)
    assert (a.num_steps, a.bytes_sent, a.messages_sent) == (40, 40_000, 40)
    assert a.rows_per_step == 3.0
    assert a.compute_ms_per_step == pytest.approx(4500 / 40)


def test_a_worker_that_was_started_again_has_no_numbers() -> None:
    before = look(0, worker("a", 10), worker("b", 10))
    after = look(5, worker("a", 15, 1.0, 1.0), worker("b", 5, 1.0, 1.0, incarnation=2))
    assert [stage.worker for stage in stage_usage(before, after, (before, after))] == ["a"]


def test_a_stage_that_nobody_holds_is_left_out() -> None:
    status = look(0, worker("a", 1))
    status.pipelines[0].worker_ids.append("")
    assert len(stage_usage(status, status, (status, status))) == 1


def test_steady_looks_begin_with_the_first_step_and_are_long_enough() -> None:
    before, after = look(5, worker("a", 5)), look(30, worker("a", 30, 9.0, 9.0))
    idle = look(5, worker("a", 5))
    first = look(9, worker("a", 9, 0.2, 5.0))
    soon = look(12, worker("a", 12, 0.5, 5.1))
    last = look(20, worker("a", 20, 1.2, 5.2))
    assert steady_pair(before, [idle, first, soon, last], after) == (first, last)
    assert steady_pair(before, [idle, first, soon], after) == (before, after)
    assert steady_pair(before, [], after) == (before, after)


def test_workers_have_caught_up_when_they_report_all_steps_since() -> None:
    before = look(10, worker("a", 110), worker("b", 210))
    assert has_caught_up(before, before)
    assert not has_caught_up(before, look(15, worker("a", 115), worker("b", 214)))
    assert has_caught_up(before, look(15, worker("a", 115), worker("b", 215)))


def test_a_worker_of_two_pipelines_executes_the_steps_of_both() -> None:
    def both(steps_0: int, steps_1: int, executed: int) -> mesh_pb2.GetStatusResponse:
        status = look(steps_0, worker("a", executed))
        status.pipelines.add(pipeline_id="p1", worker_ids=["a"], steps_done=steps_1)
        return status

    assert not has_caught_up(both(1, 1, 10), both(3, 4, 13))
    assert has_caught_up(both(1, 1, 10), both(3, 4, 15))

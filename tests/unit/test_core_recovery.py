"""What becomes of sequences when stages are lost: rebuilt rows, moves, refusals, probes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.core import Drive, core_with, facts, request, restart

from scheduler.core import PipelineFacts, SchedulerCore
from stagemesh.errors import MeshUnavailable, QueueFull, RequestDeadlineExceeded
from stagemesh.plan import Epoch, Row, Step

S = 1_000_000_000


def three_stages(n: int = 1, **changes: object) -> PipelineFacts:
    """All of what is sent is logged, unless `changes` say otherwise."""
    fields: dict[str, object] = {
        "num_stages": 3,
        "num_log_blocks": (64, 64, 0),
        "epoch": Epoch(1, n),
    }
    return facts(**(fields | changes))


def running(num_prompts: int = 1, num_prompt: int = 10, **limits: object) -> Drive:
    """Sequences on three stages, each with its prompt computed and one token of output."""
    core = core_with(three_stages(), **limits)
    drive = Drive(core)
    for number in range(num_prompts):
        core.submit(request(number, num_prompt=num_prompt, max_tokens=8), 0)
    while any(not drive.output(number) for number in range(num_prompts)):
        drive.plan()
        drive.answer()
    drive.in_flight.clear()
    return drive


def shape(row: Row) -> tuple[int, int, int, int, int, int | None]:
    """(start, end, first, writing and end stage, log that is read)"""
    return (
        row.start,
        row.start + row.num_tokens,
        row.first_stage,
        row.first_writing_stage,
        row.end_stage,
        row.input_from_log_of_stage,
    )


def rebuilds(steps: list[Step]) -> list[Row]:
    """Of stages after the first."""
    return [row for step in steps for row in step.rows if row.first_writing_stage > 0]


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({0}, [(0, 10, 0, 0, 1, None)]),
        ({1}, [(0, 10, 1, 1, 2, 0)]),
        ({2}, [(0, 10, 2, 2, 3, 1)]),
        ({1, 2}, [(0, 10, 1, 1, 3, 0)]),
        ({0, 2}, [(0, 10, 0, 0, 1, None), (0, 10, 2, 2, 3, 1)]),
        ({0, 1, 2}, [(0, 10, 0, 0, 3, None)]),
    ],
)
def test_only_the_lost_stages_are_rebuilt(
    lost: set[int], expected: list[tuple[int, int, int, int, int, int | None]]
) -> None:
    drive = running()
    restart(drive.core, three_stages(2), lost)
    steps = drive.plan()
    rows = [row for step in steps for row in step.rows]
    assert [shape(row) for row in rows[: len(expected)]] == expected
    assert all(not row.sample_positions for row in rows[: len(expected)])
    assert bool(rows[0].token_ids) == (0 in lost)
    assert rows[0].state is not None
    assert all(row.state is None for row in rows[1:])
    assert shape(rows[-1]) == (10, 11, 0, 0, 3, None)
    assert rows[-1].sample_positions == (10,)
    drive.finish()
    assert len(drive.output(0)) == 8


def test_where_the_log_is_short_stages_before_compute_without_writing() -> None:
    drive = running(num_prompt=11)
    restart(drive.core, three_stages(2, num_log_blocks=(2, 1, 0)), {2})
    steps = drive.plan()
    assert [shape(row) for row in rebuilds(steps)] == [
        (0, 4, 2, 2, 3, 1),  # logged by the stage before
        (4, 8, 1, 2, 3, 0),  # logged by the one before that
        (8, 11, 0, 2, 3, None),  # from tokens
    ]
    drive.finish()


def test_a_log_that_grew_has_nothing_of_what_was_written_before() -> None:
    drive = running(num_prompt=11)
    restart(drive.core, three_stages(2, num_log_blocks=(2, 2, 0)))
    restart(drive.core, three_stages(3))
    restart(drive.core, three_stages(4), {1})
    assert [shape(row) for row in rebuilds(drive.plan())] == [
        (0, 8, 1, 1, 2, 0),
        (8, 11, 0, 1, 2, None),  # in the log's reach, but computed when it was not
    ]
    drive.finish()
    drive.core.submit(request(1, num_prompt=11, max_tokens=2), 0)
    while not drive.output(1):
        drive.plan()
        drive.answer()
    drive.in_flight.clear()
    restart(drive.core, three_stages(5), {1})
    rows = [shape(row) for row in rebuilds(drive.plan())]
    assert rows == [(0, 11, 1, 1, 2, 0)], "the same blocks, written anew"


def test_a_log_is_whole_again_where_its_stage_was_rebuilt() -> None:
    drive = running(num_prompt=11)
    restart(drive.core, three_stages(2, num_log_blocks=(2, 2, 0)))
    restart(drive.core, three_stages(3), {0})
    while any(row.end_stage == 1 for step in drive.plan() for row in step.rows):
        drive.answer()
    drive.in_flight.clear()
    restart(drive.core, three_stages(4), {1})
    assert [shape(row) for row in rebuilds(drive.plan())] == [(0, 11, 1, 1, 2, 0)]


def test_a_rebuild_comes_in_chunks_and_others_go_on_when_theirs_is_done() -> None:
    drive = running(num_prompts=2, max_step_tokens=8)
    restart(drive.core, three_stages(2), {1})
    answered = drive.finish()
    by_sequence = {number: [] for number in (1, 2)}
    for row in rebuilds(answered):
        by_sequence[row.sequence_id].append((row.start, row.start + row.num_tokens))
    for chunks in by_sequence.values():
        assert chunks[0][0] == 0
        assert chunks[-1][1] == 10
        assert all(before[1] == after[0] for before, after in pairwise(chunks))
    assert all(step.num_tokens <= 8 for step in answered)


def test_shared_blocks_are_rebuilt_once() -> None:
    core = core_with(three_stages())
    drive = Drive(core)
    prompt = tuple(range(20))
    for number in range(3):
        core.submit(request(number, prompt_token_ids=(*prompt, 90 + number), max_tokens=4), 0)
        drive.plan()
        drive.answer()
    drive.in_flight.clear()
    restart(core, three_stages(2), {1})
    rows = rebuilds(drive.finish())
    assert [row.start for row in rows].count(0) == 1
    assert all(row.start in (0, 20) for row in rows)
    assert [len(drive.output(number)) for number in range(3)] == [4, 4, 4]


def test_a_stage_lost_again_in_mid_rebuild_is_rebuilt_from_what_was_acknowledged() -> None:
    drive = running(num_prompt=12, max_chunk_tokens=4)
    restart(drive.core, three_stages(2), {1})
    drive.plan()
    drive.answer()
    drive.in_flight.clear()
    restart(drive.core, three_stages(3), ())
    assert [shape(row)[:2] for row in rebuilds(drive.plan())] == [(4, 8), (8, 12)]
    drive.in_flight.clear()
    restart(drive.core, three_stages(4), {1})
    drive.plan()
    assert drive.core.stats().pipelines[0].num_lacking_tokens == 12
    answered = drive.finish()
    assert [shape(row)[:2] for row in rebuilds(answered)] == [(0, 4), (4, 8), (8, 12)]
    assert drive.core.stats().pipelines[0].num_lacking_tokens == 0


def test_cached_blocks_that_nobody_owns_are_forgotten_with_their_stage() -> None:
    drive = running(num_prompt=16)
    drive.finish()
    assert drive.core.stats().pipelines[0].num_cached_blocks > 0
    restart(drive.core, three_stages(2), {2})
    assert drive.core.stats().pipelines[0].num_cached_blocks == 0
    drive.core.submit(request(0, num_prompt=16, attempt=1), 0)
    (first, *_) = drive.plan()
    assert first.rows[0].start == 0


def test_who_ends_in_mid_rebuild_leaves_no_block_known_that_a_stage_lacks() -> None:
    drive = running(num_prompt=16, max_chunk_tokens=4)
    restart(drive.core, three_stages(2), {1})
    drive.plan()
    drive.core.abort(request(0).key, 0)
    drive.core.check_integrity()
    stats = drive.core.stats().pipelines[0]
    assert (stats.num_cached_blocks, stats.num_lacking_tokens) == (0, 0)
    drive.finish()


def test_fewer_blocks_preempt_whom_they_do_not_hold_any_more() -> None:
    drive = running(num_prompts=3, num_prompt=16)
    restart(drive.core, three_stages(2, num_blocks=13), {0})
    drive.core.check_integrity()
    stats = drive.core.stats()
    assert (stats.num_waiting, stats.num_preempted) == (1, 1)
    drive.finish()
    assert [len(drive.output(number)) for number in range(3)] == [8, 8, 8]


def test_nothing_is_planned_for_a_suspended_pipeline() -> None:
    drive = running()
    drive.core.suspend_pipeline("p", 0)
    drive.core.submit(request(1), 0)
    assert drive.plan() == []
    drive.core.resume_pipeline(three_stages(2), (), 0)
    assert {row.sequence_id for step in drive.plan() for row in step.rows} == {1, 2}


# ---- replicas ------------------------------------------------------------------------------------


def broken_beside_a_replica(num_prompt: int) -> tuple[SchedulerCore, Drive]:
    """A sequence on "p", whose epoch has just ended; on "q" a token takes a millisecond, and
    mending takes about a second."""
    large = {"num_blocks": 1000, "max_model_len": 3000}
    core = core_with(three_stages(**large), max_step_tokens=1000)
    drive = Drive(core)
    core.suspend_pipeline("p", drive.now_ns)
    core.add_pipeline(three_stages(pipeline_id="q", **large), 0)
    for number in range(1, 7):
        core.submit(request(number, num_prompt=10 * number, max_tokens=1), drive.now_ns)
        for step in drive.plan():
            drive.now_ns += step.num_tokens * S // 1000
            drive.answer()
    drive.finish()
    drive.now_ns = S
    core.resume_pipeline(three_stages(2, **large), (), drive.now_ns)
    core.suspend_pipeline("q", drive.now_ns)
    core.submit(request(20, num_prompt=num_prompt, max_tokens=8), drive.now_ns)
    while not drive.output(20):
        drive.plan()
        drive.answer()
    drive.in_flight.clear()
    core.resume_pipeline(three_stages(2, pipeline_id="q", **large), (), drive.now_ns)
    core.suspend_pipeline("p", drive.now_ns)
    return core, drive


def test_a_short_context_moves_to_a_replica_at_once() -> None:
    core, drive = broken_beside_a_replica(num_prompt=20)
    (step, *_) = drive.plan()
    assert [(row.run, row.start, row.num_tokens) for row in step.rows] == [(1, 0, 21)]
    assert step.pipeline_id == "q"
    drive.finish()
    assert len(drive.output(20)) == 8
    assert core.stats().num_preempted == 1


def test_a_long_context_waits_until_mending_takes_longer_than_beginning_anew() -> None:
    core, drive = broken_beside_a_replica(num_prompt=2000)
    assert drive.plan() == []
    due_ns = core.next_deadline_ns()
    assert due_ns is not None
    assert drive.now_ns < due_ns <= drive.now_ns + S
    drive.now_ns += S
    assert drive.plan() == []
    drive.now_ns += 2 * S
    assert {step.pipeline_id for step in drive.plan()} == {"q"}
    drive.finish()
    assert len(drive.output(20)) == 8


# ---- deadlines and probes ------------------------------------------------------------------------


def test_a_deadline_that_cannot_be_met_is_refused_by_measured_rates() -> None:
    core = core_with(facts(max_model_len=1000, num_blocks=1000))
    drive = Drive(core)
    for number in range(6):
        core.submit(request(number, num_prompt=100, max_tokens=1), drive.now_ns)
        drive.plan()
        drive.now_ns += S
        drive.answer()
    with pytest.raises(QueueFull, match="deadline leaves") as refused:
        core.submit(request(10, num_prompt=500, deadline_ns=drive.now_ns + 3 * S), drive.now_ns)
    assert refused.value.retry_after_s == pytest.approx(2, rel=0.2)
    core.submit(request(11, num_prompt=500, deadline_ns=drive.now_ns + 30 * S), drive.now_ns)
    with pytest.raises(QueueFull):  # behind that one
        core.submit(request(12, num_prompt=100, deadline_ns=drive.now_ns + 3 * S), drive.now_ns)


@pytest.mark.parametrize("serves", [True, False])
def test_a_deadline_says_whether_the_mesh_served(serves: bool) -> None:
    core = core_with(facts())
    core.submit(request(deadline_ns=S), 0)
    if not serves:
        core.suspend_pipeline("p", 0)
    drive = Drive(core)
    drive.now_ns = S
    drive.plan()
    error = drive.ended()[0].error
    assert type(error) is (RequestDeadlineExceeded if serves else MeshUnavailable)
    assert (error.retry_after_s is None) == serves


def test_a_probe_goes_through_an_idle_pipeline_and_leaves_no_trace() -> None:
    core = core_with(three_stages())
    drive = Drive(core)
    before = core.stats()
    assert core.probe("p", 0)
    assert not core.probe("p", 0)
    (step,) = drive.plan()
    assert [shape(row)[2:5] for row in step.rows] == [(0, 0, 3)]
    drive.answer()
    drive.finish()
    after = core.stats()
    assert drive.events == []
    assert after.pipelines[0].num_free_blocks == after.pipelines[0].num_blocks
    assert after.pipelines[0].steps_done > before.pipelines[0].steps_done
    assert (after.num_accepted, after.generated_tokens) == (0, 0)


@pytest.mark.parametrize("what", ["suspend_pipeline", "remove_pipeline"])
def test_a_probe_ends_with_its_epoch(what: str) -> None:
    core = core_with(three_stages())
    drive = Drive(core)
    core.probe("p", 0)
    drive.plan()
    getattr(core, what)("p", 0)
    core.check_integrity()
    assert core.stats().num_waiting == 0
    assert not core.probe("p", 0)


def test_a_probe_does_not_disturb_a_pipeline_at_work() -> None:
    drive = running()
    assert not drive.core.probe("p", 0)

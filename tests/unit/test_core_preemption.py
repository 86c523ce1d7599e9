"""Who goes first, and who gives way when blocks are short."""

from __future__ import annotations

from support.core import Drive, core_with, facts, request

from scheduler.core import EndReason
from scheduler.core.queue import WaitingQueue
from scheduler.core.sequence import Sequence
from stagemesh.plan import Step
from stagemesh.sampling import SamplingSpec


def sequence(number: int, priority: int = 0) -> Sequence:
    return Sequence(request(number, priority=priority), number, number, 0)


def rows_of(steps: list[Step]) -> list[tuple[int, int]]:
    """(sequence, run) in order of their first appearance."""
    seen = [(row.sequence_id, row.run) for step in steps for row in step.rows]
    return list(dict.fromkeys(seen))


def test_the_queue_is_by_priority_then_arrival() -> None:
    queue = WaitingQueue()
    waiting = [sequence(1), sequence(2, 5), sequence(3, -1), sequence(4)]
    for one in reversed(waiting):
        queue.add(one)
    assert [one.sequence_id for one in queue] == [3, 1, 4, 2]
    assert queue.best_priority == -1
    queue.remove(waiting[0])
    assert [one.sequence_id for one in queue] == [3, 4, 2]


def test_priorities_decide_who_begins() -> None:
    core = core_with(facts(), max_running_requests=1)
    core.submit(request(1), 0)
    core.submit(request(2, priority=5), 0)
    core.submit(request(3, priority=-5), 0)
    drive = Drive(core)
    assert [key for key, _ in rows_of(drive.finish())] == [3, 1, 2]


def test_a_better_priority_takes_the_place_of_a_worse_one() -> None:
    core = core_with(facts(), max_running_requests=1)
    core.submit(request(1, priority=5, max_tokens=20), 0)
    drive = Drive(core)
    drive.plan()
    drive.answer()
    core.submit(request(2), 0)
    assert rows_of(drive.finish()) == [(2, 0), (1, 1)]
    assert core.stats().num_preempted == 1
    assert len(drive.output(1)) == 20


def test_a_better_priority_does_not_wait_behind_a_long_prompt() -> None:
    core = core_with(facts(num_blocks=400, max_model_len=1600), max_step_tokens=8)
    core.submit(request(1, priority=5, num_prompt=800), 0)
    drive = Drive(core)
    drive.plan()
    core.submit(request(2, num_prompt=6, max_tokens=1), 0)
    drive.answer()
    (step,) = drive.plan()
    assert step.rows[0].sequence_id == 2


def test_a_later_arrival_of_the_same_priority_preempts_nobody() -> None:
    core = core_with(facts(), max_running_requests=1)
    core.submit(request(1, max_tokens=8), 0)
    drive = Drive(core)
    drive.plan()
    core.submit(request(2), 0)
    drive.finish()
    assert core.stats().num_preempted == 0


def test_the_latest_of_the_worst_gives_way_when_blocks_run_out() -> None:
    core = core_with(facts(num_blocks=6, max_model_len=24))
    for number, priority in ((1, 0), (2, 3), (3, 3)):
        core.submit(request(number, priority=priority, num_prompt=7, max_tokens=12), 0)
    drive = Drive(core)
    steps = drive.finish()
    runs = dict(rows_of(steps))
    assert runs[1] == 0
    assert runs[3] >= 1
    first_second_run = next(key for key in rows_of(steps) if key[1] == 1)
    assert first_second_run[0] in (2, 3)
    assert all(len(drive.output(number)) == 12 for number in (1, 2, 3))
    assert list(drive.ended()) == [1, 2, 3]


def test_preemption_catches_up_with_prompt_and_output_apart() -> None:
    core = core_with(facts(num_blocks=6, max_model_len=24), prefix_cache=False)
    core.submit(request(1, num_prompt=8, max_tokens=10), 0)
    core.submit(request(2, num_prompt=8, max_tokens=10), 0)
    drive = Drive(core)
    again = [row for step in drive.finish() for row in step.rows if row.run == 1 and row.state]
    assert [row.sequence_id for row in again] == [2]
    state = again[0].state
    assert state is not None
    assert len(state.prompt_token_ids) == 8
    assert len(state.output_token_ids) > 0
    assert again[0].start == 0
    assert len(drive.output(2)) == 10
    assert drive.ended()[2].completion_tokens == 10


def test_a_preempted_sequence_is_forgotten_before_its_blocks_are_reused() -> None:
    core = core_with(facts(num_blocks=6, max_model_len=24))
    core.submit(request(1, num_prompt=8, max_tokens=10), 0)
    core.submit(request(2, num_prompt=8, max_tokens=10), 0)
    drive = Drive(core)
    steps = drive.finish()
    owned: set[int] = set()
    for step in steps:
        if any(gone.sequence_id == 2 and gone.run == 0 for gone in step.forget):
            break
        for row in step.rows:
            blocks = {b for update in row.block_updates for b in update.block_ids}
            if row.sequence_id == 1:
                assert not blocks & owned
            else:
                owned |= blocks
    assert owned


def test_prompt_logprobs_survive_a_preemption_half_way() -> None:
    core = core_with(facts(num_blocks=8, max_model_len=32), max_chunk_tokens=4)
    wanting = SamplingSpec(num_prompt_logprobs=0)
    drive = Drive(core)
    core.submit(request(1, num_prompt=20, max_tokens=1, priority=5, sampling=wanting), 0)
    for _ in range(2):
        drive.plan()
        drive.answer()
    core.submit(request(2, num_prompt=30, max_tokens=1), 0)
    steps = drive.finish()
    asked = [p for s in steps for r in s.rows if r.sequence_id == 1 for p in r.logprob_positions]
    assert asked == list(range(8, 19))
    first = next(e for e in drive.events if hasattr(e, "index") and e.key.request == 1)
    assert [token.position for token in first.prompt_logprobs] == list(range(1, 20))


def test_one_that_fits_alone_always_gets_through() -> None:
    core = core_with(facts(num_stages=3, num_blocks=5, block_size_tokens=2, max_model_len=10))
    for number in range(6):
        core.submit(request(number, num_prompt=5, max_tokens=5), 0)
    drive = Drive(core)
    drive.finish(max_steps=2000)
    assert all(len(drive.output(number)) == 5 for number in range(6))
    assert {end.reason for end in drive.ended().values()} == {EndReason.LENGTH}
    assert core.stats().pipelines[0].num_free_blocks == 5


def test_one_short_of_blocks_moves_to_a_pipeline_that_has_room() -> None:
    core = core_with(facts("p", num_blocks=8, max_model_len=32))
    core.submit(request(1, num_prompt=9, max_tokens=3), 0)
    core.submit(request(2, num_prompt=20, max_tokens=3), 0)
    drive = Drive(core)
    drive.plan()  # the second has its five blocks, and would need one more for its next token
    drive.answer()
    (step,) = drive.plan()
    assert [row.sequence_id for row in step.rows] == [1]
    drive.answer()
    core.add_pipeline(facts("q", num_blocks=8, max_model_len=32), 0)
    moved = [(step.pipeline_id, row.run) for step in drive.plan() for row in step.rows]
    assert moved == [("p", 0), ("q", 1)]
    drive.finish()
    assert [len(drive.output(number)) for number in (1, 2)] == [3, 3]


def test_one_short_of_blocks_keeps_what_it_has_where_there_is_no_other_place() -> None:
    core = core_with(facts("p", num_blocks=8, max_model_len=32))
    core.submit(request(1, num_prompt=9, max_tokens=3), 0)
    core.submit(request(2, num_prompt=20, max_tokens=3), 0)
    Drive(core).finish()
    assert core.stats().num_preempted == 0

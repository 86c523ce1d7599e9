"""What is taken, what is refused, and how requests end: limits, attempts, deadlines, aborts."""

from __future__ import annotations

import pytest
from support.core import TOKEN, Drive, core_with, facts, request

from scheduler.core import EndReason, RequestKey, SchedulerLimits
from stagemesh.errors import (
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    MeshUnavailable,
    NotFiniteError,
    QueueFull,
    RequestDeadlineExceeded,
)
from stagemesh.plan import Epoch
from stagemesh.sampling import SamplingSpec


@pytest.mark.parametrize(
    "name",
    [
        "max_waiting_requests",
        "max_running_requests",
        "max_step_tokens",
        "max_chunk_tokens",
        "max_steps_in_flight",
    ],
)
def test_a_limit_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SchedulerLimits(**{name: 0})


def test_impossible_requests_are_invalid() -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        request(num_prompt=0)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        request(max_tokens=0)
    with pytest.raises(InvalidRequest, match="negative"):
        request(prompt_token_ids=(1, -1))


def test_a_prompt_that_leaves_no_room_for_output_is_refused() -> None:
    core = core_with(facts(max_model_len=8), facts("q", max_model_len=100, num_blocks=3))
    with pytest.raises(ContextLengthExceeded, match="12 tokens"):
        core.submit(request(num_prompt=12), 0)
    core.submit(request(num_prompt=11, max_tokens=50), 0)
    drive = Drive(core)
    drive.finish()
    assert drive.ended()[0].reason is EndReason.LENGTH
    assert drive.output(0) == [TOKEN]
    assert core.stats().num_refused == 1


def test_without_a_pipeline_requests_wait_and_are_judged_when_one_comes() -> None:
    core = core_with()
    core.submit(request(0, num_prompt=50), 0)
    core.submit(request(1, num_prompt=5), 0)
    drive = Drive(core)
    assert drive.plan() == []
    core.add_pipeline(facts(max_model_len=16), 0)
    drive.finish()
    assert isinstance(drive.ended()[0].error, ContextLengthExceeded)
    assert drive.ended()[1].reason is EndReason.LENGTH


def test_a_request_that_only_a_lost_pipeline_could_hold_ends_with_an_error() -> None:
    core = core_with(facts("small", max_model_len=16), facts("large"))
    core.submit(request(num_prompt=40), 0)
    drive = Drive(core)
    assert [step.pipeline_id for step in drive.plan()] == ["large"]
    core.remove_pipeline("large", 0)
    drive.plan()
    assert isinstance(drive.ended()[0].error, MeshUnavailable)


def test_a_full_queue_refuses_with_a_hint() -> None:
    core = core_with(max_waiting_requests=2)
    for number in range(2):
        core.submit(request(number), 0)
    with pytest.raises(QueueFull) as refused:
        core.submit(request(2), 0)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 0
    assert core.stats().num_waiting == 2
    core.submit(request(3, output_token_ids=(1,)), 0)  # it was admitted before
    assert core.stats().num_waiting == 3


def test_the_hint_follows_the_rate_at_which_requests_end() -> None:
    hints = []
    for gap_ns in (10_000_000, 1_000_000_000):
        core = core_with(max_waiting_requests=8)
        for number in range(8):
            core.submit(request(number), 0)
            core.abort(RequestKey(1, number), number * gap_ns)
        for number in range(8):
            core.submit(request(10 + number), 8 * gap_ns)
        with pytest.raises(QueueFull) as refused:
            core.submit(request(99), 8 * gap_ns)
        hints.append(refused.value.retry_after_s or 0.0)
    assert hints[0] < hints[1]


def test_a_stop_token_ends_and_is_delivered() -> None:
    core = core_with(facts())
    core.submit(request(sampling=SamplingSpec(stop_token_ids=(TOKEN,))), 0)
    drive = Drive(core)
    drive.finish()
    assert drive.output(0) == [TOKEN]
    assert drive.ended()[0].reason is EndReason.STOP_TOKEN
    assert drive.ended()[0].completion_tokens == 1


def test_a_higher_attempt_replaces_and_a_lower_one_is_ignored() -> None:
    core = core_with(facts())
    core.submit(request(attempt=2), 0)
    drive = Drive(core)
    drive.plan()
    core.submit(request(attempt=1), 0)
    core.submit(request(attempt=2), 0)
    assert core.stats().num_accepted == 1
    core.submit(request(attempt=3, output_token_ids=(TOKEN,)), 0)
    drive.finish()
    ends = {event.attempt: event for event in drive.events if hasattr(event, "reason")}
    assert ends[2].reason is EndReason.ABORTED
    assert ends[3].reason is EndReason.LENGTH
    assert ends[3].completion_tokens == 4
    assert [e.index for e in drive.events if hasattr(e, "index")] == [1, 2, 3]


def test_a_submission_that_comes_again_after_the_end_is_ignored() -> None:
    core = core_with(facts())
    core.submit(request(), 0)
    drive = Drive(core)
    drive.finish()
    core.submit(request(), 0)
    assert core.stats().num_accepted == 1
    core.submit(request(attempt=1), 0)
    assert core.stats().num_accepted == 2


def test_output_of_an_earlier_attempt_may_be_all_there_is_to_say() -> None:
    core = core_with(facts())
    core.submit(request(0, max_tokens=2, output_token_ids=(5, 6)), 0)
    stopping = SamplingSpec(stop_token_ids=(6,))
    core.submit(request(1, max_tokens=9, output_token_ids=(5, 6), sampling=stopping), 0)
    drive = Drive(core)
    assert drive.plan() == []
    assert drive.ended()[0].reason is EndReason.LENGTH
    assert drive.ended()[1].reason is EndReason.STOP_TOKEN


def test_output_of_an_earlier_attempt_may_end_with_the_context() -> None:
    core = core_with(facts(max_model_len=8))
    core.submit(request(0, num_prompt=4, max_tokens=50, output_token_ids=(1, 2, 3, 4)), 0)
    core.submit(request(1, num_prompt=4, max_tokens=50, output_token_ids=(1, 2, 3, 4, 5)), 0)
    drive = Drive(core)
    drive.plan()
    assert drive.ended()[0].reason is EndReason.LENGTH
    assert isinstance(drive.ended()[1].error, MeshUnavailable)


def test_an_abort_frees_the_blocks_at_once_and_may_come_twice() -> None:
    core = core_with(facts())
    core.submit(request(num_prompt=20), 0)
    drive = Drive(core)
    drive.plan()
    core.abort(RequestKey(1, 0), 0)
    core.abort(RequestKey(1, 0), 0)
    core.abort(RequestKey(9, 9), 0)
    assert core.stats().pipelines[0].num_free_blocks == 64
    drive.answer()
    (step,) = drive.plan()  # only to forget
    assert step.rows == ()
    assert [gone.sequence_id for gone in step.forget] == [1]
    assert drive.ended()[0].reason is EndReason.ABORTED
    assert drive.output(0) == []


def test_an_abort_of_an_older_attempt_is_ignored() -> None:
    core = core_with(facts())
    core.submit(request(attempt=2), 0)
    core.abort(RequestKey(1, 0), 0, attempt=1)
    assert core.stats().num_waiting == 1
    core.abort(RequestKey(1, 0), 0, attempt=2)
    assert core.stats().num_waiting == 0


def test_a_lost_gateway_takes_its_requests_with_it() -> None:
    core = core_with(facts())
    core.submit(request(0), 0)
    core.submit(request(1, key=RequestKey(2, 1)), 0)
    core.abort_gateway(1, 0)
    drive = Drive(core)
    drive.finish()
    assert drive.ended()[0].reason is EndReason.ABORTED
    assert drive.ended()[1].reason is EndReason.LENGTH


def test_deadlines_end_waiting_and_running_requests() -> None:
    core = core_with(facts(), max_running_requests=1)
    core.submit(request(0, deadline_ns=50), 0)
    core.submit(request(1, deadline_ns=30), 0)
    core.submit(request(2), 0)
    drive = Drive(core)
    drive.plan()
    assert core.next_deadline_ns() == 30
    drive.now_ns = 30
    drive.plan()
    assert core.next_deadline_ns() == 50
    drive.now_ns = 60
    drive.answer()
    drive.plan()
    assert core.next_deadline_ns() is None
    for number in (0, 1):
        assert isinstance(drive.ended()[number].error, RequestDeadlineExceeded)
    drive.finish()
    assert drive.ended()[2].reason is EndReason.LENGTH


def test_requests_that_ended_leave_the_deadlines() -> None:
    core = core_with(facts())
    for number in range(500):
        core.submit(request(number, deadline_ns=10**12), 0)
        core.abort(RequestKey(1, number), 0)
    assert core.next_deadline_ns() is None
    assert len(core._roster._deadlines._heap) < 200


def test_numbers_that_break_end_one_request_and_leave_nothing_cached() -> None:
    core = core_with(facts(), max_chunk_tokens=4, max_steps_in_flight=1)
    core.submit(request(0, num_prompt=12), 0)
    core.submit(request(1, num_prompt=4), 0)
    drive = Drive(core)
    drive.plan()
    drive.answer()
    drive.plan()
    drive.answer(broken=[1])
    drive.finish()
    assert isinstance(drive.ended()[0].error, NotFiniteError)
    assert drive.ended()[1].reason is EndReason.LENGTH
    core.submit(request(2, prompt_token_ids=request(0, num_prompt=12).prompt_token_ids), 0)
    drive.finish()
    assert drive.ended()[2].cached_prompt_tokens == 0


def test_queue_time_is_until_a_pipeline_takes_the_request() -> None:
    core = core_with()
    core.submit(request(), 5)
    core.add_pipeline(facts(epoch=Epoch(1, 1)), 20)
    drive = Drive(core)
    drive.now_ns = 30
    drive.finish()
    assert drive.ended()[0].queue_ns == 25

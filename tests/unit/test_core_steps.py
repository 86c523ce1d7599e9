"""How steps are filled: chunks, budgets, microbatches in flight, replicas, results."""

from __future__ import annotations

import pytest
from support.core import Drive, answer, core_with, facts, request, restart

from scheduler.core import Finished, SchedulerCore, SchedulerLimits
from scheduler.core.budgets import TokenBudget
from stagemesh.errors import ModelNotFound, PeerLost, ProtocolError, StepOutOfOrder
from stagemesh.plan import Epoch, HopTiming, RowResult, Step, StepResult
from stagemesh.sampling import SamplingSpec


def spans(step: Step) -> dict[int, tuple[int, int]]:
    """Positions [start, end) by sequence."""
    return {row.sequence_id: (row.start, row.start + row.num_tokens) for row in step.rows}


def test_a_budget_grants_what_is_left_and_what_a_chunk_may_be() -> None:
    budget = TokenBudget(10, 6)
    assert budget.grant(20) == 6
    budget.take(6)
    assert budget.grant(20) == 4
    budget.reserve(3)
    assert budget.grant(20) == 1
    budget.reserve(7)
    assert budget.grant(1) == 0
    budget.give_back(6)
    assert budget.grant(20) == 3


def test_the_first_row_carries_everything_and_later_ones_what_is_new() -> None:
    sampling = SamplingSpec(seed=3)
    core = core_with(facts(num_stages=3))
    core.submit(request(num_prompt=4, max_tokens=3, sampling=sampling), 0)
    first, second, third, _ = Drive(core).finish()
    (row,) = first.rows
    assert row.state is not None
    assert row.state.prompt_token_ids == row.token_ids == (0, 1, 2, 3)
    assert (row.state.output_token_ids, row.state.total_length) == ((), 7)
    assert row.state.sampling == sampling
    assert (row.first_stage, row.end_stage, row.sample_positions) == (0, 3, (3,))
    assert len(row.block_updates[0].block_ids) == 1
    assert second.rows[0].state is None
    assert second.rows[0].block_updates[0].first_index == 1
    assert second.rows[0].token_ids == (7,)
    assert third.rows[0].block_updates == ()


def test_chunks_of_one_prompt_are_in_flight_together() -> None:
    core = core_with(facts(num_stages=3), max_chunk_tokens=7)
    core.submit(request(num_prompt=20), 0)
    drive = Drive(core)
    steps = drive.plan()
    assert [spans(step) for step in steps] == [{1: (0, 7)}, {1: (7, 14)}, {1: (14, 20)}]
    assert [step.rows[0].sample_positions for step in steps] == [(), (), (19,)]
    assert drive.plan() == []


def test_decoding_is_dealt_evenly_over_as_many_steps_as_stages() -> None:
    core = core_with(facts(num_stages=4, num_blocks=400))
    for number in range(8):
        core.submit(request(number, num_prompt=3, max_tokens=40), 0)
    drive = Drive(core)
    drive.plan()
    for number in range(40):
        drive.answer()
        drive.plan()
        assert len(drive.in_flight) == 4
        assert number < 8 or [len(step.rows) for step in drive.in_flight] == [2, 2, 2, 2]


def test_late_comers_are_spread_over_the_steps_in_a_few_rounds() -> None:
    core = core_with(facts(num_stages=2, num_blocks=400))
    drive = Drive(core)
    core.submit(request(0, num_prompt=3, max_tokens=60), 0)
    drive.plan()
    for number in range(1, 10):
        core.submit(request(number, num_prompt=3, max_tokens=60), 0)
    drive.plan()
    for _ in range(8):
        drive.answer()
        drive.plan()
    assert sorted(len(step.rows) for step in drive.in_flight) == [5, 5]


def test_a_step_says_whether_it_is_alone_in_its_pipeline() -> None:
    core = core_with(facts(num_stages=3), max_chunk_tokens=7)
    drive = Drive(core)
    core.submit(request(0, num_prompt=10, max_tokens=9), 0)
    assert [step.alone for step in drive.plan()] == [False, False]  # chunks of one prompt
    drive.answer()
    drive.answer()
    assert [step.alone for step in drive.plan()] == [True]
    core.submit(request(1, num_prompt=3, max_tokens=9), 0)
    assert [step.alone for step in drive.plan()] == [False]
    drive.answer()
    assert [step.alone for step in drive.plan()] == [False]


def test_a_lone_request_is_one_step_in_flight() -> None:
    core = core_with(facts(num_stages=4))
    core.submit(request(num_prompt=3), 0)
    assert len(Drive(core).plan()) == 1


def test_the_number_of_steps_in_flight_can_be_limited() -> None:
    core = core_with(facts(num_stages=4), max_steps_in_flight=2, max_chunk_tokens=2)
    core.submit(request(num_prompt=30), 0)
    drive = Drive(core)
    assert len(drive.plan()) == 2
    drive.answer()
    assert len(drive.plan()) == 1


@pytest.mark.parametrize("max_step_tokens", [2, 3, 8])
def test_neither_decoding_nor_a_long_prompt_starves(max_step_tokens: int) -> None:
    core = core_with(facts(num_blocks=400), max_step_tokens=max_step_tokens)
    drive = Drive(core)
    num_decoding = max_step_tokens - 1
    for number in range(num_decoding):
        core.submit(request(number, num_prompt=1, max_tokens=120), 0)
    core.submit(request(99, num_prompt=60, max_tokens=1), 0)
    while 99 not in drive.ended():
        drive.plan()
        drive.answer()
    outputs = [len(drive.output(number)) for number in range(num_decoding)]
    assert 20 <= min(outputs) <= max(outputs) < 120
    assert max(outputs) - min(outputs) <= 2


def test_decoding_that_fills_the_steps_takes_turns() -> None:
    core = core_with(facts(num_blocks=400), max_step_tokens=64)
    for number in range(20):
        core.submit(request(number, num_prompt=2, max_tokens=100), 0)
    drive = Drive(core)
    drive.plan()
    drive.answer()
    core._planner._limits = SchedulerLimits(max_step_tokens=3)
    for _ in range(20):
        drive.plan()
        drive.answer()
    assert {len(drive.output(number)) for number in range(20)} == {4}


def test_a_step_never_exceeds_its_budget() -> None:
    core = core_with(facts(num_blocks=400), max_step_tokens=16, max_chunk_tokens=5)
    for number in range(12):
        core.submit(request(number, num_prompt=11, max_tokens=5), 0)
    for step in Drive(core).finish():
        assert step.num_tokens <= 16
        assert all(row.num_tokens <= 5 for row in step.rows)


def test_replicas_share_the_queue() -> None:
    core = core_with(facts("p"), facts("q"))
    for number in range(8):
        core.submit(request(number), 0)
    steps = Drive(core).plan()
    assert {step.pipeline_id: len(step.rows) for step in steps} == {"p": 4, "q": 4}


def test_a_request_goes_where_its_prefix_is_cached() -> None:
    core = core_with(facts("p"), facts("q"))
    drive = Drive(core)
    prompts = (tuple(range(24)), tuple(range(50, 74)))
    core.submit(request(0, prompt_token_ids=prompts[0]), 0)
    core.submit(request(1, prompt_token_ids=prompts[1]), 0)
    home = {step.rows[0].sequence_id: step.pipeline_id for step in drive.plan()}
    drive.finish()
    for number, first in ((2, 1), (3, 0), (4, 1), (5, 0)):
        core.submit(request(number, prompt_token_ids=(*prompts[first], 99)), 0)
        (step,) = [step for step in drive.plan() if step.rows]
        assert step.pipeline_id == home[first + 1]
        assert step.rows[0].start == 24
        drive.finish()


def test_a_prefix_is_shared_by_block_and_the_last_token_is_always_computed() -> None:
    core = core_with(facts())
    drive = Drive(core)
    core.submit(request(0, num_prompt=8), 0)
    drive.finish()
    core.submit(request(1, prompt_token_ids=tuple(range(8))), 0)
    core.submit(request(2, prompt_token_ids=(*range(8), 70)), 0)
    (step,) = drive.plan()
    assert sorted(spans(step).values()) == [(4, 8), (8, 9)]
    drive.finish()
    assert drive.ended()[1].cached_prompt_tokens == 4
    assert drive.ended()[2].cached_prompt_tokens == 8


def test_generated_tokens_are_cached_too() -> None:
    core = core_with(facts())
    drive = Drive(core)
    core.submit(request(0, num_prompt=4, max_tokens=8), 0)
    drive.finish()
    core.submit(request(1, prompt_token_ids=(*range(4), *[7] * 8)), 0)
    drive.finish()
    assert drive.ended()[1].cached_prompt_tokens == 8


@pytest.mark.parametrize(
    ("rope", "total", "shared"), [(0, 30, True), (100, 30, True), (20, 30, False), (20, 16, True)]
)
def test_dynamic_rope_shares_only_within_one_total_length(
    rope: int, total: int, shared: bool
) -> None:
    core = core_with(facts(dynamic_rope_length=rope))
    drive = Drive(core)
    core.submit(request(0, num_prompt=9, max_tokens=7), 0)
    drive.finish()
    core.submit(request(1, prompt_token_ids=tuple(range(9)), max_tokens=total - 9), 0)
    drive.finish()
    assert (drive.ended()[1].cached_prompt_tokens > 0) is shared


def test_salts_and_models_do_not_share() -> None:
    core = core_with(facts())
    drive = Drive(core)
    core.submit(request(0, num_prompt=9), 0)
    drive.finish()
    core.submit(request(1, prompt_token_ids=tuple(range(9)), cache_salt="other"), 0)
    drive.finish()
    assert drive.ended()[1].cached_prompt_tokens == 0


def test_adapters_do_not_share_with_one_another_nor_with_the_model() -> None:
    core = core_with(facts(adapters=frozenset({"a", "b"})))
    drive = Drive(core)
    prompt = tuple(range(9))
    for number, adapter in enumerate(("", "a", "b", "a")):
        core.submit(request(number, prompt_token_ids=prompt, adapter=adapter), 0)
        drive.finish()
    cached = [drive.ended()[number].cached_prompt_tokens for number in range(4)]
    assert cached[:3] == [0, 0, 0]
    assert cached[3] > 0


def test_the_first_row_of_every_run_names_the_adapter() -> None:
    core = core_with(facts(adapters=frozenset({"a"})))
    core.submit(request(0, num_prompt=9, adapter="a"), 0)
    (step,) = core.schedule(0)
    assert step.rows[0].state is not None
    assert step.rows[0].state.adapter == "a"


def test_an_adapter_that_no_pipeline_has_ends_its_requests() -> None:
    """Also those that waited for a pipeline, as after the scheduler was lost."""
    core = SchedulerCore(SchedulerLimits())
    core.submit(request(0, adapter="a"), 0)
    core.submit(request(1, adapter="b"), 0)
    assert core.take_events() == []
    core.add_pipeline(facts(adapters=frozenset({"a"})), 0)
    core.submit(request(2, adapter="b"), 0)
    ended = [event for event in core.take_events() if isinstance(event, Finished)]
    assert [event.key.request for event in ended] == [1, 2]
    assert all(isinstance(event.error, ModelNotFound) for event in ended)
    assert len(core.schedule(0)) == 1


def test_without_a_prefix_cache_nothing_is_cached() -> None:
    core = core_with(facts(), prefix_cache=False)
    drive = Drive(core)
    for number in range(2):
        core.submit(request(number, prompt_token_ids=tuple(range(9))), 0)
        drive.finish()
    assert drive.ended()[1].cached_prompt_tokens == 0
    assert core.stats().pipelines[0].num_cached_blocks == 0


def test_prompt_logprobs_come_once_with_the_first_token() -> None:
    core = core_with(facts(), max_chunk_tokens=3)
    drive = Drive(core)
    core.submit(request(0, num_prompt=8), 0)
    drive.finish()
    drive.events.clear()
    wanting = SamplingSpec(num_prompt_logprobs=0)
    core.submit(request(1, prompt_token_ids=tuple(range(8)), sampling=wanting), 0)
    steps = [step for step in drive.finish() if step.rows]
    asked = [position for step in steps for position in step.rows[0].logprob_positions]
    assert asked == list(range(7))
    first, *rest = [event for event in drive.events if hasattr(event, "index")]
    assert [token.position for token in first.prompt_logprobs] == list(range(1, 8))
    assert all(event.prompt_logprobs == () for event in rest)


def test_an_answer_out_of_order_is_refused_and_nothing_is_taken() -> None:
    core = core_with(facts(num_stages=2), max_chunk_tokens=4)
    core.submit(request(num_prompt=8), 0)
    drive = Drive(core)
    first, second = drive.plan()
    with pytest.raises(StepOutOfOrder):
        core.on_result(answer(second), 0)
    core.on_result(answer(first), 0)
    core.on_result(answer(first), 0)  # again: dropped
    core.on_result(answer(second), 0)
    core.check_integrity()
    assert core.stats().pipelines[0].steps_done == 2


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (RowResult(9, 0),),
        (RowResult(1, 1),),
        (RowResult(1, 0),),
        (RowResult(1, 0), RowResult(1, 0)),
    ],
)
def test_an_answer_to_something_else_is_refused(rows: tuple[RowResult, ...]) -> None:
    core = core_with(facts())
    core.submit(request(), 0)
    (step,) = Drive(core).plan()
    with pytest.raises(ProtocolError):
        core.on_result(StepResult("p", step.epoch, step.step, rows), 0)
    core.on_result(answer(step), 0)
    assert core.stats().generated_tokens == 1


def test_answers_of_other_epochs_and_pipelines_are_dropped() -> None:
    core = core_with(facts(epoch=Epoch(1, 4)))
    core.submit(request(), 0)
    (step,) = Drive(core).plan()
    core.on_result(StepResult("p", Epoch(1, 3), step.step, ()), 0)
    core.on_result(StepResult("gone", step.epoch, step.step, ()), 0)
    assert core.stats().pipelines[0].steps_in_flight == 1


def test_a_new_epoch_plans_again_what_was_in_flight() -> None:
    core = core_with(facts(num_stages=3), max_chunk_tokens=4)
    core.submit(request(num_prompt=12), 0)
    drive = Drive(core)
    first, *_ = drive.plan()
    drive.answer()
    lost = drive.in_flight
    drive.in_flight = []
    restart(core, facts(num_stages=3, epoch=Epoch(1, 2)))
    again = drive.plan()
    assert [(step.epoch, step.step) for step in again] == [(Epoch(1, 2), 0), (Epoch(1, 2), 1)]
    assert [spans(step) for step in again] == [{1: (4, 8)}, {1: (8, 12)}]
    row = again[0].rows[0]
    assert row.state is not None
    assert row.block_updates[0].first_index == 0
    assert row.block_updates[0].block_ids[:1] == first.rows[0].block_updates[0].block_ids
    assert again[1].rows[0].state is None
    core.on_result(answer(lost[0]), 0)
    core.check_integrity()
    drive.finish()
    assert len(drive.output(0)) == 4


def test_what_a_lost_step_was_to_forget_is_said_again() -> None:
    core = core_with(facts())
    core.submit(request(max_tokens=1), 0)
    drive = Drive(core)
    drive.plan()
    drive.answer()
    (step,) = drive.plan()
    restart(core, facts(epoch=Epoch(1, 2)))
    (again,) = drive.plan()
    assert step.forget == again.forget
    assert again.rows == ()


def test_a_step_that_is_given_up_ends_its_requests_only() -> None:
    core = core_with(facts(num_stages=2))
    for number in range(2):
        core.submit(request(number), 0)
    drive = Drive(core)
    assert [list(spans(step)) for step in drive.plan()] == [[1], [2]]
    core.fail_oldest_step("p", PeerLost("it kills workers"), 0)
    core.fail_oldest_step("gone", PeerLost("it kills workers"), 0)
    restart(core, facts(num_stages=2, epoch=Epoch(1, 2)))
    drive.in_flight.clear()
    drive.finish()
    assert isinstance(drive.ended()[0].error, PeerLost)
    assert len(drive.output(1)) == 4


def test_requests_of_a_lost_pipeline_go_on_elsewhere_in_their_order() -> None:
    core = core_with(facts("p"))
    for number in range(3):
        core.submit(request(number, max_tokens=6), 0)
    drive = Drive(core)
    for _ in range(3):
        drive.plan()
        drive.answer()
    drive.plan()
    core.remove_pipeline("p", 0)
    core.remove_pipeline("p", 0)
    drive.in_flight.clear()
    assert drive.plan() == []
    core.add_pipeline(facts("q"), 0)
    (step,) = drive.plan()
    assert [(row.sequence_id, row.run, row.start) for row in step.rows] == [
        (1, 1, 0),
        (2, 1, 0),
        (3, 1, 0),
    ]
    state = step.rows[0].state
    assert state is not None
    assert (len(state.prompt_token_ids), len(state.output_token_ids)) == (4, 3)
    drive.finish()
    assert all(len(drive.output(number)) == 6 for number in range(3))


def test_stats_show_where_time_goes_and_how_fast_tokens_come() -> None:
    core = core_with(facts())
    core.submit(request(max_tokens=3), 0)
    drive = Drive(core)
    for busy_ns in (100, 300):
        (step,) = drive.plan()
        timings = (HopTiming(stage=0, compute_ns=busy_ns),)
        result = answer(step)
        core.on_result(
            StepResult(result.pipeline_id, result.epoch, result.step, result.rows, timings),
            1_000_000_000,
        )
    stats = core.stats(now_ns=2_000_000_000)
    assert stats.pipelines[0].mean_timings == (HopTiming(stage=0, compute_ns=200),)
    assert stats.generated_tokens_per_s == pytest.approx(2 / 5)
    assert core.stats(now_ns=60_000_000_000).generated_tokens_per_s == 0

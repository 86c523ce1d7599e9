"""Traces as the scheduler gathers them: only for those who watch, and bounded."""

from __future__ import annotations

import pytest
from support.core import answer

from protos import mesh_pb2
from scheduler import tracing
from scheduler.tracing import Tracer, Watcher
from stagemesh.plan import Epoch, HopTiming, Row, Step, StepResult


def step(number: int, epoch: int = 1) -> Step:
    row = Row(1, 0, 0, 3, (1, 2, 3), (), 0, 1)
    return Step("p", Epoch(1, epoch), number, (row,))


async def told(watcher: Watcher) -> list[mesh_pb2.TraceStepsResponse]:
    return [event async for event in watcher.events(0.0)]


async def test_a_step_is_told_with_its_times_since_the_trace_began() -> None:
    tracer = Tracer()
    tracer.step_sent(step(0), 900)
    watcher = tracer.begin(1000)
    tracer.step_sent(step(1), 1100)
    for number, now_ns in ((0, 1200), (1, 1300)):
        result = answer(step(number))
        timed = StepResult(
            result.pipeline_id, result.epoch, number, result.rows, (HopTiming(0, started_ns=7),)
        )
        tracer.step_done(timed, now_ns)
    tracer.round_done(1090, 1110, 1, 5, 2)
    first, second, last = await told(watcher)
    assert (first.step.sent_ns, first.step.done_ns) == (-100, 200)
    assert (second.step.sent_ns, second.step.done_ns) == (100, 300)
    assert (second.step.num_rows, second.step.num_tokens) == (1, 3)
    assert second.step.timings[0].started_ns == 7
    assert (last.round.start_ns, last.round.duration_ns, last.round.num_waiting) == (90, 20, 5)


async def test_who_does_not_read_loses_events_and_is_told_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "MAX_UNREAD_EVENTS", 3)
    tracer = Tracer()
    watcher = tracer.begin(0)
    for number in range(10):
        tracer.step_sent(step(number), 0)
        tracer.step_done(answer(step(number)), 1)
    *steps, last = await told(watcher)
    assert [event.step.step for event in steps] == [0, 1, 2]
    assert last.num_dropped == 7


async def test_steps_of_epochs_that_ended_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_MAX_STEPS_SENT", 4)
    tracer = Tracer()
    watcher = tracer.begin(0)
    for epoch in range(100):
        tracer.step_sent(step(0, epoch), epoch)
    for epoch in range(100):
        tracer.step_done(answer(step(0, epoch)), 1000)
    assert [event.step.epoch.n for event in await told(watcher)] == [96, 97, 98, 99]


async def test_nobody_watches_any_more() -> None:
    tracer = Tracer()
    watcher = tracer.begin(0)
    assert tracer.is_watched
    tracer.end(watcher)
    assert not tracer.is_watched
    tracer.step_sent(step(0), 0)
    tracer.step_done(answer(step(0)), 1)
    assert await told(watcher) == []

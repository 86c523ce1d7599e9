"""When a step is overdue, and when an idle pipeline is to be looked at."""

from __future__ import annotations

from dataclasses import replace

from support.members import MS, S, two_stages

from scheduler.watch import StepWatch, UsualTimes
from scheduler.workers import WorkerStats
from stagemesh.plan import Epoch, Row, Step

EPOCH = Epoch(1, 1)


def step(number: int, num_tokens: int = 1, epoch: Epoch = EPOCH) -> Step:
    row = Row(1, 1, 0, num_tokens, (7,) * num_tokens, (), 0, 1)
    return Step("p0", epoch, number, (row,))


def watch(canary_interval_ns: int = 5 * S) -> StepWatch:
    """Of a pipeline whose steps of one token take 10 ms."""
    made = StepWatch(2 * S, canary_interval_ns)
    made.epoch_began("p0", EPOCH, 0)
    made.step_sent(step(0), 0)
    assert made.step_done("p0", EPOCH, 0, 10 * MS)
    return made


def test_a_step_that_takes_longer_than_a_lease_and_ten_times_what_is_usual_is_overdue() -> None:
    made = watch()
    made.step_sent(step(1), S)
    assert made.wakeup_ns() == 3 * S
    assert made.overdue(3 * S - 1) == []
    assert [(each.step, each.limit_ns) for each in made.overdue(3 * S)] == [(1, 2 * S)]


def test_a_large_step_may_take_longer() -> None:
    made = watch()
    made.step_sent(step(1, num_tokens=512), S)
    assert made.overdue(50 * S) == []
    assert made.step_done("p0", EPOCH, 1, 6 * S)
    made.step_sent(step(2, num_tokens=600), 6 * S)
    assert made.overdue(55 * S) == []
    assert [each.limit_ns for each in made.overdue(56 * S)] == [50 * S]


def test_a_step_waits_for_those_before_it() -> None:
    made = watch()
    for number in (1, 2, 3):
        made.step_sent(step(number), S)
    assert made.step_done("p0", EPOCH, 1, 2 * S)
    assert made.step_done("p0", EPOCH, 2, 3 * S)
    assert made.overdue(4 * S) == []
    assert made.overdue(14 * S), "a second was usual by then"


def test_the_first_steps_of_an_epoch_may_take_long() -> None:
    made = watch()
    made.epoch_ended("p0")
    assert made.wakeup_ns() is None
    made.epoch_began("p0", Epoch(1, 2), S)
    made.step_sent(step(0, epoch=Epoch(1, 2)), S)
    assert made.overdue(60 * S) == []
    assert made.overdue(61 * S)


def test_large_first_steps_of_large_models_may_take_very_long() -> None:
    made = StepWatch(2 * S, 0)
    made.epoch_began("p0", EPOCH, 0, weight_bytes=4 * 10**9)
    made.step_sent(step(0, num_tokens=100), 0)
    assert made.wakeup_ns() == 60 * S + 100 * 2 * S
    made.step_done("p0", EPOCH, 0, 100 * S)
    made.step_sent(step(1), 100 * S)
    assert made.overdue(1099 * S) == []
    assert made.overdue(1100 * S), "one token takes no longer than a hundred"


def test_an_answer_of_an_older_epoch_or_to_another_step_says_nothing() -> None:
    made = watch()
    made.step_sent(step(1), S)
    assert not made.step_done("p0", Epoch(1, 0), 1, 2 * S)
    assert not made.step_done("p0", EPOCH, 0, 2 * S)
    assert not made.step_done("p1", EPOCH, 1, 2 * S)
    assert made.overdue(3 * S)


def test_standing_still_oneself_is_no_fault_of_a_step() -> None:
    made = watch()
    made.step_sent(step(1), S)
    made.was_deaf(60 * S)
    assert made.overdue(62 * S) == []
    assert made.overdue(63 * S)


def test_an_idle_pipeline_is_looked_at_now_and_then() -> None:
    made = watch()
    due_ns = 5 * S + 10 * MS
    assert made.wakeup_ns() == due_ns
    assert made.idle(due_ns - 1) == []
    assert made.idle(due_ns) == ["p0"]
    assert made.idle(due_ns) == [], "once"
    made.step_sent(step(1), due_ns)
    assert made.idle(due_ns + 60 * S) == []
    assert watch(canary_interval_ns=0).idle(60 * S) == []


def test_what_was_slow_once_is_remembered_and_slowly_forgotten() -> None:
    usual = UsualTimes()
    assert usual.predict_ns(8) == 0
    usual.learn(1, 100)
    usual.learn(1, 20)
    assert 90 < usual.predict_ns(1) < 100
    assert 16 * 90 < usual.predict_ns(16) < 16 * 100
    usual.learn(16, 30)
    assert usual.predict_ns(4) == usual.predict_ns(1) * 4, "of the smaller one"
    assert usual.predict_ns(20) == 30


def test_the_only_stage_that_has_steps_to_do_is_to_blame() -> None:
    mesh = two_stages()
    a, b = mesh.members.workers
    watched = StepWatch(2 * S, 0)
    epoch = mesh.members.pipelines[0].epoch
    watched.epoch_began("p0", epoch, mesh.now_ns)
    watched.step_sent(step(0, epoch=epoch), mesh.now_ns)
    overdue = watched.overdue(mesh.now_ns + 100 * S)[0]
    stats = replace(WorkerStats(), steps_queued=3)
    mesh.members.heard(mesh.workers["b"].session, mesh.now_ns, stats)
    mesh.members.epochs.step_overdue(overdue, mesh.now_ns)
    mesh.wait(S)
    assert mesh.serving == ["p0"]
    assert (a.conduct.num_failures, b.conduct.num_failures) == (0, 1)
    mesh.members.epochs.step_overdue(overdue, mesh.now_ns)
    assert mesh.serving == ["p0"], "of an epoch that is over"

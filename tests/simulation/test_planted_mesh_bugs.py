"""Bugs planted in membership, workers and gateways: the larger world must find each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulation.fake_gateway import FakeGateway, Held
from simulation.fake_member import Member
from simulation.fake_scheduler import FakeScheduler
from simulation.fake_stage import BrokenPlan
from simulation.fake_tenants import Tenants
from simulation.oracle import Violation
from simulation.planting import caught_in, caught_in_mesh
from simulation.three_stages import pages_do_not_come

from scheduler.core import Request, SchedulerCore
from scheduler.holders import KvHolders
from scheduler.messages import Effect, SuspendPipeline
from scheduler.pipelines import MeshPipeline
from scheduler.workers import Worker


def is_wrong_token(error: Exception) -> bool:
    return isinstance(error, Violation) and "right is" in str(error)


def workers_believe_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """That they have KV: else they object, and the mesh mends itself in spite of the bug."""
    monkeypatch.setattr(Tenants, "has_kv_of", lambda self, pipeline_id, from_end: True)


def test_a_join_that_keeps_the_kv_of_another_incarnation(monkeypatch: pytest.MonkeyPatch) -> None:
    def holds(self: KvHolders, stage: int, worker: Worker) -> bool:
        holder = self._holders[stage]
        return self.is_counted_on and holder is not None and holder.worker_id == worker.worker_id

    workers_believe_what_they_are_told(monkeypatch)
    monkeypatch.setattr(KvHolders, "holds", holds)
    assert is_wrong_token(caught_in_mesh())


def test_a_place_that_is_taken_for_its_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever joins is believed to have what the stage had."""
    workers_believe_what_they_are_told(monkeypatch)
    monkeypatch.setattr(KvHolders, "holds", lambda self, stage, worker: self.is_counted_on)
    assert is_wrong_token(caught_in_mesh())


def test_pages_that_are_taken_for_complete_though_the_move_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined = MeshPipeline.worker_joined

    def joined_with_pages(self: MeshPipeline, worker: Worker, *, has_pages: bool) -> None:
        is_moved = bool(self.handovers.address(self.workers.index(worker)))
        joined(self, worker, has_pages=has_pages or is_moved)

    monkeypatch.setattr(MeshPipeline, "worker_joined", joined_with_pages)
    assert is_wrong_token(caught_in(pages_do_not_come()))


def test_a_worker_that_says_too_early_that_all_pages_came(monkeypatch: pytest.MonkeyPatch) -> None:
    say_joined = Member._say_joined

    def say_yes(self: Member, has_pages: bool) -> None:
        say_joined(self, bool(self.place.pages_from))

    monkeypatch.setattr(Member, "_say_joined", say_yes)
    assert is_wrong_token(caught_in(pages_do_not_come()))


def test_a_core_that_is_not_told_of_an_epoch_s_end(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = FakeScheduler._apply

    def apply_most(self: FakeScheduler, effect: Effect, now_ns: int) -> None:
        if not isinstance(effect, SuspendPipeline):
            apply(self, effect, now_ns)

    monkeypatch.setattr(FakeScheduler, "_apply", apply_most)
    caught_in_mesh()


def test_a_worker_that_joins_before_its_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued of the old epoch is executed as well, and writes to pages of the new one."""
    monkeypatch.setattr(Member, "begin", Member._join)
    monkeypatch.setattr(
        Member, "_on_device", lambda self, time_ns, what: self._worker.on_device(time_ns, what)
    )
    assert isinstance(caught_in_mesh(), BrokenPlan | Violation)


def test_a_gateway_that_submits_again_without_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = FakeGateway._submit

    def submit_from_the_beginning(self: FakeGateway, held: Held) -> None:
        output, held.output = held.output, []
        submit(self, held)
        held.output = output

    monkeypatch.setattr(FakeGateway, "_submit", submit_from_the_beginning)
    assert is_wrong_token(caught_in_mesh())


def test_brought_output_that_counts_as_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = SchedulerCore.submit

    def submit_as_prompt(self: SchedulerCore, request: Request, now_ns: int) -> None:
        prompt = request.prompt_token_ids + request.output_token_ids
        submit(self, replace(request, prompt_token_ids=prompt, output_token_ids=()), now_ns)

    monkeypatch.setattr(SchedulerCore, "submit", submit_as_prompt)
    caught_in_mesh()


def test_requests_of_a_dead_gateway_that_live_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SchedulerCore, "abort_gateway", lambda self, gateway, now_ns: None)
    assert "gateway" in str(caught_in_mesh())


def test_a_silent_worker_that_nobody_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A freeze that lasts is noticed by its lease alone."""
    monkeypatch.setattr("scheduler.roster.Roster.lost", lambda self, now_ns: [])
    monkeypatch.setattr("scheduler.roster.Roster.next_end_ns", lambda self: None)
    caught_in_mesh()

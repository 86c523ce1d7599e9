"""Rounds of planning: who begins, who moves between pipelines, and what each pipeline does next."""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.core.admission import AdmissionRound
from scheduler.core.batch import plan_step
from scheduler.core.limits import SchedulerLimits
from scheduler.core.moving import move_from
from scheduler.core.pipeline import Pipeline
from scheduler.core.roster import Roster
from scheduler.core.sequence import Sequence
from stagemesh.plan import Step


class Planner:
    """`pipelines` is the core's own mapping, which changes."""

    def __init__(
        self, limits: SchedulerLimits, roster: Roster, pipelines: Mapping[str, Pipeline]
    ) -> None:
        self._limits = limits
        self._roster = roster
        self._pipelines = pipelines

    def plan(self, now_ns: int) -> list[Step]:
        """Every step that may be sent now, in order."""
        self._move_from_broken(now_ns)
        steps: list[Step] = []
        while made := self._round(now_ns):
            steps += made
        return steps

    def pipelines_to_leave(self) -> list[Pipeline]:
        """Broken ones with sequences on them, while others serve."""
        pipelines = self._pipelines.values()
        broken = [each for each in pipelines if each.is_suspended and each.running]
        if not broken:
            return []
        return broken if any(not each.is_suspended for each in pipelines) else []

    def preempt(self, sequence: Sequence) -> None:
        """Gives the sequence's blocks up; it waits again and will compute them anew."""
        assert sequence.pipeline is not None
        sequence.pipeline.dismiss(sequence)
        if sequence.is_probe:
            sequence.has_ended = True
            return
        sequence.begin_run()
        self._roster.queue.add(sequence)
        self._roster.counters.num_preempted += 1

    def _round(self, now_ns: int) -> list[Step]:
        """At most one step for each pipeline."""
        self._admit(now_ns)
        self._move_starved()
        steps = (
            plan_step(pipeline, self._limits, self._num_waiting_tokens(), self.preempt, now_ns)
            for pipeline in self._pipelines.values()
            if pipeline.num_step_slots > 0
        )
        return [step for step in steps if step is not None]

    def _num_waiting_tokens(self) -> int:
        """What each pipeline has to expect of the queue."""
        return self._roster.queue.num_tokens // len(self._pipelines)

    def _admit(self, now_ns: int) -> None:
        best = self._roster.queue.best_priority
        if best is None:
            return
        admission = AdmissionRound(self._pipelines.values(), best, self._limits, self.preempt)
        for sequence in self._roster.queue:
            if admission.is_over:
                return
            if admission.admit(sequence):
                self._roster.admit(sequence, now_ns)

    def _move_starved(self) -> None:
        """Who waits for blocks of a full pipeline while another has room begins anew there."""
        for pipeline in self._pipelines.values() if len(self._pipelines) > 1 else ():
            if pipeline.pool.num_free > 0 or pipeline.num_step_slots <= 0:
                continue
            sequence = max(pipeline.running.values(), key=lambda one: one.rank)
            others = [other for other in self._pipelines.values() if other is not pipeline]
            priority = sequence.request.priority
            admission = AdmissionRound(others, priority, self._limits, self.preempt)
            if sequence.is_short_of_blocks and admission.could_admit(sequence):
                self.preempt(sequence)

    def _move_from_broken(self, now_ns: int) -> None:
        for broken in self.pipelines_to_leave():
            others = [other for other in self._pipelines.values() if not other.is_suspended]
            for moved in move_from(broken, others, self._limits, self.preempt, now_ns):
                self._roster.admit(moved, now_ns)

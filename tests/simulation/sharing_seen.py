"""Counts what becomes of workers that serve two pipelines, for seeds that are to meet it."""

from __future__ import annotations

from collections import Counter

from scheduler.core import SchedulerCore
from scheduler.membership import Membership
from scheduler.messages import Effect, JoinEpoch, ResumePipeline, ToWorker


class SharingSeen:
    def __init__(self, membership: Membership, core: SchedulerCore, met: Counter[str]) -> None:
        self._membership = membership
        self._core = core
        self._met = met
        self._shared: set[tuple[str, ...]] = set()
        self._preempted = 0

    def after_tick(self) -> None:
        workers = self._membership.workers
        shared = {
            (worker.worker_id, *sorted(each.pipeline_id for each in worker.pipelines))
            for worker in workers
            if len(worker.pipelines) > 1
        }
        self._met["lent"] += len(shared - self._shared)
        self._shared = shared

    def before(self, effect: Effect) -> None:
        """The effect is about to be applied."""
        match effect:
            case ToWorker(_, JoinEpoch() as join) if join.pages_from:
                sources = [
                    worker
                    for worker in self._membership.workers
                    if worker.registration.address == join.pages_from and worker.pipelines
                ]
                self._met["given back with pages"] += len(sources)
            case ResumePipeline(facts):
                stats = self._core.stats()
                known = {each.pipeline_id: each for each in stats.pipelines}
                num_before = known[facts.pipeline_id].num_blocks
                self._met["shrunk"] += facts.num_blocks < num_before
                self._met["grown"] += facts.num_blocks > num_before
                self._preempted = stats.num_preempted

    def after(self, effect: Effect) -> None:
        if isinstance(effect, ResumePipeline) and self._serves_another(effect.facts.pipeline_id):
            num_preempted = self._core.stats().num_preempted - self._preempted
            self._met["shrunk with preemption"] += num_preempted > 0

    def _serves_another(self, pipeline_id: str) -> bool:
        """Whether one of the pipeline's workers does."""
        pipeline = self._membership.pipeline(pipeline_id)
        return pipeline is not None and any(worker.is_shared for worker in pipeline.members)

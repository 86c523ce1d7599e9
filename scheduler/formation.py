"""Makes pipelines of workers: how the layers are cut, when, and when they are cut anew.

Workers that no pipeline needs stay spares. Who takes which place is told by places.py. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import count

import structlog

from scheduler.limits import MembershipLimits
from scheduler.messages import Effect
from scheduler.patience import Patience
from scheduler.pipelines import MeshPipeline
from scheduler.placement import StageCosts, partition, plan_stages
from scheduler.places import Places
from scheduler.sharing import Sharing, to_come
from scheduler.takeover import recut
from scheduler.workers import Suits, Worker
from stagemesh.errors import PeerLost
from stagemesh.plan import ModelSummary, Span

log = structlog.get_logger()

# A worker that comes with layers loaded is what is left of a mesh: its neighbours will come too.
_RETURN_NS = 15_000_000_000


class Formation:
    """The pipelines of the mesh.

    `num_stages` 0: as many as workers come within `settle_ns`. `num_replicas` bounds them; 0: as
    many as can be made.
    """

    def __init__(self, limits: MembershipLimits, term: int, emit: Callable[[Effect], None]) -> None:
        self.pipelines: list[MeshPipeline] = []
        self._num_stages = limits.num_stages
        self._num_replicas = limits.num_replicas
        self._settle_ns = limits.settle_ns
        self._takeover_after_ns = limits.takeover_after_ns
        self._term = term
        self._emit = emit
        self.places = Places(emit, self.forget_kv)
        self.sharing = Sharing(is_allowed=limits.share_workers)
        self._numbers = count()
        self._settled_ns = 0
        self._updated_ns = 0

    def pipeline(self, pipeline_id: str) -> MeshPipeline | None:
        return next((p for p in self.pipelines if p.pipeline_id == pipeline_id), None)

    def worker_registered(self, worker: Worker, now_ns: int) -> None:
        """Before `update`: a new worker may change the cut of what does not serve yet."""
        wait_ns = self._settle_ns if worker.loaded is None else max(self._settle_ns, _RETURN_NS)
        self._settled_ns = max(self._settled_ns, now_ns + wait_ns)
        for pipeline in list(self.pipelines):
            if not pipeline.is_established and self._is_better_cut_anew(pipeline, worker):
                self._dissolve(pipeline, now_ns)

    def update(self, workers: Collection[Worker], model: ModelSummary, now_ns: int) -> None:
        """Fills places, forms what can be formed, and has spans loaded that are not."""
        self._updated_ns = now_ns
        self._drop_what_is_worthless()
        for pipeline in self.pipelines:
            self.places.fill(pipeline, workers, now_ns)
        self.sharing.update(self.pipelines, workers, now_ns)
        for number, pipeline in enumerate(self.pipelines):
            self.places.fill_from(pipeline, self.pipelines[number + 1 :], now_ns)
        for pipeline in list(self.pipelines):
            if pipeline.is_out_of_patience(now_ns):
                self._cut_anew(pipeline, workers, StageCosts.of(model), now_ns)
        while spans := self._plan(workers, model, now_ns):
            self.places.fill(self._new_pipeline(spans), workers, now_ns)
        self.places.load(self.pipelines, workers)

    def wakeup_ns(self, workers: Collection[Worker]) -> int | None:
        """When `update` may form a pipeline, if nothing else happens."""
        waits = not self.pipelines and any(worker.is_free for worker in workers)
        is_to_come = self._settled_ns > self._updated_ns and not self._num_stages
        times = [self._settled_ns if waits and is_to_come else None]
        times += [each.patience.wakeup_ns() for each in self.pipelines if each.is_established]
        times.append(self.sharing.wakeup_ns())
        return min((at for at in times if at is not None), default=None)

    def follow_term(self, term: int, now_ns: int) -> None:
        """Nobody follows the term that pipelines were begun in: none has served."""
        self._term = term
        for pipeline in list(self.pipelines):
            self._dissolve(pipeline, now_ns)

    def epoch_began(self, pipeline: MeshPipeline) -> None:
        """What whoever joins has of another pipeline's KV is left where there is room for it."""
        room = pipeline.epoch_room
        for stage, worker in enumerate(pipeline.members):
            assert worker.loaded is not None
            left = worker.loaded.num_blocks - room.num_blocks
            log_left = worker.loaded.num_log_blocks - room.num_log_blocks[stage]
            from_end = bool(worker.end_of(pipeline))
            for other in self.pipelines:
                if other is not pipeline:
                    least = other.least_blocks
                    other.holders.overwritten(worker, from_end, left, log_left, least)

    def forget_kv(self, worker: Worker) -> None:
        """The process ended, or its memory is used for something else."""
        for pipeline in self.pipelines:
            pipeline.holders.forget(worker)

    def _drop_what_is_worthless(self) -> None:
        """A pipeline that nobody is in stays while somebody may come back with its KV."""
        for pipeline in list(self.pipelines):
            if pipeline.holders.are_gone:
                pipeline.drop_kv()
            if not pipeline.members and not pipeline.holders.is_counted_on:
                self.pipelines.remove(pipeline)

    # ---- forming -------------------------------------------------------------------------------

    def _plan(
        self, workers: Collection[Worker], model: ModelSummary, now_ns: int
    ) -> tuple[Span, ...] | None:
        """The spans of one pipeline more, if there are workers for it."""
        coming = to_come(self.pipelines, workers, now_ns)
        free = [worker for worker in workers if worker.is_free and worker not in coming]
        if not free or 0 < self._num_replicas <= len(self.pipelines):
            return None
        costs = StageCosts.of(model)
        kept = [span for worker in free if (span := _span_that_it_keeps(worker)) is not None]
        num_stages = self._num_stages or (self.pipelines[0].num_stages if self.pipelines else 0)
        may_settle = bool(num_stages) or now_ns >= self._settled_ns
        as_loaded = plan_stages(costs, kept, len(free) - len(kept) if may_settle else 0, num_stages)
        if as_loaded is not None or not may_settle:
            return as_loaded
        fixed = [span for worker in free if (span := worker.registration.fixed_span) is not None]
        return plan_stages(costs, fixed, len(free) - len(fixed), num_stages) or self._plan_early(
            costs, fixed
        )

    def _plan_early(self, costs: StageCosts, fixed: Sequence[Span]) -> tuple[Span, ...] | None:
        """With the number of stages given the cut is known: who is there may load already."""
        is_awaited = not self.pipelines or len(self.pipelines) < self._num_replicas
        if fixed or not self._num_stages or not is_awaited:
            return None
        return partition(costs, self._num_stages)

    def _is_better_cut_anew(self, pipeline: MeshPipeline, worker: Worker) -> bool:
        vacant = [pipeline.spans[stage] for stage in pipeline.vacancies]
        if any((suits := worker.suits(s)) is not None and suits <= Suits.IS_FIXED for s in vacant):
            return False
        if self._num_stages:
            return worker.registration.fixed_span is not None and bool(vacant)
        is_all_fixed = all(m.registration.fixed_span is not None for m in pipeline.members)
        is_complete_and_only = not vacant and len(self.pipelines) == 1
        return is_complete_and_only and not is_all_fixed and worker.loaded is None

    def _cut_anew(
        self, pipeline: MeshPipeline, workers: Collection[Worker], costs: StageCosts, now_ns: int
    ) -> None:
        """Nobody comes for a vacant place: whoever is left takes its layers."""
        assigned = recut(pipeline, workers, costs)
        if assigned is None:
            pipeline.patience.was_in_vain()
            if not pipeline.members and any(other.is_serving for other in self.pipelines):
                self._dissolve(pipeline, now_ns)  # what waits for it is served by others
            return
        names = [f"{worker.worker_id} {span.start}:{span.end}" for worker, span in assigned]
        log.warning("the layers are cut anew", instead_of=pipeline.pipeline_id, workers=names)
        self._dissolve(pipeline, now_ns)
        successor = self._new_pipeline([span for _, span in assigned])
        successor.succeed(pipeline)
        for stage, (worker, _) in enumerate(assigned):
            successor.place(stage, worker)

    def _new_pipeline(self, spans: Sequence[Span]) -> MeshPipeline:
        name = f"p{next(self._numbers)}"
        patience = Patience(self._takeover_after_ns)
        pipeline = MeshPipeline(name, spans, self._term, self._emit, patience)
        self.pipelines.append(pipeline)
        return pipeline

    def _dissolve(self, pipeline: MeshPipeline, now_ns: int) -> None:
        for worker in pipeline.members:
            pipeline.vacate(worker, PeerLost("the layers are cut anew"), now_ns)
        pipeline.drop_kv()
        self.pipelines.remove(pipeline)


def _span_that_it_keeps(worker: Worker) -> Span | None:
    """Fixed by its operator, or loaded already."""
    if worker.registration.fixed_span is not None:
        return worker.registration.fixed_span
    return worker.loaded.span if worker.loaded else None

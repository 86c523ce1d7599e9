"""Makes pipelines of workers: who holds which layers, who takes the place of one that was lost.

A place goes to a worker that holds its layers already, then to one that is meant for them, then to
one that must load them. Workers that no pipeline needs stay spares. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import count

from scheduler.messages import Effect, LoadSpan, ToWorker
from scheduler.pipelines import MeshPipeline
from scheduler.placement import StageCosts, partition, plan_stages
from scheduler.workers import Worker
from stagemesh.errors import ModelMismatch, PeerLost
from stagemesh.plan import ModelSummary, Span

# A worker that comes with layers loaded is what is left of a mesh: its neighbours will come too.
_RETURN_NS = 15_000_000_000


class Formation:
    """The pipelines of the mesh.

    `num_stages` 0: as many as workers come within `settle_ns`. `num_replicas` bounds the pipelines;
    0: as many as can be made.
    """

    def __init__(
        self,
        num_stages: int,
        num_replicas: int,
        settle_ns: int,
        term: int,
        emit: Callable[[Effect], None],
    ) -> None:
        self.pipelines: list[MeshPipeline] = []
        self._num_stages = num_stages
        self._num_replicas = num_replicas
        self._settle_ns = settle_ns
        self._term = term
        self._emit = emit
        self._numbers = count()
        self._settled_ns = 0
        self._updated_ns = 0

    def worker_registered(self, worker: Worker, now_ns: int) -> None:
        """Before `update`: a new worker may change the cut of what does not serve yet."""
        wait_ns = self._settle_ns if worker.loaded is None else max(self._settle_ns, _RETURN_NS)
        self._settled_ns = max(self._settled_ns, now_ns + wait_ns)
        for pipeline in list(self.pipelines):
            if not pipeline.has_served and self._is_better_cut_anew(pipeline, worker):
                self._dissolve(pipeline, now_ns)

    def update(self, workers: Collection[Worker], model: ModelSummary, now_ns: int) -> None:
        """Fills places, forms what can be formed, and has spans loaded that are not."""
        self._updated_ns = now_ns
        self._drop_what_is_worthless()
        for pipeline in self.pipelines:
            self._fill(pipeline, workers, now_ns)
        while spans := self._plan(workers, model, now_ns):
            pipeline = MeshPipeline(f"p{next(self._numbers)}", spans, self._term, self._emit)
            self.pipelines.append(pipeline)
            self._fill(pipeline, workers, now_ns)
        for pipeline in self.pipelines:
            self._load_spans(pipeline)

    def wakeup_ns(self, workers: Collection[Worker]) -> int | None:
        """When `update` may form a pipeline, if nothing else happens."""
        waits = not self.pipelines and any(worker.is_free for worker in workers)
        is_to_come = self._settled_ns > self._updated_ns and not self._num_stages
        return self._settled_ns if waits and is_to_come else None

    def epoch_began(self, pipeline: MeshPipeline) -> None:
        """Whoever joins gives up the KV that it has of another pipeline."""
        for other in self.pipelines:
            for worker in pipeline.members if other is not pipeline else ():
                other.holders.forget(worker)

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
        free = [worker for worker in workers if worker.is_free]
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
        if any(worker.suits(span) in (0, 1) for span in vacant):
            return False
        if self._num_stages:
            return worker.registration.fixed_span is not None and bool(vacant)
        is_all_fixed = all(m.registration.fixed_span is not None for m in pipeline.members)
        is_complete_and_only = not vacant and len(self.pipelines) == 1
        return is_complete_and_only and not is_all_fixed and worker.loaded is None

    def _dissolve(self, pipeline: MeshPipeline, now_ns: int) -> None:
        for worker in pipeline.members:
            pipeline.vacate(worker, PeerLost("the layers are cut anew"), now_ns)
        pipeline.drop_kv()
        self.pipelines.remove(pipeline)

    # ---- places --------------------------------------------------------------------------------

    def _fill(self, pipeline: MeshPipeline, workers: Collection[Worker], now_ns: int) -> None:
        for stage in pipeline.vacancies:  # first, so that nobody who holds one stage loads another
            if worker := _best_free(workers, pipeline.spans[stage], worst_rank=1):
                pipeline.place(stage, worker)
        for stage in pipeline.vacancies:
            span = pipeline.spans[stage]
            worker = _best_free(workers, span) or self._best_elsewhere(pipeline, span)
            if worker is None:
                continue
            if worker.pipeline is not None:
                worker.pipeline.vacate(worker, PeerLost("a worker went elsewhere"), now_ns)
            pipeline.place(stage, worker)

    def _best_elsewhere(self, pipeline: MeshPipeline, span: Span) -> Worker | None:
        """One that holds the span in a later pipeline, which lacks somebody anyway."""
        later = self.pipelines[self.pipelines.index(pipeline) + 1 :]
        holders = (
            worker
            for other in later
            if other.vacancies
            for worker in other.members
            if worker.session is not None and worker.holds(span)
        )
        return next(holders, None)

    def _load_spans(self, pipeline: MeshPipeline) -> None:
        for span, worker in zip(pipeline.spans, pipeline.workers, strict=True):
            is_wanting = worker is not None and worker.loading is None and not worker.holds(span)
            if worker is not None and worker.session is not None and is_wanting:
                self._load(worker, worker.session, span)

    def _load(self, worker: Worker, session: int, span: Span) -> None:
        self.forget_kv(worker)
        worker.loaded, worker.loading, worker.load_fraction = None, span, 0.0
        self._emit(ToWorker(session, LoadSpan(span)))


def _span_that_it_keeps(worker: Worker) -> Span | None:
    """Fixed by its operator, or loaded already."""
    if worker.registration.fixed_span is not None:
        return worker.registration.fixed_span
    return worker.loaded.span if worker.loaded else None


def _best_free(workers: Collection[Worker], span: Span, worst_rank: int = 2) -> Worker | None:
    """By the rank that `Worker.suits` gives."""
    suiting = [
        (rank, worker.conduct.num_failures, worker.number, worker)
        for worker in workers
        if worker.is_free and (rank := worker.suits(span)) is not None and rank <= worst_rank
    ]
    return min(suiting)[-1] if suiting else None


def other_block_sizes(pipeline: MeshPipeline) -> list[tuple[Worker, ModelMismatch]]:
    """Members that cannot stay: blocks mean the same on every stage, and whoever came first says
    how large they are."""
    loaded = sorted((w for w in pipeline.members if w.loaded), key=lambda worker: worker.number)
    sizes = [worker.loaded.block_size_tokens if worker.loaded else 0 for worker in loaded]
    return [
        (
            worker,
            ModelMismatch(
                f"worker {worker.worker_id} has KV blocks of {size} tokens, worker "
                f"{loaded[0].worker_id} of {sizes[0]}"
            ),
        )
        for worker, size in zip(loaded, sizes, strict=True)
        if size != sizes[0]
    ]

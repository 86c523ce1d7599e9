"""Who takes which place of a pipeline, and what those load who have none.

A place goes to a worker that holds its layers, else it is kept for one that must load them. Whoever
has the layers first takes the place, and workers that no pipeline needs load what the fewest hold:
so several may load the same layers at once. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import structlog

from scheduler.messages import Effect, LoadSpan, ToWorker
from scheduler.pipelines import MeshPipeline
from scheduler.workers import Suits, Worker
from stagemesh.errors import ModelMismatch, PeerLost
from stagemesh.plan import Span

# Failures in a row after which somebody else is wanted in a worker's place.
MAX_FAILURES = 3
_FIRST_ASIDE_NS = 30_000_000_000
_MAX_DOUBLINGS = 4

log = structlog.get_logger()


class Places:
    """`forget_kv` is told of workers that load."""

    def __init__(self, emit: Callable[[Effect], None], forget_kv: Callable[[Worker], None]) -> None:
        self._emit = emit
        self._forget_kv = forget_kv

    def fill(self, pipeline: MeshPipeline, workers: Collection[Worker], now_ns: int) -> None:
        """With workers that are free."""
        for stage in range(pipeline.num_stages):
            self._exchange(pipeline, stage, workers, now_ns)
        # First, so that nobody who holds one stage loads another.
        for worst in (Suits.IS_FIXED, Suits.MAY_LOAD):
            for stage in pipeline.vacancies:
                if worker := best_free(workers, pipeline, stage, now_ns, worst):
                    pipeline.place(stage, worker)

    def fill_from(self, pipeline: MeshPipeline, later: Sequence[MeshPipeline], now_ns: int) -> None:
        """With workers of `later` pipelines that lack somebody anyway."""
        for stage in pipeline.vacancies:
            found = ((other, _dispensable(other, pipeline, stage)) for other in later)
            other, worker = next((pair for pair in found if pair[1] is not None), (None, None))
            if other is not None and worker is not None:
                other.vacate(worker, PeerLost("a worker went elsewhere"), now_ns)
                pipeline.place(stage, worker)

    def load(self, pipelines: Collection[MeshPipeline], workers: Collection[Worker]) -> None:
        """Has spans loaded that are not: by those whose places they are, then by all others."""
        for pipeline in pipelines:
            for span, worker in zip(pipeline.spans, pipeline.workers, strict=True):
                if worker is not None and not worker.holds(span):
                    self.load_span(worker, span)
        wanted = [span for each in pipelines if each.has_served for span in each.spans]
        for worker in workers:
            if worker.is_free and worker.loading is None:
                other = _span_of_a_spare(wanted, worker, workers)
                if other is not None:
                    self.load_span(worker, other)

    def load_span(self, worker: Worker, span: Span) -> None:
        """Told once; one load is finished before another begins."""
        if worker.session is None or worker.loading is not None:
            return
        self._forget_kv(worker)
        worker.loaded, worker.loading, worker.load_fraction = None, span, 0.0
        self._emit(ToWorker(worker.session, LoadSpan(span)))

    def _exchange(
        self, pipeline: MeshPipeline, stage: int, workers: Collection[Worker], now_ns: int
    ) -> None:
        """A worker that still loads, or goes on failing, for one that has the layers."""
        holder, span = pipeline.workers[stage], pipeline.spans[stage]
        if holder is None or holder.session is None:
            return
        is_failing = holder.conduct.num_failures >= MAX_FAILURES
        if holder.holds(span) and not is_failing:
            return
        better = best_free(workers, pipeline, stage, now_ns, Suits.HOLDS)
        if better is None or (is_failing and better.is_aside(now_ns)):
            return
        reason = "it goes on failing" if is_failing else "another worker had the layers first"
        log.info("a worker is replaced", worker=holder.worker_id, reason=reason)
        pipeline.vacate(holder, PeerLost(f"worker {holder.worker_id}: {reason}"), now_ns)
        pipeline.place(stage, better)
        if is_failing:
            _set_aside(holder, now_ns)


def best_free(
    workers: Collection[Worker],
    pipeline: MeshPipeline,
    stage: int,
    now_ns: int,
    worst: Suits = Suits.MAY_LOAD,
) -> Worker | None:
    """Whoever could serve the stage soonest."""
    span = pipeline.spans[stage]
    suiting = [
        (
            suits is not Suits.HOLDS,
            worker.is_aside(now_ns),
            not pipeline.holders.holds(stage, worker),
            pipeline.ranks[stage] not in (None, worker.registration.tensor_parallel),
            suits,
            worker.loading not in (None, span),
            worker.conduct.num_failures,
            worker.number,
            worker,
        )
        for worker in workers
        if worker.is_free and (suits := worker.suits(span)) is not None and suits <= worst
    ]
    return min(suiting)[-1] if suiting else None


def _set_aside(worker: Worker, now_ns: int) -> None:
    conduct = worker.conduct
    aside_ns = _FIRST_ASIDE_NS << min(conduct.num_times_aside, _MAX_DOUBLINGS)
    conduct.aside_until_ns = now_ns + aside_ns
    conduct.num_times_aside += 1
    conduct.num_failures = 0
    log.warning("a worker is set aside", worker=worker.worker_id, seconds=aside_ns // 10**9)


def _dispensable(other: MeshPipeline, pipeline: MeshPipeline, stage: int) -> Worker | None:
    """Whom the other one has for the stage, and has no use for."""
    able = (
        worker
        for worker in (other.members if other.vacancies else ())
        if worker.session is not None
        and not worker.is_draining
        and worker.holds(pipeline.spans[stage])
        and worker.end_of(pipeline) is None
    )
    return next(able, None)


def _span_of_a_spare(
    wanted: Sequence[Span], worker: Worker, workers: Collection[Worker]
) -> Span | None:
    """What a spare should load: of the spans that it may hold, the one that fewest have, for its
    places, or load. None where it is well as it is: it holds one, and nobody lacks another."""
    sound = [w for w in workers if not w.is_draining and w.conduct.num_failures < MAX_FAILURES]

    def plenty(span: Span) -> tuple[int, int]:
        num_holding = sum(other.holds(span) for other in sound)
        return num_holding - wanted.count(span), sum(w.loading == span for w in workers)

    suiting = [span for span in wanted if worker.suits(span) is not None]
    scarcest = min(suiting, key=plenty, default=None)
    own = worker.loaded.span if worker.loaded else None
    if scarcest is None or own is None or own not in wanted:
        return scarcest
    is_lacking = plenty(scarcest)[0] < 0 and plenty(scarcest)[1] == 0
    is_dispensable = plenty(own)[0] > 0
    return scarcest if is_lacking and is_dispensable else None


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

"""Workers that serve two pipelines: who stands in where nobody who is free holds the layers.

A worker that holds them is lent by its pipeline to the one that lost somebody, which so keeps the
KV of its other stages. Each has a half of its blocks then, the one from the start of its memory,
the other from the end. The place goes to a free worker as soon as one holds the layers; whoever is
alone on a worker again grows into the whole of it with an epoch. Sans-IO, a part of formation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import structlog

from scheduler.messages import LoadedSpan
from scheduler.pipelines import MeshPipeline, Phase
from scheduler.places import MAX_FAILURES, best_free
from scheduler.workers import MAX_TENANTS, Suits, Worker
from stagemesh.errors import PeerLost
from stagemesh.plan import Span

# Who lacks somebody for so long leaves shared workers to the other one, and who was alone on a
# worker for so long begins an epoch for the sake of its room. Not at once: whoever is missing may
# come back, and what it has there is of use as long as nobody writes over it.
CALM_NS = 5_000_000_000
# Epochs of a pipeline that came to nothing one after another, after which it gives back what was
# lent to it, for a time that grows.
_MAX_VAIN_EPOCHS = 6
_FIRST_BAR_NS = 60_000_000_000
_MAX_DOUBLINGS = 4

log = structlog.get_logger()


class Sharing:
    """`is_allowed`: whether the operator lets workers be lent."""

    def __init__(self, *, is_allowed: bool) -> None:
        self._is_allowed = is_allowed
        # By pipeline: since when it could have more blocks; since when it shares workers and lacks
        # others; until when nothing is lent to it, and how often that was so.
        self._roomy_since_ns: dict[str, int] = {}
        self._dead_since_ns: dict[str, int] = {}
        self._barred: dict[str, tuple[int, int]] = {}
        self._seen_ns = 0

    def update(
        self, pipelines: Sequence[MeshPipeline], workers: Collection[Worker], now_ns: int
    ) -> None:
        """After places were filled by those who are free."""
        self._seen_ns = now_ns
        names = {pipeline.pipeline_id for pipeline in pipelines}
        self._barred = {name: bar for name, bar in self._barred.items() if name in names}
        for pipeline in pipelines:
            self._end_what_is_in_vain(pipeline, now_ns)
            _give_to_the_free(pipeline, workers, now_ns)
        for pipeline in pipelines:
            loans = self._loans(pipeline, workers, now_ns)
            for stage, lender in loans.items():
                _lend(pipeline, stage, lender, now_ns)
        self._give_up(pipelines, now_ns)
        self._grow(pipelines, now_ns)

    def wakeup_ns(self) -> int | None:
        """When `update` has something to do, if nothing else happens."""
        since = (*self._roomy_since_ns.values(), *self._dead_since_ns.values())
        times = [since_ns + CALM_NS for since_ns in since]
        times += [until_ns for until_ns, _ in self._barred.values() if until_ns > self._seen_ns]
        return min(times, default=None)

    def stand_in(
        self, pipeline: MeshPipeline, stage: int, workers: Iterable[Worker], now_ns: int
    ) -> Worker | None:
        """Who could have a place as well that is about to be left by whoever has it."""
        others_are_ready = all(
            pipeline.is_ready(other) for other in range(pipeline.num_stages) if other != stage
        )
        lender = _best_lender(pipeline, stage, workers, now_ns)
        if not self._is_allowed or lender is None or not others_are_ready:
            return None
        return lender if _have_room(pipeline, {stage: lender}) else None

    # ---- inside --------------------------------------------------------------------------------

    def _loans(
        self, pipeline: MeshPipeline, workers: Collection[Worker], now_ns: int
    ) -> Mapping[int, Worker]:
        """Who stands in at which stage; nobody where the pipeline would not be complete by it."""
        is_broken = pipeline.has_served and pipeline.phase is Phase.IDLE
        is_barred = now_ns < self._barred.get(pipeline.pipeline_id, (0, 0))[0]
        if not self._is_allowed or not is_broken or is_barred:
            return {}
        loans: dict[int, Worker] = {}
        for stage in range(pipeline.num_stages):
            if pipeline.is_ready(stage):
                continue
            may_come_back = not _lacks(pipeline, stage)
            lender = _best_lender(pipeline, stage, workers, now_ns)
            if may_come_back or lender is None:
                return {}
            loans[stage] = lender
        return loans if _have_room(pipeline, loans) and _saves_kv(pipeline, loans) else {}

    def _end_what_is_in_vain(self, pipeline: MeshPipeline, now_ns: int) -> None:
        """Not even with the workers that were lent to it the pipeline gets anything done."""
        name, lent = pipeline.pipeline_id, _lent_to(pipeline)
        if pipeline.is_serving and not lent:
            self._barred.pop(name, None)
        if not lent or pipeline.trials.num_failures < _MAX_VAIN_EPOCHS:
            return
        num_times = self._barred.get(name, (0, 0))[1]
        bar_ns = _FIRST_BAR_NS << min(num_times, _MAX_DOUBLINGS)
        self._barred[name] = now_ns + bar_ns, num_times + 1
        for stage in lent:
            worker = pipeline.workers[stage]
            assert worker is not None
            log.warning("a loan was in vain", pipeline=name, worker=worker.worker_id)
            pipeline.vacate(worker, PeerLost("the loan was in vain"), now_ns)

    def _give_up(self, pipelines: Sequence[MeshPipeline], now_ns: int) -> None:
        """Whoever has lacked somebody for a while leaves what it shares to the other one."""
        dead = {
            pipeline.pipeline_id: pipeline
            for pipeline in pipelines
            if pipeline.vacancies and _shares(pipeline)
        }
        since = self._dead_since_ns
        self._dead_since_ns = {name: since.get(name, now_ns) for name in dead}
        for name, pipeline in dead.items():
            if now_ns >= self._dead_since_ns[name] + CALM_NS:
                _leave_what_it_shares(pipeline, now_ns)
                del self._dead_since_ns[name]

    def _grow(self, pipelines: Sequence[MeshPipeline], now_ns: int) -> None:
        """Whoever has been alone on its workers for a while takes the whole of them."""
        roomy = {
            pipeline.pipeline_id: pipeline
            for pipeline in pipelines
            if pipeline.is_serving and pipeline.room.num_blocks > pipeline.epoch_room.num_blocks
        }
        since = self._roomy_since_ns
        self._roomy_since_ns = {name: since.get(name, now_ns) for name in roomy}
        for name, pipeline in roomy.items():
            if now_ns >= self._roomy_since_ns[name] + CALM_NS:
                pipeline.renew("there is room for more blocks", now_ns)
                del self._roomy_since_ns[name]


def make_room(worker: Worker, newcomer: MeshPipeline, now_ns: int) -> None:
    """Ends the epoch of whoever has more of the worker than its share by now."""
    for other in worker.pipelines:
        if other is not newcomer and other.exceeds(worker):
            reason = f"worker {worker.worker_id} serves {newcomer.pipeline_id} as well"
            other.renew(reason, now_ns)


def to_come(
    pipelines: Iterable[MeshPipeline], workers: Iterable[Worker], now_ns: int
) -> set[Worker]:
    """Those who are free and will have the places of workers that are lent, once they hold the
    layers."""
    coming: set[Worker] = set()
    for pipeline in pipelines:
        for stage in _lent_to(pipeline):
            rest = [worker for worker in workers if worker not in coming]
            if worker := best_free(rest, pipeline, stage, now_ns):
                coming.add(worker)
    return coming


# ---- lending -----------------------------------------------------------------------------------


def _lacks(pipeline: MeshPipeline, stage: int) -> bool:
    """Whether nobody is there, or one who loads. Who may come back any moment is waited for."""
    worker = pipeline.workers[stage]
    is_here = worker is not None and worker.session is not None
    return worker is None or (is_here and not pipeline.is_ready(stage))


def _best_lender(
    pipeline: MeshPipeline, stage: int, workers: Iterable[Worker], now_ns: int
) -> Worker | None:
    """Who holds the layers and serves another pipeline alone: rather one that need not shrink."""
    span, size = pipeline.spans[stage], pipeline.block_size_tokens
    able = [
        (_must_shrink(worker), -worker.num_blocks, worker.stats.steps_queued, worker.number, worker)
        for worker in workers
        if _can_lend(worker, now_ns)
        and worker.end_of(pipeline) is None
        and (load := _load_of(worker, span)) is not None
        and size in (0, load.block_size_tokens)
    ]
    return min(able)[-1] if able else None


def _can_lend(worker: Worker, now_ns: int) -> bool:
    is_sound = worker.conduct.num_failures < MAX_FAILURES and not worker.is_aside(now_ns)
    is_here = worker.session is not None and worker.error is None
    is_leaving = worker.is_draining or worker.is_reserved
    places = worker.pipelines
    is_alone = len(worker.tenancies) == len(places) == 1 and places[0].has_served
    return is_here and is_sound and is_alone and not is_leaving


def _load_of(worker: Worker, span: Span) -> LoadedSpan | None:
    return worker.loaded if worker.loading is None and worker.holds(span) else None


def _must_shrink(lender: Worker) -> bool:
    """Whether the epoch that it is in has more than a half of it."""
    (pipeline,) = lender.pipelines
    stage = pipeline.workers.index(lender)
    is_running = pipeline.phase is not Phase.IDLE
    return is_running and not pipeline.epoch_room.is_within(stage, lender, MAX_TENANTS)


def _have_room(pipeline: MeshPipeline, loans: Mapping[int, Worker]) -> bool:
    """Whether nobody has too few blocks then, neither who lends nor who is lent to."""
    lenders = set(loans.values())

    def num_blocks(workers: Iterable[Worker]) -> int:
        loaded = (worker for worker in workers if worker.loaded)
        shares = (w.num_blocks // (MAX_TENANTS if w in lenders else 1) for w in loaded)
        return min(shares, default=0)

    own = (worker for s, worker in enumerate(pipeline.workers) if worker and s not in loans)
    lending = {each for lender in lenders for each in lender.pipelines}
    return num_blocks((*own, *lenders)) >= pipeline.least_blocks and all(
        num_blocks(each.members) >= each.least_blocks for each in lending
    )


def _saves_kv(pipeline: MeshPipeline, loans: Mapping[int, Worker]) -> bool:
    """Whether anything is left that is worth a loan: else requests may as well begin elsewhere."""
    workers = [loans.get(stage, worker) for stage, worker in enumerate(pipeline.workers)]
    return any(worker and pipeline.holders.holds(s, worker) for s, worker in enumerate(workers))


def _lend(pipeline: MeshPipeline, stage: int, lender: Worker, now_ns: int) -> None:
    if (loading := pipeline.workers[stage]) is not None:
        stands_in = PeerLost(f"worker {lender.worker_id} stands in while it loads")
        pipeline.vacate(loading, stands_in, now_ns)
    log.info("a worker is lent", worker=lender.worker_id, to=pipeline.pipeline_id)
    pipeline.place(stage, lender)
    make_room(lender, pipeline, now_ns)


# ---- giving back -------------------------------------------------------------------------------


def _lent_to(pipeline: MeshPipeline) -> list[int]:
    """Stages whose workers were another pipeline's before."""
    return [
        stage
        for stage, worker in enumerate(pipeline.workers)
        if worker and worker.is_shared and worker.tenancies[-1].pipeline is pipeline
    ]


def _give_to_the_free(pipeline: MeshPipeline, workers: Collection[Worker], now_ns: int) -> None:
    """Places of workers that are lent, to those who hold the layers and have no other."""
    for stage in _lent_to(pipeline):
        lent = pipeline.workers[stage]
        successor = best_free(workers, pipeline, stage, now_ns, Suits.HOLDS)
        if lent and successor and not lent.is_draining and not pipeline.handovers:
            log.info("a worker is given back", worker=lent.worker_id, by=pipeline.pipeline_id)
            pipeline.hand_over(stage, successor, now_ns)


def _shares(pipeline: MeshPipeline) -> bool:
    workers = (*pipeline.members, *pipeline.handovers.sources.values())
    return any(worker.is_shared for worker in workers)


def _leave_what_it_shares(pipeline: MeshPipeline, now_ns: int) -> None:
    for worker in pipeline.members:
        if worker.is_shared:
            dead = PeerLost(f"worker {worker.worker_id} serves another pipeline, this one cannot")
            pipeline.vacate(worker, dead, now_ns)
    for stage, source in pipeline.handovers.sources.items():
        if source.is_shared:
            pipeline.handovers.give_up(stage)

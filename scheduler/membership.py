"""Who belongs to the mesh: leases, registrations, losses, and the epochs of the pipelines.

A state machine without I/O: what workers say and what the clock shows comes in by calls, with
`now_ns`; what is to be done comes out of `take_effects`. Whoever drives it calls `tick` after every
batch of calls and at `wakeup_ns`. Knows no requests and no tokens.
"""

from __future__ import annotations

from itertools import count

import structlog

from scheduler.agreement import MeshModel
from scheduler.draining import Drains
from scheduler.epochs import Epochs
from scheduler.formation import Formation
from scheduler.limits import MembershipLimits
from scheduler.messages import (
    Effect,
    EndSession,
    LoadedSpan,
    Registration,
    Resign,
    ShutdownWorker,
    ToWorker,
)
from scheduler.pipelines import MeshPipeline
from scheduler.placement import check_num_stages, check_span
from scheduler.roster import Roster
from scheduler.workers import Worker, WorkerStats
from stagemesh.errors import (
    OutOfMemory,
    PeerLost,
    ProtocolError,
    StageMeshError,
    StaleEpoch,
)
from stagemesh.plan import Span

log = structlog.get_logger()


class Membership:
    """The mesh's members. `term` is this scheduler's incarnation: higher than any before it, and
    raised where a worker knows of a higher one before anything has served."""

    def __init__(self, limits: MembershipLimits, term: int) -> None:
        self.model = MeshModel()
        self.term = term
        self._limits = limits
        self._effects: list[Effect] = []
        self._formation = Formation(limits, term, self._effects.append)
        self._roster = Roster(limits.lease_ns, limits.reconnect_grace_ns)
        self.epochs = Epochs(limits, self.model, self._roster, self._formation)
        self._drains = Drains(self._roster, self._formation, self._effects.append, self._release)
        self._numbers = count(1)
        self._has_news = False
        self._due_ns: int | None = None

    # ---- what others ask -----------------------------------------------------------------------

    @property
    def workers(self) -> list[Worker]:
        return self._roster.workers

    @property
    def pipelines(self) -> list[MeshPipeline]:
        return list(self._formation.pipelines)

    @property
    def max_model_len(self) -> int:
        """In tokens, from the model and the option alone; 0 until there is a model."""
        summary = self.model.summary
        if summary is None:
            return 0
        return min(summary.max_position, self._limits.max_model_len or summary.max_position)

    def pipeline(self, pipeline_id: str) -> MeshPipeline | None:
        return self._formation.pipeline(pipeline_id)

    def take_effects(self) -> list[Effect]:
        """What is to be done, in order."""
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def wakeup_ns(self) -> int | None:
        """When `tick` must be called at the latest, if nothing else happens."""
        return self._due_ns

    # ---- workers come and go -------------------------------------------------------------------

    def register(self, session: int, registration: Registration, now_ns: int) -> None:
        """A worker introduces itself on a new stream.

        Raises ModelMismatch or SpanError where it is of no use to this mesh; then it is no member.
        Raises StaleEpoch where it has followed a scheduler that took this one's place, which ends.
        """
        self._has_news = True
        self._check_usable(registration)
        self._exceed(registration, now_ns)
        old = self._roster.named(registration.worker_id)
        if old is not None and old.registration.incarnation == registration.incarnation:
            self._reattach(old, session, registration, now_ns)
            return
        if old is not None:
            news = f"another process registered as worker {old.worker_id}"
            self._remove(old, PeerLost(news), now_ns, refusal=ProtocolError(news))
            self._formation.forget_kv(old)
            self.model.admit(registration)  # the old one may have been the last to know the model
        worker = Worker(registration, session, now_ns, next(self._numbers))
        worker.loaded = registration.loaded
        self._roster.add(worker)
        log.info("a worker registered", worker=worker.worker_id, address=registration.address)
        self._formation.worker_registered(worker, now_ns)

    def was_deaf(self, duration_ns: int) -> None:
        """The scheduler itself stood still: that nobody was heard is nobody's fault."""
        self._has_news = True
        self._roster.was_deaf(duration_ns)

    def heard(self, session: int, now_ns: int, stats: WorkerStats | None = None) -> None:
        """Any message renews the lease."""
        if worker := self._roster.on(session):
            worker.heard_ns = now_ns
            worker.stats = stats or worker.stats

    def disconnected(self, session: int, now_ns: int) -> None:
        """The stream broke. The worker has a short while to come back."""
        self._has_news = True
        worker = self._roster.on(session)
        if worker is None:
            return
        self._roster.detach(worker, now_ns)
        log.warning("the stream of a worker broke", worker=worker.worker_id)
        lost = PeerLost(f"the stream of worker {worker.worker_id} broke")
        for pipeline in worker.pipelines:
            pipeline.end_epoch(lost, now_ns)

    def goodbye(self, session: int, reason: str, now_ns: int) -> None:
        self._has_news = True
        if worker := self._roster.on(session):
            log.info("a worker leaves", worker=worker.worker_id, reason=reason)
            self._remove(worker, PeerLost(f"worker {worker.worker_id} left: {reason}"), now_ns)
            self._formation.forget_kv(worker)

    def drain(
        self, worker_id: str, to_worker_id: str = "", *, stay: bool = False, now_ns: int
    ) -> int:
        """Has the worker's place handed over, and the worker leave; DrainDone with the number that
        is returned says that it is done. Raises InvalidRequest."""
        self._has_news = True
        return self._drains.start(worker_id, to_worker_id, stay=stay, now_ns=now_ns)

    def draining(self, session: int, now_ns: int) -> None:
        """The worker was told to stop and serves on until it is released."""
        self._has_news = True
        if worker := self._roster.on(session):
            self._drains.start(worker.worker_id, "", stay=False, now_ns=now_ns)

    # ---- loading -------------------------------------------------------------------------------

    def load_progress(self, session: int, loaded_bytes: int, total_bytes: int) -> None:
        if worker := self._roster.on(session):
            worker.load_fraction = min(1.0, loaded_bytes / max(1, total_bytes))

    def span_loaded(self, session: int, loaded: LoadedSpan) -> None:
        self._has_news = True
        worker = self._roster.on(session)
        if worker is None:
            return
        worker.loading, worker.loaded = None, loaded
        log.info("layers are loaded", worker=worker.worker_id, span=_text(loaded.span))

    def failed(self, session: int, error: StageMeshError, now_ns: int) -> None:
        """The worker cannot do what it was told; it is not asked for it again."""
        self._has_news = True
        worker = self._roster.on(session)
        if worker is None:
            return
        span, worker.loading = worker.loading, None
        if isinstance(error, OutOfMemory) and span is not None:
            worker.too_large = span  # of fewer layers it may be capable
        else:
            worker.error = error
        log.error("a worker failed", worker=worker.worker_id, code=error.code, reason=str(error))
        for pipeline in worker.pipelines:
            pipeline.vacate(worker, error, now_ns)

    # ---- time ----------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> bool:
        """Ends leases and joins that take too long, fills places, begins epochs.

        Returns whether there was anything to look at: it is called for every step.
        """
        is_due = self._due_ns is not None and now_ns >= self._due_ns
        if not (is_due or self._has_news or self.epochs.has_news):
            return False
        self._has_news = self.epochs.has_news = False
        self._lose_silent(now_ns)
        self.epochs.settle(now_ns, self.max_model_len)
        if self.model.summary is not None:
            self._drains.take_back(now_ns)
            self._formation.update(self.workers, self.model.summary, now_ns)
            self._drains.advance(now_ns)
        for worker, error in self.epochs.begin(now_ns):
            self._remove(worker, error, now_ns, refusal=error)
        self._has_news = bool(self._effects)  # one thing leads to another
        self._due_ns = self._next_due_ns()
        return True

    # ---- inside --------------------------------------------------------------------------------

    def _lose_silent(self, now_ns: int) -> None:
        for worker in self._roster.lost(now_ns):
            how = "was silent for too long" if worker.away_ns is None else "did not come back"
            lost = PeerLost(f"worker {worker.worker_id} {how}")
            log.warning("a worker is lost", worker=worker.worker_id, reason=str(lost))
            self._remove(worker, lost, now_ns)

    def _next_due_ns(self) -> int | None:
        times = [
            self._roster.next_end_ns(),
            self._formation.wakeup_ns(self.workers),
            *(pipeline.wakeup_ns() for pipeline in self._formation.pipelines),
        ]
        return min((at for at in times if at is not None), default=None)

    def _check_usable(self, registration: Registration) -> None:
        num_layers = registration.model.num_layers
        if registration.fixed_span is not None:
            check_span(registration.fixed_span, num_layers)
        check_num_stages(self._limits.num_stages, num_layers)
        self.model.admit(registration)

    def _exceed(self, registration: Registration, now_ns: int) -> None:
        """A worker follows no term that is lower than one that it has followed."""
        if registration.followed_term <= self.term:
            return
        followed = f"worker {registration.worker_id} has followed {registration.followed_term}"
        if any(pipeline.has_served for pipeline in self._formation.pipelines):
            error = StaleEpoch(f"the scheduler of term {self.term} was replaced: {followed}")
            self._effects.append(Resign(error))
            raise error
        self.term = registration.followed_term + 1
        self._formation.follow_term(self.term, now_ns)
        log.warning("a higher term is taken", term=self.term, reason=followed)

    def _reattach(
        self, worker: Worker, session: int, registration: Registration, now_ns: int
    ) -> None:
        """The same process on a new stream: what it holds is what it says."""
        if worker.session is not None:
            self._effects.append(EndSession(worker.session))
            self.disconnected(worker.session, now_ns)
        self._roster.attach(worker, session, now_ns)
        worker.registration = registration
        worker.loaded, worker.loading = registration.loaded, None
        log.info("a worker is back", worker=worker.worker_id)

    def _release(self, worker: Worker, now_ns: int) -> None:
        """Nothing depends on the worker any more."""
        if worker.session is not None:
            self._effects.append(ToWorker(worker.session, ShutdownWorker("drained")))
        self._remove(worker, PeerLost(f"worker {worker.worker_id} was released"), now_ns)
        self._formation.forget_kv(worker)

    def _remove(
        self,
        worker: Worker,
        reason: StageMeshError,
        now_ns: int,
        *,
        refusal: StageMeshError | None = None,
    ) -> None:
        for pipeline in worker.pipelines:
            pipeline.vacate(worker, reason, now_ns)
        session = self._roster.remove(worker, now_ns)
        if session is not None:
            self._effects.append(EndSession(session, refusal))
        if not self._roster.workers:
            self.model.all_workers_left()


def _text(span: Span) -> str:
    return f"{span.start}:{span.end}"

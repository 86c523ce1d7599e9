"""A scheduler's membership with scripted workers, on virtual time and without any I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

from support.fake_members import MS, FakeWorker, S, model

from scheduler.core import PipelineFacts
from scheduler.limits import MembershipLimits
from scheduler.membership import Membership
from scheduler.messages import (
    AddPipeline,
    CloseStream,
    Command,
    DrainDone,
    Effect,
    EndSession,
    FailOldestStep,
    JoinEpoch,
    LeaveEpoch,
    LoadedSpan,
    LoadSpan,
    OpenStream,
    Registration,
    RemovePipeline,
    ResumePipeline,
    ShutdownWorker,
    SuspendPipeline,
    ToWorker,
)
from stagemesh.plan import Span

__all__ = ["LIMITS", "MS", "TERM", "FakeMesh", "FakeWorker", "S", "model", "two_stages"]

TERM = 7

LIMITS = MembershipLimits(
    settle_ns=5 * S,
    lease_ns=2 * S,
    reconnect_grace_ns=S // 4,
    join_timeout_ns=10 * S,
    max_model_len=None,
)


class FakeMesh:
    """`workers` are by id; `core` is what the core would know; `ended` are sessions that ended.

    Checks that whoever is told to keep its KV, or not lost, has the KV that the core counts on, and
    that blocks of two pipelines never meet.
    """

    def __init__(self, limits: MembershipLimits = LIMITS) -> None:
        self.members = Membership(limits, TERM)
        self.now_ns = 1000 * S
        self.workers: dict[str, FakeWorker] = {}
        self.core: dict[str, PipelineFacts] = {}
        self.suspended: set[str] = set()
        self.resumes: list[tuple[str, set[int]]] = []
        self.failed_steps: list[str] = []
        self.ended: dict[int, str | None] = {}
        self.drained: dict[int, DrainDone] = {}
        self.streams_open = True
        self._open: set[tuple[str, object]] = set()
        self._sessions = iter(range(1, 10**6))
        self._kv: dict[str, list[int]] = {}
        self._kv_serials = count()

    # ---- workers -------------------------------------------------------------------------------

    def register(
        self,
        worker_id: str,
        *,
        incarnation: int = 1,
        span: tuple[int, int] | None = None,
        loaded: LoadedSpan | None = None,
        worker: dict[str, Any] | None = None,
        **fields: Any,
    ) -> FakeWorker:
        """A process registers. Raises what it is refused with."""
        registration = Registration(
            worker_id=worker_id,
            incarnation=incarnation,
            address=f"{worker_id}:{incarnation}",
            model=fields.pop("model", model()),
            fixed_span=Span(*span) if span else None,
            loaded=loaded,
            scheduler_address="scheduler:1",
            **fields,
        )
        session = next(self._sessions)
        self.members.register(session, registration, self.now_ns)
        fake = FakeWorker(registration, session, loaded=loaded, **(worker or {}))
        self.workers[worker_id] = fake
        return fake

    def come_back(self, worker_id: str) -> FakeWorker:
        """The same process dials again, with what it holds."""
        old = self.workers[worker_id]
        registration = replace(old.registration, loaded=old.loaded)
        session = next(self._sessions)
        self.members.register(session, registration, self.now_ns)
        old.session = session
        return old

    def kill(self, worker_id: str) -> None:
        """The process is gone for good."""
        self.disconnect(worker_id)
        del self.workers[worker_id]

    def disconnect(self, worker_id: str) -> None:
        """The worker takes its epochs for over, as the scheduler does."""
        worker = self.workers[worker_id]
        if worker.memory:
            worker.memory.leave_all()
        self.members.disconnected(worker.session, self.now_ns)

    # ---- time ----------------------------------------------------------------------------------

    def run(self, *, deaf: Iterable[str] = ()) -> None:
        """Turns until nothing more happens. Everybody but `deaf` is heard of."""
        while True:
            for worker_id, worker in self.workers.items():
                if worker_id not in deaf:
                    self.members.heard(worker.session, self.now_ns)
            self.members.tick(self.now_ns)
            effects = self.members.take_effects()
            for effect in effects:
                self._apply(effect)
            if not effects:
                return

    def wait(self, duration_ns: int, *, deaf: Iterable[str] = ()) -> None:
        """Time passes, with a turn whenever one is due and at least every half second."""
        end_ns = self.now_ns + duration_ns
        while self.now_ns < end_ns:
            due_ns = self.members.wakeup_ns()
            assert due_ns is None or due_ns > self.now_ns, "a turn is due that changes nothing"
            self.now_ns = min(end_ns, self.now_ns + S // 2, *([due_ns] if due_ns else []))
            self.run(deaf=deaf)

    def _apply(self, effect: Effect) -> None:
        match effect:
            case ToWorker(session, command):
                self._obey(session, command)
            case EndSession(session, error):
                self.ended[session] = str(error) if error else None
            case OpenStream(pipeline_id, epoch, _):
                assert (pipeline_id, epoch) not in self._open
                self._open.add((pipeline_id, epoch))
                if self.streams_open:
                    self.members.epochs.stream_opened(pipeline_id, epoch)
            case CloseStream(pipeline_id, epoch):
                self._open.remove((pipeline_id, epoch))
            case AddPipeline(facts):
                assert facts.pipeline_id not in self.core
                self.core[facts.pipeline_id] = facts
                self._kv[facts.pipeline_id] = [-1] * facts.num_stages
                self._settle_kv(facts, range(facts.num_stages), 0)
            case SuspendPipeline(pipeline_id):
                assert pipeline_id in self.core
                self.suspended.add(pipeline_id)
            case ResumePipeline(facts, lost_stages):
                before = self.core[facts.pipeline_id]
                assert facts.epoch > before.epoch
                self.suspended.remove(facts.pipeline_id)
                self.core[facts.pipeline_id] = facts
                self.resumes.append((facts.pipeline_id, set(lost_stages)))
                self._settle_kv(facts, lost_stages, before.num_blocks)
            case DrainDone(drain_id):
                assert drain_id not in self.drained
                self.drained[drain_id] = effect
            case FailOldestStep(pipeline_id, _):
                assert pipeline_id in self.core.keys() - self.suspended
                self.failed_steps.append(pipeline_id)
            case RemovePipeline(pipeline_id):
                del self.core[pipeline_id]
                self.suspended.discard(pipeline_id)

    def _obey(self, session: int, command: Command) -> None:
        worker = next((w for w in self.workers.values() if w.session == session), None)
        if worker is None:  # a process that was replaced
            return
        worker.commands.append(command)
        if isinstance(command, ShutdownWorker):
            del self.workers[worker.registration.worker_id]
        if isinstance(command, LoadSpan):
            worker.loaded = worker.memory = None
            if worker.loads:
                self.finish_load(worker, command.span)
        elif isinstance(command, LeaveEpoch) and worker.memory:
            worker.memory.leave(command)
        elif isinstance(command, JoinEpoch):
            self._join(worker, command)

    def _join(self, worker: FakeWorker, join: JoinEpoch) -> None:
        assert worker.memory is not None, "nothing is loaded"
        worker.memory.join(join)
        if join.keep_kv:
            assert self._has_kv(worker, join), "KV that it has not"
        has_pages = bool(join.pages_from) and self._fetched(worker, join)
        if worker.joins:
            self.members.epochs.joined(
                worker.session, join.pipeline_id, join.epoch, has_pages=has_pages
            )

    def _has_kv(self, worker: FakeWorker, join: JoinEpoch) -> bool:
        """All that the core will count on."""
        kv = self._kv[join.pipeline_id][join.stage]
        num_blocks = min(self.core[join.pipeline_id].num_blocks, join.num_blocks)
        assert worker.memory is not None
        return worker.memory.has(join.pipeline_id, kv, num_blocks)

    def _fetched(self, worker: FakeWorker, join: JoinEpoch) -> bool:
        """Whether the KV came from the named worker."""
        assert join.pipeline_id in self.suspended, "pages move only where nothing is written"
        sources = [w for w in self.workers.values() if w.registration.address == join.pages_from]
        if not sources or not worker.fetches:
            return False
        assert sources[0].memory is not None
        assert self._has_kv(sources[0], join), "KV of something else"
        assert not sources[0].memory.is_in(join.pipeline_id, join.epoch)
        kv = self._kv[join.pipeline_id][join.stage]
        assert worker.memory is not None
        worker.memory.write(join.pipeline_id, kv, join.num_blocks)
        return True

    def _settle_kv(
        self, facts: PipelineFacts, lost_stages: Iterable[int], num_blocks_before: int
    ) -> None:
        """Who joined has what is computed from now on, and what was unless its stage is lost."""
        for worker in self.workers.values():
            for join in worker.joins_told:
                if (join.pipeline_id, join.epoch) != (facts.pipeline_id, facts.epoch):
                    continue
                assert worker.memory is not None
                assert join.num_blocks == facts.num_blocks
                is_last = join.stage + 1 == facts.num_stages
                assert join.num_log_blocks == facts.num_log_blocks[join.stage] or is_last
                kvs = self._kv[facts.pipeline_id]
                if join.stage in lost_stages:
                    kvs[join.stage] = next(self._kv_serials)
                else:
                    num_blocks = min(facts.num_blocks, num_blocks_before)
                    has_it = worker.memory.has(facts.pipeline_id, kvs[join.stage], num_blocks)
                    assert has_it, "a stage without its KV"
                worker.memory.write(facts.pipeline_id, kvs[join.stage], facts.num_blocks)

    def finish_load(self, worker: FakeWorker, span: Span) -> None:
        worker.loaded = LoadedSpan(
            span,
            worker.num_blocks,
            worker.block_size_tokens,
            weight_bytes=100 * span.num_layers,
            kv_block_bytes=span.num_layers,
            num_log_blocks=worker.num_log_blocks,
        )
        worker.begin_memory()
        self.members.span_loaded(worker.session, worker.loaded)

    # ---- what came of it -----------------------------------------------------------------------

    @property
    def serving(self) -> list[str]:
        return [p.pipeline_id for p in self.members.pipelines if p.is_serving]

    def stages(self, index: int = 0) -> list[str | None]:
        pipeline = self.members.pipelines[index]
        return [worker.worker_id if worker else None for worker in pipeline.workers]

    def spans(self, index: int = 0) -> list[tuple[int, int]]:
        return [(span.start, span.end) for span in self.members.pipelines[index].spans]


def two_stages(**changes: int) -> FakeMesh:
    """A mesh of workers "a" and "b" that serves."""
    mesh = FakeMesh(replace(LIMITS, num_stages=2, **changes))
    mesh.register("a")
    mesh.register("b")
    mesh.run()
    assert mesh.serving == ["p0"]
    return mesh

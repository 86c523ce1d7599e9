"""One pipeline of the mesh: its stages, who holds them, and the life of its epochs.

    idle -> joining -> serving -> idle -> ...

An epoch is joined by all members and by the scheduler's own stream to the first stage, or ended.
Sans-IO: effects go to `emit`, time comes in. What the KV of the members is worth is kept here:
while the same processes hold the same loads it stays valid from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from scheduler.agreement import MeshModel
from scheduler.core import PipelineFacts
from scheduler.messages import (
    CloseStream,
    Effect,
    FailOldestStep,
    JoinEpoch,
    LeaveEpoch,
    LoadedSpan,
    OpenStream,
    RemovePipeline,
    SuspendPipeline,
    ToWorker,
)
from scheduler.workers import Worker
from stagemesh.errors import InternalError, PeerLost, StageMeshError, StaleEpoch
from stagemesh.plan import Epoch, Span

_FIRST_BACKOFF_NS = 50_000_000
_MAX_BACKOFF_NS = 5_000_000_000
# Epochs in a row without a step done, after which neither KV nor the step is trusted.
_MAX_FAILURES = 2

_Owner = tuple[str, int, LoadedSpan | None]


class Phase(Enum):
    IDLE = "idle"
    JOINING = "joining"
    SERVING = "serving"


class MeshPipeline:
    def __init__(
        self, pipeline_id: str, spans: Sequence[Span], term: int, emit: Callable[[Effect], None]
    ) -> None:
        self.pipeline_id = pipeline_id
        self.spans = tuple(spans)
        self.workers: list[Worker | None] = [None] * len(spans)
        self.phase = Phase.IDLE
        self.epoch = Epoch(term, 0)
        self.has_served = False
        self.last_error: StageMeshError | None = None
        self.num_failures = 0
        self._emit = emit
        self._joined: set[int] = set()
        self._is_stream_open = False
        self._join_deadline_ns = 0
        self._retry_ns = 0
        # Whose KV the core counts on; None while the core does not know the pipeline.
        self._kv_owners: tuple[_Owner, ...] | None = None

    # ---- what others ask -----------------------------------------------------------------------

    @property
    def is_serving(self) -> bool:
        return self.phase is Phase.SERVING

    @property
    def num_stages(self) -> int:
        return len(self.spans)

    @property
    def members(self) -> list[Worker]:
        return [worker for worker in self.workers if worker is not None]

    @property
    def vacancies(self) -> list[int]:
        return [stage for stage, worker in enumerate(self.workers) if worker is None]

    @property
    def keeps_kv(self) -> bool:
        """Whether the core goes on with the KV that the members hold."""
        return self._kv_owners is not None

    def is_ready(self, stage: int) -> bool:
        """Whether the stage's worker is there with its span loaded."""
        worker = self.workers[stage]
        return (
            worker is not None
            and worker.session is not None
            and worker.loading is None
            and worker.holds(self.spans[stage])
        )

    def facts(self, model: MeshModel, max_model_len: int) -> PipelineFacts:
        assert model.summary is not None
        return PipelineFacts(
            pipeline_id=self.pipeline_id,
            epoch=self.epoch,
            num_stages=self.num_stages,
            num_blocks=self.num_blocks,
            block_size_tokens=self.block_size_tokens,
            max_model_len=max_model_len,
            model_identity=model.identity,
            dynamic_rope_length=model.summary.dynamic_rope_length,
        )

    def is_current(self, epoch: Epoch) -> bool:
        return self.phase is not Phase.IDLE and epoch == self.epoch

    @property
    def num_blocks(self) -> int:
        """Blocks of the smallest stage; 0 where one is not loaded."""
        loads = [worker.loaded for worker in self.members]
        return min((load.num_blocks if load else 0 for load in loads), default=0)

    @property
    def block_size_tokens(self) -> int:
        load = self.members[0].loaded if self.members else None
        return load.block_size_tokens if load else 0

    def wakeup_ns(self) -> int | None:
        """When `advance` has something to do, if nothing else happens."""
        if self.phase is Phase.JOINING:
            return self._join_deadline_ns
        if self.phase is Phase.IDLE and all(map(self.is_ready, range(self.num_stages))):
            return self._retry_ns
        return None

    # ---- members -------------------------------------------------------------------------------

    def place(self, stage: int, worker: Worker) -> None:
        assert self.workers[stage] is None
        self.workers[stage] = worker
        worker.pipeline = self

    def vacate(self, worker: Worker, error: StageMeshError, now_ns: int) -> None:
        """The worker is no longer of the pipeline; its KV is lost."""
        self.end_epoch(error, now_ns)
        self.drop_kv()
        self.workers[self.workers.index(worker)] = None
        worker.pipeline = None
        # Whoever takes the place need not wait for what its predecessor did.
        self.num_failures, self._retry_ns = 0, now_ns

    def drop_kv(self) -> None:
        if self._kv_owners is not None:
            self._kv_owners = None
            self._emit(RemovePipeline(self.pipeline_id))

    # ---- epochs --------------------------------------------------------------------------------

    def advance(self, now_ns: int, join_timeout_ns: int) -> None:
        """Begins an epoch when everybody is there and it is time."""
        is_due = self.phase is Phase.IDLE and now_ns >= self._retry_ns
        if is_due and all(map(self.is_ready, range(self.num_stages))):
            self._begin_epoch(now_ns + join_timeout_ns)

    def late_members(self, now_ns: int) -> list[Worker]:
        """Those who have not joined in time."""
        if self.phase is not Phase.JOINING or now_ns < self._join_deadline_ns:
            return []
        return [worker for worker in self.members if worker.number not in self._joined]

    def is_late(self, now_ns: int) -> bool:
        return self.phase is Phase.JOINING and now_ns >= self._join_deadline_ns

    def worker_joined(self, worker: Worker) -> None:
        self._joined.add(worker.number)

    def stream_opened(self) -> None:
        self._is_stream_open = True

    @property
    def has_joined(self) -> bool:
        """Whether the epoch that is being joined has everybody."""
        everybody = len(self._joined) == self.num_stages and self._is_stream_open
        return self.phase is Phase.JOINING and everybody

    def serve(self) -> bool:
        """Everybody has joined. Returns whether the core must take the pipeline as a new one."""
        is_new = self._kv_owners is None
        self._kv_owners = self._owners()
        self.phase = Phase.SERVING
        self.has_served = True
        return is_new

    def end_epoch(self, error: StageMeshError, now_ns: int) -> None:
        """Nothing more is done in the epoch; the next one begins after a while that grows."""
        if self.phase is Phase.IDLE:
            return
        was_serving, self.phase = self.is_serving, Phase.IDLE
        self.last_error = error
        for worker in self.members:
            self._tell(worker, LeaveEpoch(self.pipeline_id, self.epoch))
        self._emit(CloseStream(self.pipeline_id, self.epoch))
        backoff_ns = _FIRST_BACKOFF_NS << min(self.num_failures, 10)
        self._retry_ns = now_ns + min(_MAX_BACKOFF_NS, backoff_ns)
        self.num_failures += 1
        if self.num_failures > _MAX_FAILURES:
            if was_serving and not isinstance(error, PeerLost | StaleEpoch):
                undone = InternalError(f"the mesh could not execute the request: {error}")
                self._emit(FailOldestStep(self.pipeline_id, undone))
            self.drop_kv()
        if was_serving:
            self._emit(SuspendPipeline(self.pipeline_id))

    def step_done(self) -> None:
        """The epoch is worth something: whatever went wrong before is forgiven."""
        self.num_failures = 0
        self.last_error = None
        for worker in self.members:
            worker.num_failures = 0

    def _begin_epoch(self, deadline_ns: int) -> None:
        if self._kv_owners != self._owners():
            self.drop_kv()
        self.epoch = Epoch(self.epoch.term, self.epoch.n + 1)
        self.phase = Phase.JOINING
        self._joined = set()
        self._is_stream_open = False
        self._join_deadline_ns = deadline_ns
        addresses = [worker.registration.address for worker in self.members]
        for stage, worker in enumerate(self.members):
            is_last = stage + 1 == self.num_stages
            next_address = (
                worker.registration.scheduler_address if is_last else addresses[stage + 1]
            )
            self._tell(worker, self._join_command(stage, next_address))
        self._emit(OpenStream(self.pipeline_id, self.epoch, addresses[0]))

    def _join_command(self, stage: int, next_address: str) -> JoinEpoch:
        return JoinEpoch(
            pipeline_id=self.pipeline_id,
            epoch=self.epoch,
            stage=stage,
            num_stages=self.num_stages,
            next_address=next_address,
            num_blocks=self.num_blocks,
            keep_kv=self.keeps_kv,
        )

    def _owners(self) -> tuple[_Owner, ...]:
        return tuple(
            (worker.worker_id, worker.registration.incarnation, worker.loaded)
            for worker in self.members
        )

    def _tell(self, worker: Worker, command: JoinEpoch | LeaveEpoch) -> None:
        if worker.session is not None:
            self._emit(ToWorker(worker.session, command))

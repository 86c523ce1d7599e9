"""One pipeline of the mesh: its stages, who holds them, and the life of its epochs.

    idle -> joining -> serving -> idle -> ...

An epoch is joined by all members and by the scheduler's own stream to the first stage, or ended.
Sans-IO: effects go to `emit`, time comes in. A worker that is replaced costs the KV of its stage
alone: see holders.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import structlog

from scheduler.agreement import MeshModel
from scheduler.core import PipelineFacts
from scheduler.holders import KvHolders
from scheduler.mending import Mending
from scheduler.messages import (
    AddPipeline,
    CloseStream,
    Effect,
    FailOldestStep,
    JoinEpoch,
    LeaveEpoch,
    OpenStream,
    RemovePipeline,
    ResumePipeline,
    SuspendPipeline,
    ToWorker,
)
from scheduler.patience import Patience
from scheduler.trials import Trials
from scheduler.workers import Worker
from stagemesh.errors import InternalError, StageMeshError
from stagemesh.plan import Epoch, Span

log = structlog.get_logger()


class Phase(Enum):
    IDLE = "idle"
    JOINING = "joining"
    SERVING = "serving"


class MeshPipeline:
    def __init__(
        self,
        pipeline_id: str,
        spans: Sequence[Span],
        term: int,
        emit: Callable[[Effect], None],
        patience: Patience,
    ) -> None:
        self.pipeline_id = pipeline_id
        self.spans = tuple(spans)
        self.workers: list[Worker | None] = [None] * len(spans)
        self.phase = Phase.IDLE
        self.epoch = Epoch(term, 0)
        # Room for KV in the latest epoch that served; 0 before.
        self.num_tokens_served = 0
        self.last_error: StageMeshError | None = None
        self.mending: Mending | None = None
        self.patience = patience
        self.trials = Trials()
        self.holders = KvHolders(len(spans))
        self._emit = emit
        self._is_successor = False
        # Stages that joined this epoch, and whether they have their KV.
        self._joined: dict[int, bool] = {}
        self._is_stream_open = False
        self._had_step = False
        self._join_deadline_ns = 0
        self._retry_ns = 0

    # ---- what others ask -----------------------------------------------------------------------

    @property
    def is_serving(self) -> bool:
        return self.phase is Phase.SERVING

    @property
    def has_served(self) -> bool:
        return self.num_tokens_served > 0

    @property
    def is_established(self) -> bool:
        """Whether its cut stays though others come: it served, or goes on for one that did."""
        return self.has_served or self._is_successor

    @property
    def num_stages(self) -> int:
        return len(self.spans)

    @property
    def members(self) -> list[Worker]:
        return [worker for worker in self.workers if worker is not None]

    @property
    def vacancies(self) -> list[int]:
        return [stage for stage, worker in enumerate(self.workers) if worker is None]

    def is_ready(self, stage: int) -> bool:
        """Whether the stage's worker is there with its span loaded."""
        worker = self.workers[stage]
        return (
            worker is not None
            and worker.session is not None
            and worker.loading is None
            and worker.holds(self.spans[stage])
        )

    @property
    def is_complete(self) -> bool:
        return all(map(self.is_ready, range(self.num_stages)))

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
            num_log_blocks=self._num_log_blocks(),
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

    def is_out_of_patience(self, now_ns: int) -> bool:
        """Whether it is to be cut anew, since nobody comes for a place of it."""
        is_lacking = self.is_established and bool(self.vacancies)
        return self.patience.look(now_ns, is_lacking=is_lacking, is_whole=self.is_complete)

    def wakeup_ns(self) -> int | None:
        """When `advance` has something to do, if nothing else happens."""
        if self.phase is Phase.JOINING:
            return self._join_deadline_ns
        return self._retry_ns if self.phase is Phase.IDLE and self.is_complete else None

    # ---- members -------------------------------------------------------------------------------

    def succeed(self, broken: MeshPipeline) -> None:
        """Mends what was broken by another cut of the layers."""
        self._is_successor = True
        if broken.mending is not None:
            reason = f"{broken.mending.reason}; the layers were cut anew"
            self.mending = Mending(reason, broken.mending.began_ns)

    def place(self, stage: int, worker: Worker) -> None:
        assert self.workers[stage] is None
        self.workers[stage] = worker
        worker.pipeline = self

    def vacate(self, worker: Worker, error: StageMeshError, now_ns: int) -> None:
        """The worker is no longer of the pipeline. What KV it has may be of use yet."""
        self.end_epoch(error, now_ns)
        self.workers[self.workers.index(worker)] = None
        worker.pipeline = None
        self.trials.begin_anew()
        self._retry_ns = now_ns

    def drop_kv(self) -> None:
        """Nothing of it is worth anything: what it was of is computed again."""
        if self.holders.is_counted_on:
            self.holders.forget_all()
            self._emit(RemovePipeline(self.pipeline_id))

    # ---- epochs --------------------------------------------------------------------------------

    def advance(self, now_ns: int, join_timeout_ns: int) -> bool:
        """Whether an epoch begins now: everybody is there and it is time."""
        if self.phase is not Phase.IDLE:
            return False
        is_complete = self.is_complete
        if self.mending is not None and self.mending.joined_ns is None:
            self.mending.filled_ns = (self.mending.filled_ns or now_ns) if is_complete else None
        if not is_complete or now_ns < self._retry_ns:
            return False
        self._begin_epoch(now_ns + join_timeout_ns)
        return True

    def late_members(self, now_ns: int) -> list[Worker]:
        """Those who have not joined in time."""
        if not self.is_late(now_ns):
            return []
        places = enumerate(self.workers)
        return [each for stage, each in places if each is not None and stage not in self._joined]

    def is_late(self, now_ns: int) -> bool:
        return self.phase is Phase.JOINING and now_ns >= self._join_deadline_ns

    def worker_joined(self, worker: Worker) -> None:
        stage = self.workers.index(worker)
        self._joined[stage] = self.holders.holds(stage, worker)

    def stream_opened(self) -> None:
        self._is_stream_open = True

    @property
    def has_joined(self) -> bool:
        """Whether the epoch that is being joined has everybody."""
        everybody = len(self._joined) == self.num_stages and self._is_stream_open
        return self.phase is Phase.JOINING and everybody

    def serve(self, facts: PipelineFacts, now_ns: int) -> None:
        """Everybody has joined."""
        lost_stages = frozenset(stage for stage, has_kv in self._joined.items() if not has_kv)
        if self.holders.is_counted_on:
            self._emit(ResumePipeline(facts, lost_stages))
        else:
            self._emit(AddPipeline(facts))
        self.holders.settle(self.members)
        self.phase = Phase.SERVING
        self.num_tokens_served = facts.num_blocks * facts.block_size_tokens
        if self.mending is not None and self.mending.joined_ns is None:
            self.mending.joined_ns = now_ns
            self.mending.num_lost_stages = len(lost_stages)

    def end_epoch(self, error: StageMeshError, now_ns: int) -> None:
        """Nothing more is done in the epoch; the next one begins after a while that grows."""
        if self.phase is Phase.IDLE:
            return
        was_serving, self.phase = self.is_serving, Phase.IDLE
        self.last_error = error
        for worker in self.members:
            self._tell(worker, LeaveEpoch(self.pipeline_id, self.epoch))
        self._emit(CloseStream(self.pipeline_id, self.epoch))
        had_step, self._had_step = self._had_step, False
        self._retry_ns = now_ns + self.trials.failed(error, had_step=had_step)
        if was_serving:
            self.mending = Mending(str(error), now_ns)
            self._suspend(error)

    def step_sent(self) -> None:
        self._had_step = True

    def step_done(self) -> None:
        """The epoch is worth something: whatever went wrong before is forgiven."""
        self._had_step = False
        self.trials.succeeded()
        self.last_error = None
        for worker in self.members:
            worker.conduct.num_failures = 0

    def rebuilt(self, num_tokens: int, now_ns: int) -> None:
        """Nothing is lacking any more."""
        assert self.mending is not None
        self.mending.rebuilt_ns, self.mending.num_tokens_rebuilt = now_ns, num_tokens
        log.info("a pipeline is mended", pipeline=self.pipeline_id, **self.mending.summary())

    # ---- inside --------------------------------------------------------------------------------

    def _suspend(self, error: StageMeshError) -> None:
        """What is to end must be said while the core still has the steps in flight."""
        if self.trials.is_step_hopeless:
            undone = InternalError(f"the mesh could not execute the request: {error}")
            self._emit(FailOldestStep(self.pipeline_id, undone))
        if self.trials.is_kv_suspect:
            self.drop_kv()
        else:
            self._emit(SuspendPipeline(self.pipeline_id))
        if self.trials.is_step_hopeless:
            self.trials.gave_up()

    def _begin_epoch(self, deadline_ns: int) -> None:
        self.epoch = Epoch(self.epoch.term, self.epoch.n + 1)
        self.phase = Phase.JOINING
        self._joined = {}
        self._is_stream_open = self._had_step = False
        self._join_deadline_ns = deadline_ns
        addresses = [worker.registration.address for worker in self.members]
        for stage, worker in enumerate(self.members):
            is_last = stage + 1 == self.num_stages
            next_address = (
                worker.registration.scheduler_address if is_last else addresses[stage + 1]
            )
            self._tell(worker, self._join_command(stage, worker, next_address))
        self._emit(OpenStream(self.pipeline_id, self.epoch, addresses[0]))

    def _join_command(self, stage: int, worker: Worker, next_address: str) -> JoinEpoch:
        return JoinEpoch(
            pipeline_id=self.pipeline_id,
            epoch=self.epoch,
            stage=stage,
            num_stages=self.num_stages,
            next_address=next_address,
            num_blocks=self.num_blocks,
            keep_kv=self.holders.holds(stage, worker),
        )

    def _num_log_blocks(self) -> tuple[int, ...]:
        """What a last stage sends is nobody's input."""
        loads = [worker.loaded for worker in self.members]
        return (*(load.num_log_blocks if load else 0 for load in loads[:-1]), 0)

    def _tell(self, worker: Worker, command: JoinEpoch | LeaveEpoch) -> None:
        if worker.session is not None:
            self._emit(ToWorker(worker.session, command))

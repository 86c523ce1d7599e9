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

from scheduler.core import PipelineFacts
from scheduler.holders import KvHolders
from scheduler.join_commands import join_commands
from scheduler.joining import Handovers, Joining
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
from scheduler.stages import Room, Stages
from scheduler.trials import Trials
from scheduler.workers import Worker
from stagemesh.errors import InternalError, PeerLost, StageMeshError
from stagemesh.plan import Epoch, Span

log = structlog.get_logger()


# How much longer a join may take in which pages are fetched.
_PAGES_FACTOR = 4
# What a pipeline keeps of its blocks, if others are to have some of them.
_LEAST_DIVISOR = 4


class Phase(Enum):
    IDLE = "idle"
    JOINING = "joining"
    SERVING = "serving"


class MeshPipeline(Stages):
    def __init__(
        self,
        pipeline_id: str,
        spans: Sequence[Span],
        term: int,
        emit: Callable[[Effect], None],
        patience: Patience,
    ) -> None:
        super().__init__(spans)
        self.pipeline_id = pipeline_id
        self.phase = Phase.IDLE
        self.epoch = Epoch(term, 0)
        # Room for KV in the latest epoch that served; 0 before.
        self.num_tokens_served = 0
        # With fewer it would not hold a context that it held, or hardly any.
        self.least_blocks = 1
        self.last_error: StageMeshError | None = None
        self.mending: Mending | None = None
        self.patience = patience
        self.trials = Trials()
        self.holders = KvHolders(len(spans), lambda worker: worker.end_of(self))
        # Of whoever had the place first: sums of another number of ranks differ in their last bits.
        self.ranks: list[int | None] = [None] * len(spans)
        self._emit = emit
        self._is_successor = False
        self._joining = Joining(len(spans))
        self.handovers = Handovers(lambda worker: worker.let_go(self))
        self._had_step = False
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
    def epoch_room(self) -> Room:
        """Of the latest epoch."""
        return self._joining.room

    def exceeds(self, worker: Worker) -> bool:
        """Whether the epoch takes more of the worker's memory than is left to the pipeline."""
        stage = self.workers.index(worker)
        return self.phase is not Phase.IDLE and not self.epoch_room.is_within(stage, worker)

    def is_current(self, epoch: Epoch) -> bool:
        return self.phase is not Phase.IDLE and epoch == self.epoch

    def is_out_of_patience(self, now_ns: int) -> bool:
        """Whether it is to be cut anew, since nobody comes for a place of it."""
        is_lacking = self.is_established and bool(self.vacancies)
        return self.patience.look(now_ns, is_lacking=is_lacking, is_whole=self.is_complete)

    def wakeup_ns(self) -> int | None:
        """When `advance` has something to do, if nothing else happens."""
        if self.phase is Phase.JOINING:
            return self._joining.deadline_ns
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
        self.ranks[stage] = self.ranks[stage] or worker.registration.tensor_parallel
        worker.let_in(self, self.holders.end_of_kv(stage, worker))

    def vacate(self, worker: Worker, error: StageMeshError, now_ns: int) -> None:
        """The worker is no longer of the pipeline. What KV it has may be of use yet."""
        self._leave(worker, error, now_ns)
        worker.let_go(self)

    def hand_over(self, stage: int, successor: Worker, now_ns: int) -> None:
        """The stage moves to a worker that has its layers, and fetches the KV."""
        old = self.workers[stage]
        assert old is not None
        has_kv = self.holders.holds(stage, old)
        self._had_step = False  # this end is no failure of anybody's
        news = f"worker {old.worker_id} hands over to {successor.worker_id}"
        self._leave(old, PeerLost(news), now_ns)
        if has_kv:
            self.handovers.begin(stage, old)
        else:
            old.let_go(self)
        self.place(stage, successor)

    def renew(self, reason: str, now_ns: int) -> None:
        """An epoch with other room is to follow. That is no failure of anybody's either."""
        log.info("an epoch is renewed", pipeline=self.pipeline_id, n=self.epoch.n, reason=reason)
        self._had_step = False
        self.end_epoch(PeerLost(reason), now_ns)
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
        self._begin_epoch(now_ns + join_timeout_ns * (_PAGES_FACTOR if self.handovers else 1))
        return True

    def late_members(self, now_ns: int) -> list[Worker]:
        """Those who have not joined in time."""
        if not self.is_late(now_ns):
            return []
        places, joined = enumerate(self.workers), self._joining.stages
        return [each for stage, each in places if each is not None and stage not in joined]

    def is_late(self, now_ns: int) -> bool:
        return self.phase is Phase.JOINING and now_ns >= self._joining.deadline_ns

    def worker_joined(self, worker: Worker, *, has_pages: bool) -> None:
        stage = self.workers.index(worker)
        if has_pages and self.mending is not None:
            self.mending.num_blocks_moved += self.handovers.num_blocks
        self._joining.stages[stage] = has_pages or self.holders.holds(stage, worker)

    def stream_opened(self) -> None:
        self._joining.is_stream_open = True

    @property
    def has_joined(self) -> bool:
        """Whether the epoch that is being joined has everybody."""
        return self.phase is Phase.JOINING and self._joining.is_done

    def serve(self, facts: PipelineFacts, now_ns: int) -> None:
        """Everybody has joined."""
        lost_stages = self._joining.lost_stages
        if self.holders.is_counted_on:
            self._emit(ResumePipeline(facts, lost_stages))
        else:
            self._emit(AddPipeline(facts))
        self.holders.settle(self.members, self.epoch_room)
        self.handovers.done()
        self.phase = Phase.SERVING
        self.num_tokens_served = facts.num_blocks * facts.block_size_tokens
        longest = facts.num_blocks_for(facts.capacity_tokens)
        self.least_blocks = max(longest, facts.num_blocks // _LEAST_DIVISOR)
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

    def _leave(self, worker: Worker, error: StageMeshError, now_ns: int) -> None:
        self.end_epoch(error, now_ns)
        stage = self.workers.index(worker)
        self.workers[stage] = None
        self.handovers.give_up(stage)
        self.trials.begin_anew()
        self._retry_ns = now_ns

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
        sources = self.handovers.sources
        keepers = [sources.get(stage, worker) for stage, worker in enumerate(self.members)]
        room = self.holders.left_of(self.room, keepers)
        self._joining = Joining(self.num_stages, deadline_ns, room)
        self._had_step = False
        for worker, join in zip(self.members, join_commands(self), strict=True):
            self._tell(worker, join)
        first_address = self.members[0].registration.address
        self._emit(OpenStream(self.pipeline_id, self.epoch, first_address))

    def _tell(self, worker: Worker, command: JoinEpoch | LeaveEpoch) -> None:
        if worker.session is not None:
            self._emit(ToWorker(worker.session, command))

"""What becomes of the pipelines' epochs: who joined, what broke, and who is to blame.

Words about an epoch that is over are ignored. Sans-IO, a part of membership.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from scheduler.agreement import MeshModel
from scheduler.core import PipelineFacts
from scheduler.formation import Formation
from scheduler.limits import MembershipLimits
from scheduler.pipelines import MeshPipeline
from scheduler.places import MAX_FAILURES, other_block_sizes
from scheduler.roster import Roster
from scheduler.watch import Overdue
from scheduler.workers import Worker
from stagemesh.errors import InternalError, PeerLost, StageMeshError
from stagemesh.plan import Epoch

log = structlog.get_logger()


class Epochs:
    def __init__(
        self, limits: MembershipLimits, model: MeshModel, roster: Roster, formation: Formation
    ) -> None:
        self._limits = limits
        self._model = model
        self._roster = roster
        self._formation = formation
        # Whether anything was said since this was last cleared.
        self.has_news = False

    # ---- what workers say ----------------------------------------------------------------------

    def joined(
        self, session: int, pipeline_id: str, epoch: Epoch, *, has_pages: bool = False
    ) -> None:
        """Whether that was all comes out at the next `settle`."""
        worker = self._roster.on(session)
        pipeline = self._current(pipeline_id, epoch)
        if worker is not None and pipeline is not None and worker in pipeline.workers:
            pipeline.worker_joined(worker, has_pages=has_pages)

    def broken(
        self,
        session: int,
        pipeline_id: str,
        epoch: Epoch,
        error: StageMeshError,
        peer_address: str,
        now_ns: int,
    ) -> None:
        """A worker saw the epoch end, through the neighbour at `peer_address` or by itself."""
        worker = self._roster.on(session)
        pipeline = self._current(pipeline_id, epoch)
        if worker is None or pipeline is None or worker not in pipeline.workers:
            return
        # Where the peer is the scheduler itself, nobody is blamed.
        blamed = peer_address or worker.registration.address
        culprits = [m for m in pipeline.members if m.registration.address == blamed]
        self._end(pipeline, culprits, error, now_ns)

    # ---- what the driver says ------------------------------------------------------------------

    def stream_opened(self, pipeline_id: str, epoch: Epoch) -> None:
        """The scheduler's own stream to the first stage."""
        if pipeline := self._current(pipeline_id, epoch):
            pipeline.stream_opened()

    def stream_broken(
        self, pipeline_id: str, epoch: Epoch, error: StageMeshError, now_ns: int
    ) -> None:
        """A stream between the scheduler and a stage, of steps or of results."""
        if pipeline := self._current(pipeline_id, epoch):
            self._end(pipeline, [], error, now_ns)

    def step_overdue(self, overdue: Overdue, now_ns: int) -> None:
        """A step did not come back. Where one stage alone has steps to do, it is to blame."""
        pipeline = self._current(overdue.pipeline_id, overdue.epoch)
        if pipeline is None:
            return
        busy = [worker for worker in pipeline.members if worker.stats.steps_queued > 0]
        limit_s = overdue.limit_ns / 1e9
        error = InternalError(f"step {overdue.step} did not come back within {limit_s:.3g} s")
        self._end(pipeline, busy if len(busy) == 1 else [], error, now_ns)

    def step_sent(self, pipeline_id: str) -> None:
        if pipeline := self._formation.pipeline(pipeline_id):
            pipeline.step_sent()

    def step_done(self, pipeline_id: str) -> None:
        if pipeline := self._formation.pipeline(pipeline_id):
            pipeline.step_done()

    @property
    def rebuilding(self) -> list[MeshPipeline]:
        """Pipelines of which it is to be said when nothing is lacking any more."""
        pipelines = self._formation.pipelines
        return [each for each in pipelines if each.mending and each.mending.is_rebuilding]

    # ---- what membership says ------------------------------------------------------------------

    def settle(self, now_ns: int, max_model_len: int) -> None:
        """Epochs that all have joined begin to serve; joins that take too long end."""
        for pipeline in self._formation.pipelines:
            if pipeline.has_joined:
                self._model.pin()
                pipeline.serve(self._facts(pipeline, max_model_len), now_ns)
                n = pipeline.epoch.n
                log.info("a pipeline serves", pipeline=pipeline.pipeline_id, n=n)
            elif pipeline.is_late(now_ns):
                self._end_late(pipeline, now_ns)

    def begin(self, now_ns: int) -> list[tuple[Worker, StageMeshError]]:
        """Begins what can begin; returns workers that fit no pipeline."""
        unfit: list[tuple[Worker, StageMeshError]] = []
        for pipeline in self._formation.pipelines:
            unfit += (others := other_block_sizes(pipeline))
            if not others and pipeline.advance(now_ns, self._limits.join_timeout_ns):
                self._formation.epoch_began(pipeline)
        return unfit

    # ---- inside --------------------------------------------------------------------------------

    def _facts(self, pipeline: MeshPipeline, max_model_len: int) -> PipelineFacts:
        """Of the epoch that all have joined: workers may be worth more, or less, by now."""
        assert self._model.summary is not None
        return PipelineFacts(
            pipeline_id=pipeline.pipeline_id,
            epoch=pipeline.epoch,
            num_stages=pipeline.num_stages,
            num_blocks=pipeline.epoch_room.num_blocks,
            block_size_tokens=pipeline.block_size_tokens,
            max_model_len=max_model_len,
            model_identity=self._model.identity,
            dynamic_rope_length=self._model.summary.dynamic_rope_length,
            num_log_blocks=pipeline.epoch_room.num_log_blocks,
            adapters=frozenset(self._model.adapters.values()),
        )

    def _current(self, pipeline_id: str, epoch: Epoch) -> MeshPipeline | None:
        """The pipeline, if `epoch` is the one that it joins or serves; else the word is late."""
        self.has_news = True
        pipeline = self._formation.pipeline(pipeline_id)
        return pipeline if pipeline is not None and pipeline.is_current(epoch) else None

    def _end_late(self, pipeline: MeshPipeline, now_ns: int) -> None:
        """Who does not join for so long is as good as one that failed often."""
        late = pipeline.late_members(now_ns)
        for worker in late:
            worker.conduct.num_failures += MAX_FAILURES - 1
        names = ", ".join(worker.worker_id for worker in late) or "the first stage's stream"
        self._end(pipeline, late, PeerLost(f"{names} did not join in time"), now_ns)

    def _end(
        self,
        pipeline: MeshPipeline,
        culprits: Sequence[Worker],
        error: StageMeshError,
        now_ns: int,
    ) -> None:
        """Through the culprits, where they are known. One that goes on failing is an error."""
        for worker in culprits:
            worker.conduct.num_failures += 1
        most = max((worker.conduct.num_failures for worker in culprits), default=0)
        (log.error if most >= MAX_FAILURES else log.warning)(
            "an epoch ended",
            pipeline=pipeline.pipeline_id,
            n=pipeline.epoch.n,
            through=[worker.worker_id for worker in culprits],
            times_in_a_row=most,
            code=error.code,
            reason=str(error),
        )
        pipeline.end_epoch(error, now_ns)

"""A worker's part in one epoch of a pipeline: takes steps in order, executes, pushes on.

The rule: every step of the epoch once, in order; duplicates, gaps and foreign epochs are refused.
Whatever breaks ends the epoch here and is reported once; the scheduler decides what comes next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from stage_worker.device_thread import DeviceThread, Outcome, as_mesh_error
from stage_worker.kv_claims import KvClaim
from stage_worker.page_fetch import fetch_into
from stage_worker.place import EpochReports, Patience, Place
from stage_worker.stats import Stats
from stage_worker.tenancy import Joining
from stage_worker.watchdog import FIRST_STEP_LIMIT_S, step_limit_s
from stagemesh.errors import (
    InternalError,
    ProtocolError,
    QueueFull,
    StageMeshError,
    StaleEpoch,
    StepOutOfOrder,
)
from stagemesh.page_frames import PageBatch
from stagemesh.plan import HopTiming, StepResult
from stagemesh.transport import Hello, Message, PushStream, StepFrame, open_push_stream

if TYPE_CHECKING:
    from stage_worker.executor import StageOutput

# A neighbour may be in a long step; the scheduler ends a join that takes too long before this does.
OPEN_TIMEOUT_S = 30.0
# The scheduler has few steps in flight; these only bound what a peer could do to our memory.
MAX_QUEUED_STEPS = 64
MAX_QUEUED_BYTES = 2**30

log = structlog.get_logger()


class EpochMember:
    """`run` it once; `end` makes it stop at once. Steps come in by `receive`."""

    def __init__(
        self,
        place: Place,
        claim: KvClaim,
        device: DeviceThread,
        stats: Stats,
        own_address: str,
        reports: EpochReports,
        on_accepting: Callable[[], None],
        patience: Patience,
    ) -> None:
        self.place = place
        self.claim = claim
        self.held = claim.held
        self.accepting = False
        self.has_incoming = False
        self.joined = False
        self._device = device
        self._stats = stats
        self._own_address = own_address
        self._reports = reports
        self._on_accepting = on_accepting
        self._patience = patience
        self._seat = stats.occupancy.join()
        self._began_ns = time.perf_counter_ns()
        self._next_step = 0
        self._executing: asyncio.Queue[tuple[StepFrame, asyncio.Future[Outcome[StageOutput]]]]
        self._executing = asyncio.Queue(MAX_QUEUED_STEPS)
        self._queued_bytes = 0
        self._ended: asyncio.Future[StageMeshError] = asyncio.get_running_loop().create_future()
        self._device_may_go_on = True  # read by the device thread

    @property
    def ended(self) -> bool:
        return self._ended.done()

    async def run(self) -> None:
        """Joins, then pushes outputs on, until the epoch ends; lets go of its stream."""
        work = asyncio.create_task(self._join_and_forward())
        try:
            either: list[asyncio.Future[Any]] = [work, self._ended]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and (bug := work.exception()) is not None:
                log.error("an epoch failed", exc_info=bug)
                self.fail(InternalError(f"an epoch failed: {bug!r}"))
        finally:
            self.end()
            work.cancel()
            await asyncio.wait([work])

    def receive(self, message: Message) -> None:
        """Queues a step for the device. Raises what ends the stream that it came by."""
        if self.ended:
            raise self._ended.result()
        if not isinstance(message, StepFrame):
            raise ProtocolError("a result was sent to a stage")
        step = message.step
        if (step.pipeline_id, step.epoch) != self.place.key:
            raise StaleEpoch(f"a step of {step.epoch} came by a stream of {self.place.epoch}")
        if step.step != self._next_step:
            self.fail(StepOutOfOrder(f"step {step.step} came, {self._next_step} was due"))
            raise self._ended.result()
        num_bytes = len(message.payload)
        if self._executing.full() or self._queued_bytes + num_bytes > MAX_QUEUED_BYTES:
            self.fail(QueueFull(f"step {step.step} is one more than this stage has room for"))
            raise self._ended.result()
        self._next_step += 1
        self._queued_bytes += num_bytes
        cost = self.held.cost
        work = cost.work_of(step, self.place.stage)
        outcome = self._device.submit(
            lambda: self._execute(message),
            name=f"step {step.step} of {step.pipeline_id}",
            # Asked while it runs: steps that were queued before it have been learned from by then.
            limit_s=lambda: step_limit_s(cost, work, self._patience.step_timeout_s),
        )
        self._executing.put_nowait((message, outcome))

    def fail(self, error: StageMeshError, peer_address: str = "") -> None:
        """Ends the epoch here and reports it; only the first error counts."""
        if self.ended:
            return
        self._end(error)
        self._reports.broken(self.place, error, peer_address)

    def end(self) -> None:
        """Ends the epoch here, in silence: queued steps are dropped, none will touch a page."""
        if not self.ended:
            self._end(StaleEpoch(f"{self.place.epoch} of {self.place.pipeline_id} has ended here"))

    def _end(self, error: StageMeshError) -> None:
        self._device_may_go_on = False
        self._seat.leave()
        self._ended.set_result(error)

    async def _join_and_forward(self) -> None:
        stream = await self._join()
        if stream is None:
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(stream))
                has_pages = await fetch_into(
                    self._write_pages,
                    self.held.span,
                    self.place,
                    self._device,
                    self._stats,
                    self._patience.ping_timeout_s,
                )
                self.joined = True
                self._reports.joined(self.place, has_pages)
                group.create_task(self._forward(stream))
        finally:
            await stream.close()

    async def _join(self) -> PushStream | None:
        place, executor = self.place, self.held.executor
        joining = Joining(
            pipeline_id=place.pipeline_id,
            stage=place.stage,
            num_stages=place.num_stages,
            blocks=self.claim.blocks,
            keep_kv=place.keep_kv,
        )
        try:
            await self._device.run(
                lambda: executor.join(joining), name="a join", limit_s=FIRST_STEP_LIMIT_S
            )
        except StageMeshError as error:
            self.fail(error)
            return None
        self.accepting = True
        self._on_accepting()
        hello = Hello(place.pipeline_id, place.epoch, place.stage + 1, self._own_address)
        try:
            return await open_push_stream(
                place.next_address,
                hello,
                timeout_s=OPEN_TIMEOUT_S,
                traffic=self._stats.traffic,
                meter=self._seat,
                ping_timeout_s=self._patience.ping_timeout_s,
            )
        except StageMeshError as error:
            self.fail(error, place.next_address)
            return None

    async def _forward(self, stream: PushStream) -> None:
        """Pushes outputs on, in the order of the steps."""
        while True:
            frame, future = await self._executing.get()
            outcome = await future
            self._queued_bytes -= len(frame.payload)
            if outcome.error is not None:
                self.fail(self._explained(outcome.error, frame))
                return
            try:
                await stream.send(self._output(frame, outcome))
            except StageMeshError as error:
                self.fail(error, self.place.next_address)
                return

    async def _watch(self, stream: PushStream) -> None:
        self.fail(await stream.wait_broken(), self.place.next_address)

    def _execute(self, frame: StepFrame) -> StageOutput:
        """On the device thread. After a failure no later step of the epoch is executed."""
        if not self._device_may_go_on:
            raise StaleEpoch("the epoch ended before the step's turn came")
        try:
            with self._seat.computing():
                return self.held.executor.execute(frame.step, frame.payload, frame.dtype)
        except BaseException:
            self._device_may_go_on = False
            raise

    def _write_pages(self, batch: PageBatch) -> None:
        """On the device thread. Once the epoch has ended the blocks may be another pipeline's."""
        if not self._device_may_go_on:
            raise StaleEpoch("the epoch ended before its pages could be written")
        self.held.executor.pages.write(batch, self.claim.blocks)

    def _output(self, frame: StepFrame, outcome: Outcome[StageOutput]) -> Message:
        output = outcome.unwrap()
        step = frame.step
        timing = HopTiming(
            stage=self.place.stage,
            receive_ns=frame.receive_ns,
            queue_ns=outcome.queue_ns,
            compute_ns=outcome.run_ns,
            idle_ns=outcome.idle_ns,
            received_bytes=len(frame.payload),
            started_ns=max(0, outcome.start_ns - self._began_ns),
        )
        self.held.cost.observe(self.held.cost.work_of(step, timing.stage), timing.compute_ns / 1e9)
        self._stats.count_step(len(step.rows), step.num_tokens, timing)
        timings = (*frame.timings, timing)
        if self.place.stage + 1 == self.place.num_stages:
            return StepResult(step.pipeline_id, step.epoch, step.step, output.rows, timings)
        return StepFrame(
            step=step,
            payload=output.payload,
            dtype=output.dtype,
            num_tokens=output.num_tokens,
            hidden_size=output.hidden_size,
            timings=timings,
        )

    def _explained(self, error: Exception, frame: StepFrame) -> StageMeshError:
        known = as_mesh_error(error)
        if known is not error:
            log.error("a step could not be executed", step=frame.step.step, exc_info=error)
        told = f"stage {self.place.stage} could not execute step {frame.step.step}: {known}"
        return type(known)(told)

"""Drives the core and membership: time, results and requests in; steps, tokens and commands out.

Everything that touches the two happens on one event loop, without waiting, inside `acting`; what
follows from it is done in the next turn, so that whatever arrives together is planned together.
A bug in either ends the process, loudly: a scheduler that goes on with a broken state is worse.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import structlog

from scheduler.core import Finished, PipelineFacts, SchedulerCore, Tokens
from scheduler.limits import DriverTimeouts
from scheduler.links import StepLinks
from scheduler.membership import Membership
from scheduler.mesh_view import MeshView, view_of
from scheduler.messages import (
    AddPipeline,
    CloseStream,
    Command,
    DrainDone,
    Effect,
    EndSession,
    FailOldestStep,
    JoinEpoch,
    OpenStream,
    RemovePipeline,
    Resign,
    ResumePipeline,
    SuspendPipeline,
    ToWorker,
)
from scheduler.placement import StageCosts
from scheduler.tracing import Tracer
from scheduler.watch import StepWatch
from stagemesh.errors import InternalError, StageMeshError
from stagemesh.plan import Epoch, Span, StepResult

log = structlog.get_logger()


class Peers(Protocol):
    """The sessions of workers and gateways, as the driver speaks to them. Nothing here waits."""

    def tell_worker(self, session: int, command: Command) -> None: ...
    def end_worker(self, session: int, error: StageMeshError | None) -> None: ...
    def deliver(self, event: Tokens | Finished) -> None: ...
    def mesh_changed(self, view: MeshView) -> None: ...
    def drain_done(self, done: DrainDone) -> None: ...

    def end_silent_gateways(self, now_ns: int) -> int | None:
        """Returns when the next lease ends."""

    def was_deaf(self, duration_ns: int) -> None:
        """Gateways could not be heard for so long."""


class Driver:
    """`run` it once; others call core and membership inside `acting`. Is the LinkOwner."""

    def __init__(
        self, core: SchedulerCore, membership: Membership, timeouts: DriverTimeouts
    ) -> None:
        self.core = core
        self.membership = membership
        self.view = view_of(membership)
        self.tracer = Tracer()
        self._timeouts = timeouts
        self._watch = StepWatch(
            round(timeouts.lease_s * 1e9), round(timeouts.canary_interval_s * 1e9)
        )
        self._awake_ns = time.monotonic_ns()
        self._wake = asyncio.Event()
        self._bug: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._links: StepLinks | None = None
        self._gateway_lease_ns: int | None = None

    @contextlib.contextmanager
    def acting(self) -> Iterator[int]:
        """Around every call of core and membership: gives `now_ns`, has a turn follow.

        Errors of the tree go through; anything else is a bug and ends the process.
        """
        try:
            yield time.monotonic_ns()
        except StageMeshError:
            raise
        except Exception as error:
            if not self._bug.done():
                self._bug.set_exception(error)
            raise InternalError(f"the scheduler failed: {error!r}") from error
        finally:
            self._wake.set()

    async def run(self, peers: Peers) -> None:
        """Until cancelled. Raises what a bug raised, or why there is no use in going on."""
        async with asyncio.TaskGroup() as group:
            self._links = StepLinks(group, self, self._timeouts.join_s, self._timeouts.lease_s)
            group.create_task(self._fail_on_bug())
            while True:
                await self._turn(peers, self._links)
                await self._until_next_turn(peers)

    # ---- what the links tell -------------------------------------------------------------------

    def num_stages(self, pipeline_id: str, epoch: Epoch) -> int | None:
        pipeline = self.membership.pipeline(pipeline_id)
        if pipeline is None or not pipeline.is_current(epoch):
            return None
        return pipeline.num_stages

    def stream_opened(self, pipeline_id: str, epoch: Epoch) -> None:
        with self.acting():
            self.membership.epochs.stream_opened(pipeline_id, epoch)

    def stream_broken(self, pipeline_id: str, epoch: Epoch, error: StageMeshError) -> None:
        with self.acting() as now_ns:
            self.membership.epochs.stream_broken(pipeline_id, epoch, error, now_ns)

    def result_came(self, result: StepResult) -> None:
        """The sender hears of a ProtocolError, and its stream breaks, which ends the epoch."""
        with self.acting() as now_ns:
            self.core.on_result(result, now_ns)
            self.tracer.step_done(result, now_ns)
            if self._watch.step_done(result.pipeline_id, result.epoch, result.step, now_ns):
                self.membership.epochs.step_done(result.pipeline_id)

    # ---- turns ---------------------------------------------------------------------------------

    async def _turn(self, peers: Peers, links: StepLinks) -> None:
        now_ns = time.monotonic_ns()
        self._gateway_lease_ns = peers.end_silent_gateways(now_ns)
        for overdue in self._watch.overdue(now_ns):
            self.membership.epochs.step_overdue(overdue, now_ns)
        has_changed = self.membership.tick(now_ns)
        for effect in self.membership.take_effects():
            self._apply(effect, peers, links, now_ns)
        self._note_what_is_rebuilt(now_ns)
        for pipeline_id in self._watch.idle(now_ns):
            self.core.probe(pipeline_id, now_ns)
        steps = self.core.schedule(now_ns)
        for step in steps:
            self.membership.epochs.step_sent(step.pipeline_id)
            self._watch.step_sent(step, now_ns)
            self.tracer.step_sent(step, now_ns)
            await links.send(step)
        if steps:
            await asyncio.sleep(0)  # they are written before the news of the last ones are
        for event in self.core.take_events():
            peers.deliver(event)
        if steps and self.tracer.is_watched:
            end_ns = time.monotonic_ns()
            stats = self.core.stats(end_ns)
            self.tracer.round_done(now_ns, end_ns, len(steps), stats.num_waiting, stats.num_running)
        if has_changed:
            self._wake.set()  # one thing leads to another
            self._look_again(peers)

    def _look_again(self, peers: Peers) -> None:
        view = view_of(self.membership)
        if view != self.view:
            self.view = view
            peers.mesh_changed(view)

    def _apply(self, effect: Effect, peers: Peers, links: StepLinks, now_ns: int) -> None:
        match effect:
            case ToWorker(session, command):
                peers.tell_worker(session, self._with_pages(command))
            case DrainDone():
                peers.drain_done(effect)
            case Resign(error):
                raise error
            case EndSession(session, error):
                peers.end_worker(session, error)
            case OpenStream(pipeline_id, epoch, address):
                links.open(pipeline_id, epoch, address)
            case CloseStream(pipeline_id, epoch):
                links.close(pipeline_id, epoch)
            case AddPipeline(facts):
                self.core.add_pipeline(facts, now_ns)
                self._watch_epoch(facts, now_ns)
            case SuspendPipeline(pipeline_id):
                self.core.suspend_pipeline(pipeline_id, now_ns)
                self._watch.epoch_ended(pipeline_id)
            case ResumePipeline(facts, lost_stages):
                self.core.resume_pipeline(facts, lost_stages, now_ns)
                self._watch_epoch(facts, now_ns)
            case FailOldestStep(pipeline_id, error):
                self.core.fail_oldest_step(pipeline_id, error, now_ns)
            case RemovePipeline(pipeline_id):
                self.core.remove_pipeline(pipeline_id, now_ns)
                self._watch.pipeline_removed(pipeline_id)

    def _watch_epoch(self, facts: PipelineFacts, now_ns: int) -> None:
        model = self.membership.model.summary
        whole = Span(0, model.num_layers) if model else Span(0, 0)
        weight_bytes = StageCosts.of(model).read_bytes(whole) if model else 0
        self._watch.epoch_began(facts.pipeline_id, facts.epoch, now_ns, weight_bytes)

    def _note_what_is_rebuilt(self, now_ns: int) -> None:
        rebuilding = self.membership.epochs.rebuilding
        if not rebuilding:
            return
        stats = {each.pipeline_id: each for each in self.core.stats(now_ns).pipelines}
        for pipeline in rebuilding:
            now = stats.get(pipeline.pipeline_id)
            if now is not None and now.num_lacking_tokens == 0:
                pipeline.rebuilt(now.num_tokens_rebuilt, now_ns)

    def _with_pages(self, command: Command) -> Command:
        """Pages that are to be fetched are those in use, of a pipeline that is suspended by now."""
        if not isinstance(command, JoinEpoch) or not command.pages_from:
            return command
        in_use = self.core.blocks_in_use(command.pipeline_id)
        block_ids = tuple(block_id for block_id in in_use if block_id < command.num_blocks)
        if pipeline := self.membership.pipeline(command.pipeline_id):
            pipeline.handovers.num_blocks = len(block_ids)
        return replace(command, page_block_ids=block_ids)

    async def _until_next_turn(self, peers: Peers) -> None:
        deadlines = (
            self.core.next_deadline_ns(),
            self.membership.wakeup_ns(),
            self._watch.wakeup_ns(),
            self._gateway_lease_ns,
        )
        due_ns = min((at for at in deadlines if at is not None), default=None)
        longest_s = self._timeouts.lease_s / 4
        wait_s = longest_s if due_ns is None else (due_ns - time.monotonic_ns()) / 1e9
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(longest_s, max(0.0, wait_s))):
                await self._wake.wait()
        self._wake.clear()
        self._note_standstill(peers, round(2 * longest_s * 1e9))

    def _note_standstill(self, peers: Peers, max_ns: int) -> None:
        """A process that was frozen, or busy for long, has heard nobody: what was said meanwhile
        is read before anybody is taken for lost."""
        before_ns, self._awake_ns = self._awake_ns, time.monotonic_ns()
        stood_still_ns = self._awake_ns - before_ns
        if stood_still_ns > max_ns:
            log.warning("the scheduler stood still", seconds=round(stood_still_ns / 1e9, 3))
            self.membership.was_deaf(stood_still_ns)
            self._watch.was_deaf(stood_still_ns)
            peers.was_deaf(stood_still_ns)

    async def _fail_on_bug(self) -> None:
        try:
            await self._bug
        except Exception:
            log.exception("a bug in the scheduler; it ends")
            raise

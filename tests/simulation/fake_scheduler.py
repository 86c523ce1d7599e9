"""A scheduler process: the real Membership and the real core, driven as the real driver does it.

Sessions of workers and gateways and the streams of steps and results are pretended.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from simulation.clock import S
from simulation.fake_links import FakeLinks
from simulation.mesh_messages import Abort, Refused, Submit, Welcome, Word
from simulation.process import End, Process
from simulation.sharing_seen import SharingSeen

from scheduler.core import EndReason, Finished, RequestKey, SchedulerCore, Tokens
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
    OpenStream,
    Registration,
    RemovePipeline,
    ResumePipeline,
    SuspendPipeline,
    ToWorker,
)
from scheduler.watch import StepWatch
from stagemesh.errors import StageMeshError
from stagemesh.plan import StepResult

if TYPE_CHECKING:
    from simulation.mesh_world import MeshWorld

_LEASE_NS = 2 * S
_HEARTBEAT_NS = S // 2
_CANARY_NS = 5 * S


class FakeScheduler(Process):
    def __init__(self, world: MeshWorld, term: int) -> None:
        super().__init__(world.clock, "scheduler", f"{world.seed} {term}")
        self.world = world
        self.term = term
        self.core = SchedulerCore(world.scenario.limits)
        self.membership = Membership(world.scenario.membership, term)
        self.watch = StepWatch(_LEASE_NS, _CANARY_NS)
        self.links = FakeLinks(self)
        self._seen = SharingSeen(self.membership, self.core, world.met)
        self._numbers = count(1)
        self._workers: dict[int, End] = {}
        self._gateways: dict[int, End] = {}
        self._heard_ns: dict[int, int] = {}
        self._wake_ns: int | None = None
        self._is_woken = False

    def wake(self) -> None:
        """Something was told to core or membership: a turn follows."""
        if not self._is_woken:
            self._is_woken = True
            self.clock.at(self.clock.now_ns, lambda: None)

    # ---- workers -------------------------------------------------------------------------------

    def accept_worker(self, end: End) -> None:
        end.on_message = lambda registration: self._register(end, registration)

    def _register(self, end: End, registration: Registration) -> None:
        session = next(self._numbers)
        self._workers[session] = end
        end.on_message = lambda word: self._hear(session, word)
        end.on_closed = lambda: self._lose_worker(session)
        try:
            self.membership.register(session, registration, self.clock.now_ns)
            end.send(Welcome(self.membership.term))
        except StageMeshError as error:
            end.send(Refused(str(error)))
            end.close()
        self.wake()

    def _hear(self, session: int, word: Word) -> None:
        self.membership.heard(session, self.clock.now_ns)
        word(self.membership, session, self.clock.now_ns)
        self.wake()

    def _lose_worker(self, session: int) -> None:
        self._workers.pop(session, None)
        self.membership.disconnected(session, self.clock.now_ns)
        self.wake()

    # ---- gateways ------------------------------------------------------------------------------

    def accept_gateway(self, end: End) -> None:
        end.on_message = lambda incarnation: self._register_gateway(end, incarnation)

    def _register_gateway(self, end: End, incarnation: int) -> None:
        if older := self._gateways.get(incarnation):
            self._lose_gateway(older, incarnation)
        self._gateways[incarnation] = end
        self._heard_ns[incarnation] = self.clock.now_ns
        end.on_message = lambda message: self._take(end, incarnation, message)
        end.on_closed = lambda: self._lose_gateway(end, incarnation)
        end.send(Welcome(self.membership.term))
        self._beat(end)

    def _take(self, end: End, incarnation: int, message: Submit | Abort | None) -> None:
        if self._gateways.get(incarnation) is not end:
            return
        now_ns = self._heard_ns[incarnation] = self.clock.now_ns
        if isinstance(message, Submit):
            request = message.request
            try:
                self.core.submit(request, now_ns)
            except StageMeshError as error:
                self._deliver(_refusal(request.key, request.attempt, error))
        elif isinstance(message, Abort):
            self.core.abort(message.key, now_ns, message.attempt)
        self.wake()

    def _lose_gateway(self, end: End, incarnation: int) -> None:
        end.close()
        if self._gateways.get(incarnation) is not end:
            return
        del self._gateways[incarnation], self._heard_ns[incarnation]
        self.core.abort_gateway(incarnation, self.clock.now_ns)
        for event in self.core.take_events():
            self._deliver(event)
        self.wake()

    def _beat(self, end: End) -> None:
        """Shows the gateway that the scheduler lives."""
        if not end.is_closed:
            end.send(None)
            self.after(_HEARTBEAT_NS, lambda: self._beat(end))

    def _deliver(self, event: Tokens | Finished) -> None:
        if end := self._gateways.get(event.key.gateway):
            end.send(event)

    # ---- results and standstill ----------------------------------------------------------------

    def result_came(self, result: StepResult) -> None:
        """Raises ProtocolError."""
        now_ns = self.clock.now_ns
        self.core.on_result(result, now_ns)
        if self.watch.step_done(result.pipeline_id, result.epoch, result.step, now_ns):
            self.membership.epochs.step_done(result.pipeline_id)

    def thaw(self) -> None:
        """Who was not heard meanwhile was not silent: the scheduler was deaf."""
        now_ns = self.clock.now_ns
        stood_still_ns = now_ns - (now_ns if self.frozen_ns is None else self.frozen_ns)
        if stood_still_ns > _LEASE_NS // 2:
            self.membership.was_deaf(stood_still_ns)
            self.watch.was_deaf(stood_still_ns)
            for incarnation in self._heard_ns:
                self._heard_ns[incarnation] += stood_still_ns
        super().thaw()

    # ---- turns ---------------------------------------------------------------------------------

    def turn(self) -> None:
        """After something has happened, or when it is time."""
        now_ns = self.clock.now_ns
        is_due = self._wake_ns is not None and now_ns >= self._wake_ns
        if not self.is_alive or self.is_frozen or not (self._is_woken or is_due):
            return
        self._is_woken = False
        for incarnation, heard_ns in list(self._heard_ns.items()):
            if now_ns >= heard_ns + _LEASE_NS:
                self._lose_gateway(self._gateways[incarnation], incarnation)
        for overdue in self.watch.overdue(now_ns):
            self.world.say(f"overdue {overdue}")
            self.membership.epochs.step_overdue(overdue, now_ns)
        if self.membership.tick(now_ns):
            self.wake()  # one thing leads to another
            self._seen.after_tick()
        for effect in self.membership.take_effects():
            self._seen.before(effect)
            self._apply(effect, now_ns)
            self._seen.after(effect)
        for pipeline_id in self.watch.idle(now_ns):
            self.core.probe(pipeline_id, now_ns)
        for step in self.core.schedule(now_ns):
            self.membership.epochs.step_sent(step.pipeline_id)
            self.watch.step_sent(step, now_ns)
            self.links.send(step)
        for event in self.core.take_events():
            self._deliver(event)
        self._set_alarm()

    def _set_alarm(self) -> None:
        leases_ns = (heard_ns + _LEASE_NS for heard_ns in self._heard_ns.values())
        due = (
            self.core.next_deadline_ns(),
            self.membership.wakeup_ns(),
            self.watch.wakeup_ns(),
            *leases_ns,
        )
        wake_ns = min((at_ns for at_ns in due if at_ns is not None), default=None)
        if wake_ns is not None and wake_ns <= self.clock.now_ns:
            assert self._is_woken, "a turn is due that changes nothing"
        if wake_ns is not None and wake_ns != self._wake_ns:
            self.clock.at(wake_ns, lambda: None)
        self._wake_ns = wake_ns

    def _apply(self, effect: Effect, now_ns: int) -> None:
        self.world.say(f"effect {effect}")
        match effect:
            case ToWorker(session, command):
                if end := self._workers.get(session):
                    end.send(self._with_pages(command))
            case EndSession(session, error):
                self._end_worker(session, error)
            case OpenStream(pipeline_id, epoch, address):
                self.links.open(pipeline_id, epoch, address)
            case CloseStream(pipeline_id, epoch):
                self.links.close(pipeline_id, epoch)
            case AddPipeline(facts):
                self.core.add_pipeline(facts, now_ns)
                self.watch.epoch_began(facts.pipeline_id, facts.epoch, now_ns)
            case SuspendPipeline(pipeline_id):
                self.core.suspend_pipeline(pipeline_id, now_ns)
                self.watch.epoch_ended(pipeline_id)
            case ResumePipeline(facts, lost_stages):
                self.world.met["resumed with a loss" if lost_stages else "resumed whole"] += 1
                self.core.resume_pipeline(facts, lost_stages, now_ns)
                self.watch.epoch_began(facts.pipeline_id, facts.epoch, now_ns)
            case FailOldestStep(pipeline_id, error):
                self.world.met["given up"] += 1
                self.core.fail_oldest_step(pipeline_id, error, now_ns)
            case RemovePipeline(pipeline_id):
                self.world.met["removed"] += 1
                self.core.remove_pipeline(pipeline_id, now_ns)
                self.watch.pipeline_removed(pipeline_id)
            case DrainDone():
                self.world.met["drained to a successor"] += bool(effect.successor_id)
                self.world.met["drained to nobody"] += not effect.successor_id
                self.world.met["drained with pages"] += effect.num_blocks_moved > 0
            case _:
                raise AssertionError(f"an effect that is not known here: {effect}")

    def _with_pages(self, command: Command) -> Command:
        """Pages that are to be fetched are those in use, of a pipeline that is suspended by now."""
        if not isinstance(command, JoinEpoch) or not command.pages_from:
            return command
        in_use = self.core.blocks_in_use(command.pipeline_id)
        block_ids = tuple(block_id for block_id in in_use if block_id < command.num_blocks)
        if pipeline := self.membership.pipeline(command.pipeline_id):
            pipeline.handovers.num_blocks = len(block_ids)
        return replace(command, page_block_ids=block_ids)

    def _end_worker(self, session: int, error: StageMeshError | None) -> None:
        if end := self._workers.get(session):
            if error is not None:
                end.send(Refused(str(error)))
            end.close()


def _refusal(key: RequestKey, attempt: int, error: StageMeshError) -> Finished:
    return Finished(key, attempt, EndReason.ERROR, error, 0, 0, 0)

"""A worker process as the scheduler knows it: registers, loads, obeys; without numbers or sockets.

Does what stage_worker/worker.py and stage_worker/membership.py do. Epochs are fake_member's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulation.clock import S
from simulation.fake_control import ControlStream
from simulation.fake_member import Member
from simulation.fake_pages import give_pages
from simulation.fake_stage import FakeStage
from simulation.fake_tenants import Tenants
from simulation.mesh_messages import Hello, PagesRequest, Refused, Welcome, Word
from simulation.mesh_scenario import WorkerShape
from simulation.pretend_model import ADAPTERS
from simulation.process import End, Process
from simulation.stage_memory import StageMemory

from scheduler.messages import (
    JoinEpoch,
    LeaveEpoch,
    LoadedSpan,
    LoadSpan,
    Registration,
    ShutdownWorker,
)
from scheduler.workers import WorkerStats
from stagemesh.errors import ProtocolError, StageMeshError, StaleEpoch, StepTimeout
from stagemesh.plan import Epoch, Span

if TYPE_CHECKING:
    from simulation.mesh_world import MeshWorld

_EARLY_HELLO_NS = 10 * S
_PATIENCE_NS = 10 * S
_WATCHDOG_NS = 4 * S
_AMPLE_BYTES = 10**12  # whatever it is told to load fits


class FakeWorker(Process):
    """`slow`: how many times as long a step takes. `num_faults` steps to come will fail."""

    def __init__(self, world: MeshWorld, shape: WorkerShape, incarnation: int) -> None:
        super().__init__(world.clock, shape.name, f"{world.seed} {incarnation}")
        self.world = world
        self.shape = shape
        self.incarnation = incarnation
        self.slow = 1
        self.num_faults = self.num_queued = 0
        self.tenants: Tenants | None = None
        self.loaded: LoadedSpan | None = None
        self._loading: Span | None = None
        self._control = ControlStream(self)
        self._term = 0
        self._latest: dict[str, Epoch] = {}
        self._early: list[tuple[End, Hello]] = []
        self._device_ready_ns = 0
        self._salt = self.random.getrandbits(40)

    @property
    def term(self) -> int:
        """The highest that was followed."""
        return self._term

    @property
    def stats(self) -> WorkerStats:
        return WorkerStats(steps_queued=self.num_queued, available_memory_bytes=_AMPLE_BYTES)

    @property
    def num_tokens_executed(self) -> int:
        stages = self.tenants.stages.values() if self.tenants else ()
        return sum(stage.num_tokens_executed for stage in stages)

    @property
    def members(self) -> list[Member]:
        return self.tenants.members if self.tenants else []

    # ---- the control stream --------------------------------------------------------------------

    def start(self) -> None:
        self._control.start()

    def say(self, word: Word) -> None:
        self._control.say(word)

    def control_breaks(self) -> None:
        """Somewhere between the worker and the scheduler."""
        self._control.breaks()

    def drain(self) -> None:
        """SIGTERM: it serves on until it is released, or its patience ends."""
        self.say(lambda members, session, now_ns: members.draining(session, now_ns))
        self.after(_PATIENCE_NS, self._say_goodbye)

    def _say_goodbye(self) -> None:
        self.say(lambda members, session, now_ns: members.goodbye(session, "SIGTERM", now_ns))
        self.exits()

    def exits(self) -> None:
        self.die()
        self.world.worker_exited(self)

    def registration(self) -> Registration:
        return Registration(
            worker_id=self.name,
            incarnation=self.incarnation,
            address=self.name,
            model=self.world.model,
            fixed_span=self.shape.fixed_span,
            loaded=self.loaded,
            scheduler_address="scheduler",
            available_memory_bytes=_AMPLE_BYTES,
            followed_term=self._term,
            adapters={name: name for name in ADAPTERS[1:]},
        )

    # ---- commands ------------------------------------------------------------------------------

    def obey(self, command: object) -> None:
        match command:
            case Welcome(term):
                self._follow_term(term)
            case Refused(reason):
                raise AssertionError(f"worker {self.name} is refused: {reason}")
            case LoadSpan(span):
                self._load(span)
            case JoinEpoch():
                self._join(command)
            case LeaveEpoch(pipeline_id, epoch):
                self.leave(pipeline_id, epoch)
            case ShutdownWorker():
                self.exits()
            case _:
                raise AssertionError(f"a command that is not known: {command}")

    def _load(self, span: Span) -> None:
        if self._loading == span:
            return
        self._loading = span
        self.leave()
        self.loaded = self.tenants = None
        self.after(self.shape.load_ns, lambda: self._has_loaded(span))

    def _has_loaded(self, span: Span) -> None:
        if self._loading != span:
            return  # told otherwise meanwhile
        self._loading = None
        shape = self.shape
        layers = range(span.start, span.end)
        is_last = span.end == self.world.model.num_layers
        num_log_blocks = 0 if is_last else shape.num_log_blocks
        self._salt += 1
        memory = StageMemory(
            layers,
            num_blocks=shape.num_blocks,
            num_log_blocks=num_log_blocks,
            block_size=self.world.scenario.block_size,
            salt=self._salt,
        )
        self.tenants = Tenants(memory, self.world.scenario.dynamic_rope)
        loaded = LoadedSpan(
            span,
            shape.num_blocks,
            self.world.scenario.block_size,
            num_log_blocks=num_log_blocks,
        )
        self.loaded = loaded
        self.say(lambda members, session, now_ns: members.span_loaded(session, loaded))

    # ---- epochs --------------------------------------------------------------------------------

    def leave(self, pipeline_id: str | None = None, epoch: Epoch | None = None) -> None:
        """Ends all epochs, or those of a pipeline, or one."""
        if self.members:
            assert self.tenants is not None
            self.tenants.leave(pipeline_id, epoch)
            self.look_at_early_hellos()

    def report_broken(self, place: JoinEpoch, error: StageMeshError, peer_address: str) -> None:
        self.world.say(f"{self.name}: {place.pipeline_id} {place.epoch.n} is broken: {error}")
        self.say(
            lambda members, session, now_ns: members.epochs.broken(
                session, place.pipeline_id, place.epoch, error, peer_address, now_ns
            )
        )

    def on_device(self, duration_ns: int, what: Callable[[], None]) -> None:
        """One thing after another."""
        start_ns = max(self.clock.now_ns, self._device_ready_ns)
        self._device_ready_ns = start_ns + duration_ns * self.slow
        self.num_queued += 1

        def done() -> None:
            self.num_queued -= 1
            what()

        self.clock.at(self._device_ready_ns, lambda: self.happens(done))

    def hangs(self, duration_ns: int) -> None:
        """The device does nothing for a while. The process goes on talking, and ends if it takes
        too long: nothing else could end that."""
        self._device_ready_ns = max(self.clock.now_ns, self._device_ready_ns) + duration_ns
        if duration_ns > _WATCHDOG_NS:
            self.after(_WATCHDOG_NS, self._end_hard)

    def _end_hard(self) -> None:
        for member in self.members:
            member.fail(StepTimeout("the device hangs"))
        self.exits()

    def _follow_term(self, term: int) -> None:
        if term > self._term:
            self._term = term
            self._latest.clear()

    def _join(self, place: JoinEpoch) -> None:
        latest = self._latest.get(place.pipeline_id, Epoch(0, 0))
        if place.epoch <= latest or place.epoch.term < self._term:
            self.report_broken(place, StaleEpoch(f"{place.epoch} is not newer than {latest}"), "")
            return
        tenants = self.tenants
        if tenants is None:
            self.report_broken(place, ProtocolError("no layers are loaded here"), "")
            return
        if place.keep_kv and not tenants.has_kv_of(place.pipeline_id, from_end=place.from_end):
            error = ProtocolError(f"no KV of {place.pipeline_id} is held here")
            self.report_broken(place, error, "")
            return
        self._follow_term(place.epoch.term)
        self._latest[place.pipeline_id] = place.epoch
        member = Member(self, place, tenants.make_way(place))
        tenants.let_in(member)
        self.look_at_early_hellos()
        member.begin()

    # ---- streams of other stages ---------------------------------------------------------------

    def accept_stream(self, end: End) -> None:
        end.on_message = lambda message: self._first_message(end, message)

    def _first_message(self, end: End, message: object) -> None:
        if isinstance(message, PagesRequest):
            give_pages(self, end, message)
            return
        assert isinstance(message, Hello), f"not the first message of a stream: {message}"
        self._early.append((end, message))
        self.after(_EARLY_HELLO_NS, lambda: self._refuse_late(end))
        self.look_at_early_hellos()

    def _refuse_late(self, end: End) -> None:
        if any(end is early for early, _ in self._early):
            end.close()
            self._early = [each for each in self._early if each[0] is not end]

    def look_at_early_hellos(self) -> None:
        """Streams of epochs that this worker may hear of yet wait."""
        waiting, self._early = self._early, []
        for end, hello in waiting:
            tenants = self.tenants
            member = tenants.member(hello.pipeline_id, hello.epoch) if tenants else None
            if member is not None:
                if member.ended or member.has_incoming:
                    end.close()
                elif member.is_accepting:
                    member.take_incoming(end, hello)
                else:
                    self._early.append((end, hello))
            elif hello.epoch <= self._latest.get(hello.pipeline_id, Epoch(self._term, 0)):
                end.close()  # over
            else:
                self._early.append((end, hello))

    # ---- pages ---------------------------------------------------------------------------------

    def give_up(self, request: PagesRequest) -> FakeStage | None:
        """Ends all epochs of the pipeline before that of the request; what holds the pages, if
        they are the pipeline's and whoever asks is not too late."""
        latest = self._latest.get(request.pipeline_id, Epoch(0, 0))
        is_late = request.epoch.term < self._term or request.epoch < latest
        is_other = self.loaded is None or self.loaded.span != request.span
        stage = None if is_late or is_other or not self.tenants else self.tenants.give_up(request)
        if stage is not None:
            self._latest[request.pipeline_id] = request.epoch
            self.look_at_early_hellos()
        return stage

    def keeps_still(self, request: PagesRequest, stage: FakeStage) -> bool:
        is_latest = self._latest.get(request.pipeline_id) == request.epoch
        return is_latest and self.tenants is not None and self.tenants.keeps_still(stage)

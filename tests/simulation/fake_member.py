"""A pretend worker's part in one epoch: joins, takes steps in order, executes, pushes on.

Does what stage_worker/epoch_member.py does: every step once, in order, and whatever breaks ends the
epoch here and is reported once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulation.clock import S
from simulation.fake_pages import PageFetch
from simulation.fake_stage import FakeStage, Payload
from simulation.mesh_messages import Frame, Hello
from simulation.process import End
from simulation.stage_memory import MemoryPart

from scheduler.messages import JoinEpoch
from stagemesh.errors import InternalError, PeerLost, StageMeshError, StepOutOfOrder
from stagemesh.plan import Epoch, RowResult, StepResult

if TYPE_CHECKING:
    from simulation.fake_worker import FakeWorker

# How long neighbours take a silent stream for a living one.
SILENCE_NS = 2 * S


class Member:
    def __init__(self, worker: FakeWorker, place: JoinEpoch, stage: FakeStage) -> None:
        self.place = place
        self.ended = False
        self.is_accepting = False
        self._worker = worker
        self.stage = stage
        self._incoming: End | None = None
        self._outgoing: End | None = None
        self._next_step = 0

    @property
    def key(self) -> tuple[str, Epoch]:
        return self.place.pipeline_id, self.place.epoch

    @property
    def has_incoming(self) -> bool:
        return self._incoming is not None

    @property
    def is_last(self) -> bool:
        return self.place.stage + 1 == self.place.num_stages

    # ---- joining -------------------------------------------------------------------------------

    def begin(self) -> None:
        self._on_device(self._worker.shape.compute_ns, self._join)

    def _join(self) -> None:
        place, memory = self.place, self.stage.memory
        self.stage.join(
            place.epoch,
            MemoryPart(memory, place.num_blocks, place.num_log_blocks, from_end=place.from_end),
            stage=place.stage,
            num_stages=place.num_stages,
            keep_kv=place.keep_kv,
        )
        self._go_on()

    def _go_on(self) -> None:
        """Streams of the epoch are accepted, and the own one is opened."""
        self.is_accepting = True
        self._worker.look_at_early_hellos()
        place, world = self.place, self._worker.world
        peer, accept = world.acceptor_of(place.next_address)
        end = self._outgoing = self._worker.dial(peer, accept)
        end.on_message = lambda _: self._joined()
        end.on_closed = lambda: self.fail(PeerLost("the next stage is gone"), place.next_address)
        end.send(Hello(place.pipeline_id, place.epoch, place.stage + 1, self._worker.name))

    def _joined(self) -> None:
        """The next one has accepted the stream."""
        if self.ended:
            return
        if self.place.pages_from:
            PageFetch(self._worker, self, self._say_joined)
        else:
            self._say_joined(False)

    def _say_joined(self, has_pages: bool) -> None:
        if not self.ended:
            self._worker.say(
                lambda members, session, _: members.epochs.joined(
                    session, *self.key, has_pages=has_pages
                )
            )

    def take_incoming(self, end: End, hello: Hello) -> None:
        assert hello.to_stage == self.place.stage, f"{hello} came to stage {self.place.stage}"
        self._incoming = end
        end.on_message = self._receive
        end.on_closed = lambda: self.fail(PeerLost("the stream before ended"), hello.sender)
        end.send(None)

    # ---- steps ---------------------------------------------------------------------------------

    def _receive(self, frame: Frame) -> None:
        if self.ended:
            return
        if frame.step.step != self._next_step:
            self.fail(StepOutOfOrder(f"step {frame.step.step} where {self._next_step} is due"))
            return
        self._next_step += 1
        duration_ns = self._worker.shape.compute_ns * (8 + frame.step.num_tokens) // 8
        self._on_device(duration_ns, lambda: self._execute(frame))

    def _execute(self, frame: Frame) -> None:
        if self._worker.num_faults > 0:
            self._worker.num_faults -= 1
            self.fail(InternalError("the device failed"))
            return
        payload, rows = self.stage.execute(frame.step, frame.payload)
        self._push(frame, payload, rows)

    def _push(self, frame: Frame, payload: Payload, rows: tuple[RowResult, ...]) -> None:
        assert self._outgoing is not None
        step = frame.step
        if self.is_last:
            self._outgoing.send(StepResult(step.pipeline_id, step.epoch, step.step, rows))
        else:
            self._outgoing.send(Frame(step, payload))

    def _on_device(self, duration_ns: int, what: Callable[[], None]) -> None:
        """What is queued is not done once the epoch has ended."""
        self._worker.on_device(duration_ns, lambda: None if self.ended else what())

    # ---- the end -------------------------------------------------------------------------------

    def goes_silent(self) -> None:
        """What this stage sends gets lost from now on; the next one notices that it is silent."""
        if self._outgoing is not None and not self.ended:
            self._outgoing.swallows = True
            lost = PeerLost("no pong came back")
            self._worker.after(SILENCE_NS, lambda: self.fail(lost, self.place.next_address))

    def breaks(self) -> None:
        """The connection to the next stage is cut."""
        if self._outgoing is not None:
            self._outgoing.cut()

    def fail(self, error: StageMeshError, peer_address: str = "") -> None:
        """Only the first error counts."""
        if not self.ended:
            self.end()
            self._worker.report_broken(self.place, error, peer_address)

    def end(self) -> None:
        """In silence: what is queued is dropped, and no step touches a page any more."""
        self.ended = True
        for end in (self._incoming, self._outgoing):
            if end is not None:
                end.close()

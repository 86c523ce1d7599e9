"""A pretend worker's stream to the scheduler: dialled again whenever it breaks.

Does what stage_worker/control.py does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.clock import MS, S
from simulation.mesh_messages import Welcome, Word
from simulation.process import End

if TYPE_CHECKING:
    from simulation.fake_worker import FakeWorker

_HEARTBEAT_NS = S // 2
_KEEPALIVE_NS = 12 * S


class ControlStream:
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self._end: End | None = None

    def start(self) -> None:
        self._dial()
        self._worker.after(_HEARTBEAT_NS, self._beat)

    def say(self, word: Word) -> None:
        if self._end is not None:
            self._end.send(word)

    def breaks(self) -> None:
        if self._end is not None:
            self._end.cut()

    def _dial(self) -> None:
        scheduler = self._worker.world.scheduler
        end = self._end = self._worker.dial(scheduler, scheduler.accept_worker)
        end.on_message = lambda message: self._take(end, message)
        end.on_closed = lambda: self._detached(end)
        end.send(self._worker.registration())

    def _take(self, end: End, message: object) -> None:
        if end is not self._end:
            return
        if isinstance(message, Welcome) and message.term < self._worker.term:
            end.close()
            self._detached(end)
        else:
            self._worker.obey(message)

    def _detached(self, end: End) -> None:
        """The scheduler takes the worker for lost, so its epoch is over; what it holds it keeps."""
        if self._end is end:
            self._end = None
            self._worker.leave()
            self._worker.after(self._worker.random.randint(20 * MS, 400 * MS), self._dial)

    def _beat(self) -> None:
        stats = self._worker.stats
        self.say(lambda members, session, now_ns: members.heard(session, now_ns, stats))
        self._check_alive()
        self._worker.after(_HEARTBEAT_NS, self._beat)

    def _check_alive(self) -> None:
        """As the transport's pings do: a scheduler that stands still for long is left."""
        end = self._end
        if end is None or end.peer.owner.frozen_ns is None:
            return
        if self._worker.clock.now_ns >= end.peer.owner.frozen_ns + _KEEPALIVE_NS:
            end.close()
            self._detached(end)

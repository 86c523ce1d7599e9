"""Processes and the streams between them, on virtual time.

A process may freeze: then what reaches it waits, and its peers notice nothing. When it dies, its
streams break: peers notice soon, after what it had sent. Order holds within a stream, not between
streams.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from simulation.clock import MS, Clock

MAX_LATENCY_NS = 3 * MS


class Process:
    def __init__(self, clock: Clock, name: str, seed: str) -> None:
        self.clock = clock
        self.name = name
        self.random = Random(f"{seed} {name}")
        self.is_alive = True
        self.frozen_ns: int | None = None  # since when
        self._waiting: list[Callable[[], None]] = []  # for it to thaw
        self._ends: list[End] = []

    @property
    def is_frozen(self) -> bool:
        return self.frozen_ns is not None

    def happens(self, what: Callable[[], None]) -> None:
        """Something reaches the process, which acts on it when it can."""
        if not self.is_alive:
            return
        if self.is_frozen:
            self._waiting.append(what)
        else:
            what()

    def after(self, delay_ns: int, what: Callable[[], None]) -> None:
        """A timer of its own."""
        self.clock.after(delay_ns, lambda: self.happens(what))

    def freeze(self) -> None:
        if not self.is_frozen:
            self.frozen_ns = self.clock.now_ns

    def thaw(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.frozen_ns = None
        for what in waiting:
            self.happens(what)

    def die(self) -> None:
        self.is_alive, self.frozen_ns = False, None
        self._waiting.clear()
        for end in list(self._ends):
            end.close()

    def dial(self, peer: Process, accept: Callable[[End], None]) -> End:
        """A stream to `peer`, which gets its end of it a little later."""
        stream = _Stream(self, peer)
        self._ends = [end for end in self._ends if not end.is_closed] + [stream.ends[0]]
        end = stream.ends[0]
        end.ready_ns = self.clock.now_ns + stream.latency_ns()
        self.clock.at(end.ready_ns, lambda: self._arrive(peer, stream, accept))
        return end

    @staticmethod
    def _arrive(peer: Process, stream: _Stream, accept: Callable[[End], None]) -> None:
        if not peer.is_alive:
            stream.ends[1].close()  # nobody listens there
            return
        peer._ends.append(stream.ends[1])
        peer.happens(lambda: accept(stream.ends[1]))


class _Stream:
    def __init__(self, dialler: Process, peer: Process) -> None:
        self._random = dialler.random
        self._base_ns = self._random.randint(10_000, MAX_LATENCY_NS)
        self.ends = (End(self, dialler), End(self, peer))
        self.ends[0].peer, self.ends[1].peer = self.ends[1], self.ends[0]

    def latency_ns(self) -> int:
        return self._base_ns + self._random.randrange(self._base_ns)


class End:
    """One end of a stream: what comes in is told to `on_message`, its breaking to `on_closed`."""

    peer: End

    def __init__(self, stream: _Stream, owner: Process) -> None:
        self.owner = owner
        self.is_closed = False
        self.swallows = False  # what is sent gets lost, in silence
        self.on_message: Callable[[Any], None] = lambda message: None
        self.on_closed: Callable[[], None] = lambda: None
        self._stream = stream
        self.ready_ns = 0  # nothing that is sent arrives before

    def send(self, message: Any) -> None:
        if not self.is_closed and not self.swallows:
            self._later(lambda: self.peer._receive(message))

    def close(self) -> None:
        """From this side; the peer hears of it after what was sent."""
        if not self.is_closed:
            self.is_closed = True
            self._later(self.peer._break)

    def cut(self) -> None:
        """The connection breaks under both: what is under way is lost."""
        for end in (self, self.peer):
            end._break()

    def _later(self, what: Callable[[], None]) -> None:
        clock = self.owner.clock
        self.ready_ns = max(clock.now_ns + self._stream.latency_ns(), self.ready_ns)
        clock.at(self.ready_ns, lambda: self.peer.owner.happens(what))

    def _receive(self, message: Any) -> None:
        if not self.is_closed:
            self.on_message(message)

    def _break(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.owner.happens(self.on_closed)

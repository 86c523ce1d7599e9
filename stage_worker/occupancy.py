"""What the time of a worker's epochs goes to: computing, or waiting, and for what.

Each moment counts once, for the first of these that is so: the device computes a step; a write of
an output waits for the connection; an output is on its way from the device to the connection; there
is nothing to do. So the four add up to the time for which the worker was in an epoch, and what goes
on beside computing costs nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum


class Doing(Enum):
    """In the order in which they count."""

    COMPUTING = "computing"
    WRITING = "writing"
    SERIALISING = "serialising"
    WAITING = "waiting"


class Occupancy:
    """Of one worker; `join` for each epoch. The device thread and the event loop both tell it."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seats: set[Seat] = set()
        self._spent_ns = dict.fromkeys(Doing, 0)
        self._since_ns = 0

    def join(self) -> Seat:
        """An epoch begins."""
        seat = Seat(self)
        with self.changing():
            self._seats.add(seat)
        return seat

    def leave(self, seat: Seat) -> None:
        """The epoch is over; what was under way in it counts no more."""
        with self.changing():
            self._seats.discard(seat)

    def spent_ns(self) -> dict[Doing, int]:
        """Up to now, since the process started."""
        with self.changing():
            return dict(self._spent_ns)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around whatever changes what is being done: the time up to here counts for what was."""
        with self._lock:
            now_ns = self._clock()
            if self._seats:
                self._spent_ns[self._doing()] += now_ns - self._since_ns
            self._since_ns = now_ns
            yield

    def _doing(self) -> Doing:
        if any(seat.is_computing for seat in self._seats):
            return Doing.COMPUTING
        if any(seat.is_writing for seat in self._seats):
            return Doing.WRITING
        if any(seat.num_unsent for seat in self._seats):
            return Doing.SERIALISING
        return Doing.WAITING


class Seat:
    """A worker's part in one epoch, as far as its time goes. Is a stagemesh.transport.SendMeter."""

    def __init__(self, occupancy: Occupancy) -> None:
        self.is_computing = False
        self.is_writing = False
        self.num_unsent = 0
        self._occupancy = occupancy

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around a step, on the device thread; its output is to be sent then."""
        with self._occupancy.changing():
            self.is_computing = True
        try:
            yield
        finally:
            with self._occupancy.changing():
                self.is_computing = False
                self.num_unsent += 1

    def writing(self) -> None:
        with self._occupancy.changing():
            self.is_writing = True

    def written(self) -> None:
        with self._occupancy.changing():
            self.is_writing = False

    def sent(self) -> None:
        with self._occupancy.changing():
            self.num_unsent -= 1

    def leave(self) -> None:
        self._occupancy.leave(self)

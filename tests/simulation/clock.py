"""Virtual time: what happens next, in an order that a seed decides."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

MS = 1_000_000
S = 1_000_000_000


class Clock:
    """Events happen by time, and those of one time in the order in which they were announced."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = count()

    @property
    def is_empty(self) -> bool:
        return not self._events

    def at(self, at_ns: int, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(at_ns, self.now_ns), next(self._numbers), what))

    def after(self, delay_ns: int, what: Callable[[], None]) -> None:
        self.at(self.now_ns + delay_ns, what)

    def step(self) -> None:
        """The next event happens."""
        self.now_ns, _, what = heapq.heappop(self._events)
        what()

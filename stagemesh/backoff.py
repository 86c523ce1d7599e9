"""How long to wait before the next attempt to reach a peer."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Waits that double up to a limit, each shortened by chance so that many peers spread out."""

    def __init__(self, first_s: float = 0.1, max_s: float = 5.0) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def next_s(self) -> float:
        """Seconds to wait now: between half of the current step and all of it."""
        step_s = self._next_s
        self._next_s = min(self._max_s, 2 * step_s)
        return step_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """After a success."""
        self._next_s = self._first_s

    async def wait(self) -> None:
        await asyncio.sleep(self.next_s())

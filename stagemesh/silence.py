"""Notices a peer that says nothing for too long: a frozen process, a cut cable.

Only time in which this process was awake counts. Whoever was stopped himself, or had no processor,
has not listened, and blames nobody for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_LOOKS_PER_LIMIT = 20


class Silence:
    """Of one peer. `heard` at every sign of life."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._silent_s = 0.0

    def heard(self) -> None:
        self._silent_s = 0.0

    @asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """What is in it ends with a TimeoutError once nothing was heard for `limit_s`."""
        self.heard()
        async with asyncio.timeout(None) as deadline:
            watching = asyncio.create_task(self._watch(deadline))
            try:
                yield
            finally:
                watching.cancel()

    async def _watch(self, deadline: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        look_s = self.limit_s / _LOOKS_PER_LIMIT
        last_s = loop.time()
        while self._silent_s < self.limit_s - look_s:
            await asyncio.sleep(look_s)
            now_s = loop.time()
            self._silent_s += min(now_s - last_s, 2 * look_s)
            last_s = now_s
        deadline.reschedule(last_s)

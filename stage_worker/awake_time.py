"""The time that watchdogs count: what passes while this process is awake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

LOOK_S = 0.25


async def looks() -> AsyncIterator[float]:
    """Every LOOK_S: the seconds since the look before. A process that was stopped, or whose event
    loop was, saw nobody hang meanwhile: that counts as two looks at most."""
    loop = asyncio.get_running_loop()
    last_s = loop.time()
    while True:
        await asyncio.sleep(LOOK_S)
        now_s = loop.time()
        yield min(now_s - last_s, 2 * LOOK_S)
        last_s = now_s

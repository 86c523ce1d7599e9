"""How a worker goes when it is told to: it has its layers handed over first, but not forever.

The scheduler decides who takes them, and shuts the worker down when nothing depends on it any more.
Without a scheduler there is nobody to ask, and the worker goes at once.
"""

from __future__ import annotations

import asyncio

from stage_worker.control import ControlStream

# Docker kills ten seconds after it has asked.
PATIENCE_S = 8.0


class Leaving:
    """One for each process; `worker_runs` once there is a control stream."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._control: ControlStream | None = None
        self._is_over = asyncio.Event()

    def worker_runs(self, control: ControlStream) -> None:
        self._control = control

    def ask(self) -> bool:
        """In the event loop. False where the process should be ended instead."""
        if self._control is None or not self._control.drain("told to stop", self._patience_s):
            return False
        asyncio.get_running_loop().call_later(self._patience_s, self._is_over.set)
        return True

    async def patience_ended(self) -> None:
        """Returns when the worker has waited long enough for somebody who goes on."""
        await self._is_over.wait()

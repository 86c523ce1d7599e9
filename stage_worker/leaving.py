"""How a worker goes when it is told to: it has its layers handed over first, but not forever.

The scheduler decides who takes them, and shuts the worker down when nothing depends on it any more.
Without a scheduler there is nobody to ask, and without KV nothing to hand over: then the worker
goes at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stage_worker.control import ControlStream

# Docker kills ten seconds after it has asked.
PATIENCE_S = 8.0


def _always() -> bool:
    return True


class Leaving:
    """One for each process; `worker_runs` once there is a control stream."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._control: ControlStream | None = None
        self._is_needed = _always
        self._is_over = asyncio.Event()

    def worker_runs(
        self,
        control: ControlStream,
        *,
        is_needed: Callable[[], bool] | None = None,
        patience_s: float | None = None,
    ) -> None:
        """`is_needed` says whether anybody would miss what the worker holds."""
        self._control = control
        self._is_needed = is_needed or self._is_needed
        self._patience_s = self._patience_s if patience_s is None else patience_s

    def ask(self) -> bool:
        """In the event loop. False where the process should be ended instead."""
        if self._control is None or not self._is_needed():
            return False
        if not self._control.drain("told to stop", self._patience_s):
            return False
        asyncio.get_running_loop().call_later(self._patience_s, self._is_over.set)
        return True

    async def patience_ended(self) -> None:
        """Returns when the worker has waited long enough for somebody who goes on."""
        await self._is_over.wait()

"""One service of a mesh on this host, kept running: its process, and the next one after that died.

Does not know which services a mesh can do without; whoever runs it says what a death means.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from stagemesh.cli.child import Child, Starter, execute
from stagemesh.cli.services import Service
from stagemesh.errors import StageMeshError

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 10.0
# Whoever lived this long did not die of being started.
LONG_LIFE_S = 10.0


class RestartPause:
    """How long to wait before the next life: twice as long after each short one."""

    def __init__(self) -> None:
        self._next_s = FIRST_PAUSE_S

    def after(self, lived_s: float) -> float:
        if lived_s >= LONG_LIFE_S:
            self._next_s = FIRST_PAUSE_S
        pause_s = self._next_s
        self._next_s = min(MAX_PAUSE_S, 2 * pause_s)
        return pause_s


class KeeperView(Protocol):
    """Who is told of the lives of a process."""

    def on_line(self, process: str, line: str) -> None: ...
    def on_started(self, process: str, role: str, pid: int) -> None: ...
    def on_ready(self, process: str) -> None: ...
    def on_restarting(self, process: str, why: str, pause_s: float) -> None: ...
    def on_restarted(self, process: str, pid: int) -> None: ...


class Keeper:
    """`start` once, then `run`. `child` is the process of now, or the last there was."""

    child: Child

    def __init__(
        self,
        service: Service,
        view: KeeperView,
        log_dir: Path | None,
        starter: Starter = execute,
    ) -> None:
        self.service = service
        self._starter = starter
        self._view = view
        self._log = log_dir / f"{service.name}.log" if log_dir else None
        self._pause = RestartPause()

    async def start(self) -> None:
        """The first life."""
        await self._begin()
        self._view.on_started(self.service.name, self.service.role, self.child.pid)

    async def run(self, is_final: Callable[[Child], bool], stop: asyncio.Event) -> None:
        """Life after life, until `is_final` says of one that has ended that it was the last.

        Once `stop` is set nothing is started any more.
        """
        await self._live(lambda: self._view.on_ready(self.service.name))
        while not is_final(self.child) and await self._begin_again(stop):
            if stop.is_set():  # while it was being started
                self.child.kill_group()
            await self._live(lambda: self._view.on_restarted(self.service.name, self.child.pid))

    async def _begin(self) -> None:
        service = self.service
        self.child = await Child.start(
            service.role, service.name, service.command, service.environ, self._starter
        )

    async def _begin_again(self, stop: asyncio.Event) -> bool:
        """After a pause, and again where the host has no room for a process now."""
        why, lived_s = _ending(self.child), self.child.lived_s
        while True:
            await self._rest(why, lived_s, stop)
            if stop.is_set():
                return False
            try:
                await self._begin()
            except OSError as error:
                why, lived_s = f"cannot be started: {error.strerror or error}", 0.0
            else:
                return True

    async def _live(self, on_ready: Callable[[], None]) -> None:
        child = self.child

        async def report_ready() -> None:
            with contextlib.suppress(StageMeshError):
                await child.wait_ready()
                on_ready()

        reporting = asyncio.create_task(report_ready())
        try:
            await child.pump(self._view.on_line, self._log)
            await reporting
        finally:
            reporting.cancel()

    async def _rest(self, why: str, lived_s: float, stop: asyncio.Event) -> None:
        pause_s = self._pause.after(lived_s)
        self._view.on_restarting(self.service.name, why, pause_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await stop.wait()


def _ending(child: Child) -> str:
    return "has left" if child.ended_well else f"is lost: {child.failure()}"

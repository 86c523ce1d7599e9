"""The template of a mesh's workers as `up` has it: a process that forks them.

A worker takes the place of one that died without importing torch again, and several on few cores
start no slower than one. Where there is no template, or it refuses, workers are executed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stagemesh.cli.child import Child, OnLine, Process, execute
from stagemesh.errors import StageMeshError
from stagemesh.fork_server import MAX_REPLY_BYTES, ForkRequest, ask, exit_code, parse_reply

# Names the socket of a template that is there already. Tests share one.
PATH_VARIABLE = "STAGEMESH_WORKER_TEMPLATE"
# Forking takes milliseconds; whoever has stopped it may keep it.
_REPLY_TIMEOUT_S = 5.0


class ForkedProcess:
    """A child of the template, which tells how it ends."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._end = asyncio.create_task(self._wait_end(connection))

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError where it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    async def _wait_end(self, connection: socket.socket) -> int:
        with connection:
            self.returncode = exit_code(await _receive(connection))
        return self.returncode


class WorkerTemplate:
    """`begin` once and `end` at last; between them `start` starts workers."""

    def __init__(self) -> None:
        self._path = os.environ.get(PATH_VARIABLE, "")
        self._child: Child | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def begin(self, environ: Mapping[str, str], on_line: OnLine) -> None:
        """Starts a template for workers of `environ`, unless there is one; does not wait for it."""
        if self._path or not hasattr(os, "pidfd_open"):
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="stagemesh-")
        path = str(Path(self._scratch.name, "template"))
        command = [sys.executable, "-m", "stage_worker.template", path]
        with contextlib.suppress(OSError):  # no room for it: workers will say so, if it is still so
            self._child = await Child.start("template", "template", command, environ)
            self._reading = asyncio.create_task(self._child.pump(on_line, None))
            self._path = path

    async def end(self) -> None:
        """Workers that it forked end with it."""
        if self._child is not None and self._reading is not None:
            self._child.kill_group()
            await self._reading
        if self._scratch is not None:
            self._scratch.cleanup()

    async def start(
        self, command: Sequence[str], environ: Mapping[str, str], link: int, output: int
    ) -> Process:
        """A worker, forked or executed. Raises OSError where the host cannot start it."""
        if self._path and tuple(command[1:3]) == ("-m", "stage_worker"):
            request = ForkRequest(list(command[3:]), dict(environ), os.getcwd())
            if (forked := await self._fork(request, link, output)) is not None:
                return forked
        return await execute(command, environ, link, output)

    async def _fork(self, request: ForkRequest, link: int, output: int) -> Process | None:
        """None where the template cannot."""
        with contextlib.ExitStack() as held:
            try:
                if self._child is not None:
                    await self._child.wait_ready()
                connection = held.enter_context(ask(self._path, request, link, output))
            except (OSError, StageMeshError):  # it has ended, or this host is at some limit
                return None
            connection.setblocking(False)
            reply: Mapping[str, Any] = {}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPLY_TIMEOUT_S):
                    reply = await _receive(connection)
            if "pid" not in reply:
                return None
            held.pop_all()
            return ForkedProcess(reply["pid"], connection)


async def _receive(connection: socket.socket) -> Mapping[str, Any]:
    message = b""
    with contextlib.suppress(OSError):
        message = await asyncio.get_running_loop().sock_recv(connection, MAX_REPLY_BYTES)
    return parse_reply(message)

"""One service process as its supervisor sees it: started, ready or failed, ended, stopped.

Knows no role. The child's side of the tie is stagemesh.supervision.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from stagemesh.cli.log_lines import LogLine
from stagemesh.errors import PeerLost, StageMeshError, from_code
from stagemesh.supervision import FD_VARIABLE

TAIL_LINES = 10
_CHUNK_BYTES = 65536

OnLine = Callable[[str, str], None]


class Process(Protocol):
    """What there is to know of a process that was started; a session of its own."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    async def wait(self) -> int: ...


# Of a command, its environment, its end of the link, and where its output goes.
Starter = Callable[[Sequence[str], Mapping[str, str], int, int], Awaitable[Process]]


async def execute(
    command: Sequence[str], environ: Mapping[str, str], link: int, output: int
) -> Process:
    """Raises OSError where the host cannot start it."""
    return await asyncio.create_subprocess_exec(
        *command,
        env={**environ, FD_VARIABLE: str(link)},
        pass_fds=[link],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # A Ctrl-C at the terminal is ours to handle; the child is told by us.
        start_new_session=True,
    )


class Child:
    """A process that was started; `start` is the way to make one.

    `pump` must run for as long as the process may live: it reads the child's output and reports.
    """

    def __init__(
        self,
        role: str,
        name: str,
        process: Process,
        *,
        link: socket.socket,
        output: BinaryIO,
    ) -> None:
        self.role = role
        self.name = name
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = process
        self._link = link
        self._output = output
        self._ready: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._failure: StageMeshError | None = None
        self._started_s = time.monotonic()
        self._ended_s: float | None = None

    @classmethod
    async def start(
        cls,
        role: str,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        starter: Starter = execute,
    ) -> Child:
        """Raises OSError where the host cannot start it."""
        link, childs_link = socket.socketpair()
        output_fd, childs_output_fd = os.pipe()
        output = os.fdopen(output_fd, "rb", buffering=0)
        try:
            process = await starter(command, environ, childs_link.fileno(), childs_output_fd)
        except OSError:
            link.close()
            output.close()
            raise
        finally:
            childs_link.close()
            os.close(childs_output_fd)
        return cls(role, name, process, link=link, output=output)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @property
    def ended_well(self) -> bool:
        return self._process.returncode == 0

    @property
    def lived_s(self) -> float:
        """From its start until now or its end."""
        now_s = time.monotonic() if self._ended_s is None else self._ended_s
        return now_s - self._started_s

    async def pump(self, on_line: OnLine, log: Path | None) -> None:
        """Passes on the child's output, line by line, until it has ended and said all."""
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(log.open("ab", buffering=0)) if log else None
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_output(on_line, sink))
                tasks.create_task(self._read_reports())
                await self._process.wait()
                self._ended_s = time.monotonic()
                # Whatever it started and left behind would hold its output open.
                self.kill_group()
        if not self._ready.done():
            self._ready.set_exception(self.failure())
            self._ready.exception()  # nobody may be waiting for it any more

    async def wait_ready(self) -> Mapping[str, Any]:
        """The facts that the child reported. Raises what it failed with, or PeerLost."""
        return await asyncio.shield(self._ready)

    async def wait_ended(self) -> None:
        await self._process.wait()

    def failure(self) -> StageMeshError:
        """Why the child ended: its own words where it had any."""
        if self._failure is not None:
            return self._failure
        code = self._process.returncode
        how = f"was ended by {_signal_name(-code)}" if code and code < 0 else f"exited with {code}"
        return PeerLost(f"the process {how}" + self.last_words())

    def last_words(self) -> str:
        if not self.tail:
            return ""
        lines = [LogLine.parse(line).for_people(self.name).plain for line in self.tail]
        return "; its last lines:\n" + "\n".join(f"  {line}" for line in lines)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill_group(self) -> None:
        """The child and what it started. The group outlives its leader while it has members."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read_output(self, on_line: OnLine, sink: RawIOBase | None) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._output
        )
        rest = b""
        while chunk := await reader.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take_line(line.decode("utf-8", "replace"), on_line, sink)
        if rest:
            self._take_line(rest.decode("utf-8", "replace"), on_line, sink)
        transport.close()

    def _take_line(self, line: str, on_line: OnLine, sink: RawIOBase | None) -> None:
        self.tail.append(line)
        if sink is not None:
            with contextlib.suppress(OSError):  # a full disk costs lines of the log, no more
                sink.write(line.encode() + b"\n")
        on_line(self.name, line)

    async def _read_reports(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._link)
        try:
            while line := await reader.readline():
                self._take_report(json.loads(line))
        except ConnectionError:
            pass
        finally:
            writer.close()

    def _take_report(self, report: Mapping[str, Any]) -> None:
        if "failed" in report:
            self._failure = from_code(report["failed"]["code"], report["failed"]["message"])
        elif "ready" in report and not self._ready.done():
            self._ready.set_result(report["ready"])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

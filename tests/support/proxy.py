"""A TCP proxy between two parts: late, slow, silent, broken off, half closed, or gone.

It runs in a thread of its own with its own event loop, so that it outlives the loop of a test. It
may listen here and dial inside a network namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_CLONE_NEWNET = 0x40000000
_CHUNK_BYTES = 16384
# Chunks that are under way through a late or slow connection; then its sender must wait.
_MAX_CHUNKS = 256


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter


class TcpProxy:
    """Forwards to `target`, host:port, which may be changed for connections to come.

    `delay_s` is added to each byte, both ways; `bytes_per_s` limits each direction of each
    connection; `is_stalled` holds everything back without a word; `refuses` closes whoever comes.
    """

    def __init__(self, target: str, *, namespace: str = "") -> None:
        self.target = target
        self.delay_s = 0.0
        self.bytes_per_s = float("inf")
        self.is_stalled = False
        self.refuses = False
        self.num_bytes = 0
        self._namespace = namespace
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def reset(self) -> None:
        """Breaks all connections off: both sides are sent an RST."""
        self._in_loop(lambda connection: (_rst(connection.client), _rst(connection.server)))

    def half_close(self) -> None:
        """The server's side is told that nothing more comes; the way back stays open."""
        self._in_loop(lambda connection: (connection.server.write_eof(),))

    # ---- in the thread -------------------------------------------------------------------------

    def _in_loop(self, act: Callable[[_Connection], object]) -> None:
        async def act_on_all() -> None:
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    act(connection)

        asyncio.run_coroutine_threadsafe(act_on_all(), self._loop).result()

    def _run(self) -> None:
        if self._namespace:
            _enter(self._namespace)
        asyncio.set_event_loop(self._loop)
        serving = asyncio.start_server(self._accept, sock=self._listener)
        self._server = self._loop.run_until_complete(serving)
        self._loop.run_forever()

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close themselves in the next turn of the loop

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            if self.refuses:
                return
            # Cancelled at the proxy's end; asyncio would complain of a handler that ends so.
            with contextlib.suppress(OSError, asyncio.CancelledError):
                server_reader, server = await asyncio.open_connection(host, int(port))
                await self._forward(_Connection(writer, server), reader, server_reader)
        finally:
            writer.close()

    async def _forward(
        self, connection: _Connection, reader: asyncio.StreamReader, server: asyncio.StreamReader
    ) -> None:
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                there = group.create_task(self._pump(reader, connection.server))
                back = group.create_task(self._pump(server, connection.client))
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_EXCEPTION)
        except* OSError:
            pass
        finally:
            self._connections.discard(connection)
            connection.server.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_CHUNKS)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read(reader, chunks))
            group.create_task(self._write(chunks, writer))

    async def _read(
        self, reader: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        while True:
            chunk = await reader.read(_CHUNK_BYTES)
            await chunks.put((self._loop.time() + self.delay_s, chunk))
            if not chunk:
                return

    async def _write(
        self, chunks: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            when_s, chunk = await chunks.get()
            await asyncio.sleep(max(0.0, when_s - self._loop.time()))
            while self.is_stalled:  # noqa: ASYNC110  # an attribute, set from another thread
                await asyncio.sleep(0.01)
            if not chunk:
                writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()
            self.num_bytes += len(chunk)
            await asyncio.sleep(len(chunk) / self.bytes_per_s)


def _rst(writer: asyncio.StreamWriter) -> None:
    """Lingering for no time is what makes a close an RST."""
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _enter(namespace: str) -> None:
    """This thread's sockets are made in the network namespace from now on."""
    with Path("/run/netns", namespace).open() as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")

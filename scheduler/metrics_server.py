"""Answers `GET /metrics` by HTTP, one answer a connection, and nothing else.

A whole web framework would be most of what a scheduler imports. What is told is the business of
whoever gives `expose`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable

from prometheus_client import CONTENT_TYPE_LATEST

from stagemesh.addresses import join_address, split_address
from stagemesh.errors import AddressInUse, ConfigError

_TIMEOUT_S = 5.0
_MAX_HEAD_BYTES = 8192


@contextlib.asynccontextmanager
async def serving_metrics(address: str, expose: Callable[[], bytes]) -> AsyncIterator[str]:
    """Gives the address that was bound. Raises AddressInUse, ConfigError."""
    host, port = split_address(address)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                await _answer(reader, writer, expose)
        writer.close()

    try:
        server = await asyncio.start_server(answer, host, port, limit=_MAX_HEAD_BYTES)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{address} is in use by another process") from error
        raise ConfigError(f"--metrics-listen {address}: {error.strerror or error}") from error
    async with server:
        bound_host, bound_port = server.sockets[0].getsockname()[:2]
        yield join_address(str(bound_host), int(bound_port))


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, expose: Callable[[], bytes]
) -> None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return
    method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
    path = rest.split(b" ", 1)[0].split(b"?", 1)[0]
    if path != b"/metrics":
        _respond(writer, "404 Not Found", "text/plain", b"metrics are at /metrics\n")
    elif method not in (b"GET", b"HEAD"):
        _respond(writer, "405 Method Not Allowed", "text/plain", b"only GET\n")
    else:
        body = expose()
        _respond(writer, "200 OK", CONTENT_TYPE_LATEST, body if method == b"GET" else b"")
    await writer.drain()


def _respond(writer: asyncio.StreamWriter, status: str, content_type: str, body: bytes) -> None:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode("ascii") + body)

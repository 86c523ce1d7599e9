"""Messages on their way to one peer: bounded, written by one task, cut off where it does not read.

`converse` runs both directions of a stream until either side ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc.aio

Context = grpc.aio.ServicerContext[Any, Any]


class Sized(Protocol):
    def ByteSize(self) -> int: ...  # noqa: N802 - the name in protobuf


M = TypeVar("M", bound=Sized)
R = TypeVar("R")


class Outbox(Generic[M]):
    """At most `max_bytes` wait; one more and the peer is cut off.

    `put` and `end` never wait, so that whoever decides never waits for a peer.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._messages: deque[tuple[M, int]] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._ended = False
        self.cut_off: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, message: M) -> bool:
        """Whether the message was taken; False where the stream is ending or was just cut off."""
        if self._ended:
            return False
        size = message.ByteSize()
        if self._queued_bytes + size > self._max_bytes:
            self.cut()
            return False
        self._messages.append((message, size))
        self._queued_bytes += size
        self._wake.set()
        return True

    def end(self) -> None:
        """Nothing more is taken; the stream ends once what is queued is written."""
        self._ended = True
        self._wake.set()

    def cut(self) -> None:
        """The stream ends at once."""
        self._ended = True
        if not self.cut_off.done():
            self.cut_off.set_result(None)

    async def write_all(self, context: Context) -> None:
        """Until `end`."""
        while True:
            while self._messages:
                message, size = self._messages.popleft()
                await context.write(message)
                self._queued_bytes -= size
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()


async def read_all(context: Context, take: Callable[[Any], None]) -> None:
    """Until the peer ends its side."""
    while (message := await context.read()) is not grpc.aio.EOF:
        take(message)


async def converse(context: Context, outbox: Outbox[M], take: Callable[[Any], None]) -> None:
    """Both directions, until one of them ends. Raises what `take` raised, after a last effort to
    write what is queued."""
    reading = asyncio.create_task(read_all(context, take))
    writing = asyncio.create_task(outbox.write_all(context))
    directions: set[asyncio.Future[None]] = {reading, writing, outbox.cut_off}
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        if reading.done() and not outbox.cut_off.done():
            outbox.end()
            await asyncio.wait({writing, outbox.cut_off}, timeout=1.0)
    finally:
        for direction in (reading, writing):
            direction.cancel()
        await asyncio.wait({reading, writing})
    for direction in (reading, writing):
        if not direction.cancelled() and (error := direction.exception()) is not None:
            raise error


async def first_message(context: Context, timeout_s: float) -> Any:
    """None where the peer ends its side, or says nothing in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            message = await context.read()
            return None if message is grpc.aio.EOF else message
    return None

"""Answers that last: server-sent events, several generations at once, clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.choice import Choice
from gateway.http.errors import error_body
from gateway.requests import Event
from stagemesh.errors import RequestCancelled, StageMeshError

T = TypeVar("T")
_log = structlog.get_logger(__name__)
_DONE = b"data: [DONE]\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client goes away. The body must be read by then.

    Raises RequestCancelled when the client went away.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestCancelled("the client went away")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def events_of(
    choices: Sequence[Choice],
) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
    """Events of all choices as they come, each with its choice's place.

    A choice that fails ends them all. Each may be one event ahead of the reader.
    """
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(len(choices))

    async def feed(index: int, choice: Choice) -> None:
        try:
            async for event in choice.events():
                await queue.put((index, event))
            await queue.put((index, None))
        except Exception as error:  # handed to the reader
            await queue.put((index, error))

    async def drain() -> AsyncIterator[tuple[int, Event]]:
        running = len(choices)
        while running:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                running -= 1
            else:
                yield index, event

    feeding = [asyncio.ensure_future(feed(*pair)) for pair in enumerate(choices)]
    try:
        yield drain()
    finally:
        for task in feeding:
            task.cancel()
        await asyncio.gather(*feeding, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of JSON objects, then [DONE].

    Nothing is sent before the first object is there: an error until then has a status of its own,
    a later one is an event, the last.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        request_id: str,
        slow_client_timeout_s: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Request-Id": request_id})
        del self.headers["content-length"]
        self._chunks = chunks
        self._slow_client_timeout_s = slow_client_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            """Waits while the connection's buffer is full."""
            try:
                async with asyncio.timeout(self._slow_client_timeout_s):
                    await send(message)
            except TimeoutError:
                raise RequestCancelled("the client does not read") from None

        try:
            await unless_disconnected(receive, self._send_all(send_in_time))
        except RequestCancelled as error:
            # Nobody is there to be told; where somebody is, the server closes the connection.
            _log.info("a stream ends early", reason=error.message)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                await _send_event(send, first)
                async for chunk in chunks:
                    await _send_event(send, chunk)
                await _send_body(send, _DONE)
            except StageMeshError as error:
                await _send_event(send, error_body(error))
        await _send_body(send, b"", more=False)


async def _send_event(send: Send, content: dict[str, Any]) -> None:
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    await _send_body(send, f"data: {data}\n\n".encode())


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})

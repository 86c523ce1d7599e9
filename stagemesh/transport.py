"""The data streams between the processes of a pipeline; this module has their answering side.

The dialling side (stagemesh.push_stream, offered from here too) says hello, pushes messages and
pings. The answering side accepts or refuses, receives in order, and ends the stream with a typed
error when it cannot go on, or when its dialler was silent for too long. There is no flow control
beyond that of the connection, since the number of steps in flight is bounded by the scheduler. What
steps mean is the business of the handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from protos import plan_pb2
from stagemesh.errors import InternalError, PeerLost, ProtocolError, StageMeshError
from stagemesh.frames import (
    Hello,
    Message,
    Reassembler,
    StepFrame,
    decode_frame,
    encode_frame,
    hello_from_header,
)
from stagemesh.plan import StepResult
from stagemesh.push_stream import (
    METHOD_NAME,
    PING_TIMEOUT_S,
    SERVICE_NAME,
    PushStream,
    SendMeter,
    Traffic,
    open_push_stream,
)
from stagemesh.rpc import abort_with
from stagemesh.silence import Silence
from stagemesh.wire import error_to_proto

__all__ = [
    "PING_TIMEOUT_S",
    "SERVICE_NAME",
    "Hello",
    "Message",
    "PushHandler",
    "PushStream",
    "SendMeter",
    "StepFrame",
    "StepResult",
    "Traffic",
    "open_push_stream",
    "push_handlers",
]

HELLO_TIMEOUT_S = 10.0
REFUSAL_TIMEOUT_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()


class PushHandler(Protocol):
    """What the answering side does with its streams."""

    async def accept(self, hello: Hello) -> None:
        """May wait for the epoch to be joined; a StageMeshError refuses the stream."""

    async def receive(self, hello: Hello, message: Message) -> None:
        """In the order sent. Must not wait for computation: pings are answered in the same order.

        A StageMeshError ends the stream and tells the sender.
        """

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        """Once for each accepted stream, last; None where the peer ended it in good order."""


def push_handlers(
    handler: PushHandler,
    traffic: Traffic | None = None,
    *,
    ping_timeout_s: Callable[[], float] = lambda: PING_TIMEOUT_S,
) -> grpc.GenericRpcHandler:
    """The answering side's rpc handler, for `RpcServer.server.add_generic_rpc_handlers`.

    `ping_timeout_s` is asked for each stream: without a frame for this long the dialler is lost.
    """
    counted = traffic or Traffic()

    async def push(_: object, context: Context) -> None:
        try:
            await _answer(handler, context, counted, ping_timeout_s)
        except StageMeshError as error:
            await refuse(context, error)

    method: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(push)
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {METHOD_NAME: method})


async def first_frame(context: Context) -> bytes | None:
    """What the dialler says first; None where it went away. Raises ProtocolError."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await context.read()
    except TimeoutError:
        raise ProtocolError(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
    return first if isinstance(first, bytes) else None


async def refuse(context: Context, error: StageMeshError) -> None:
    """Says why, and ends the call. Does not wait for a dialler who does not listen."""
    refusal = plan_pb2.Refusal(error=error_to_proto(error))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            await context.write(encode_frame(plan_pb2.FrameHeader(refusal=refusal)))
    await abort_with(context, error)


async def _answer(
    handler: PushHandler,
    context: Context,
    traffic: Traffic,
    ping_timeout_s: Callable[[], float],
) -> None:
    first = await first_frame(context)
    if first is None:
        return
    hello = hello_from_header(decode_frame(first)[0])
    await handler.accept(hello)
    error: StageMeshError | None = PeerLost(f"the stream from {hello.sender_id} broke")
    silence = Silence(ping_timeout_s())
    try:
        async with silence.limited():
            await _receive_all(handler, hello, context, traffic, silence)
        await context.write(encode_frame(plan_pb2.FrameHeader(pong=plan_pb2.Ping())))
        error = None  # a cut stream also reads as ended, but takes no write
    except (grpc.aio.UsageError, grpc.aio.InternalError):
        pass
    except TimeoutError:
        error = PeerLost(f"{hello.sender_id} was silent for {silence.limit_s:g} s")
        raise error from None
    except StageMeshError as raised:
        error = raised
        raise
    except Exception as raised:
        log.exception("a message could not be taken", sender=hello.sender_id)
        error = InternalError(f"a message could not be taken: {raised!r}")
        raise error from raised
    finally:
        await handler.broken(hello, error)


async def _receive_all(
    handler: PushHandler, hello: Hello, context: Context, traffic: Traffic, silence: Silence
) -> None:
    reassembler = Reassembler()
    while isinstance(frame := await context.read(), bytes):
        silence.heard()
        now_ns = time.perf_counter_ns()
        header, payload = decode_frame(frame)
        traffic.bytes_received += len(frame)
        if header.WhichOneof("kind") == "ping":
            await context.write(encode_frame(plan_pb2.FrameHeader(pong=header.ping)))
            continue
        message = reassembler.feed(header, payload, now_ns)
        if message is not None:
            traffic.messages_received += 1
            await handler.receive(hello, message)

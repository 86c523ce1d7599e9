"""The data streams between the processes of a pipeline; this module has their answering side.

The dialling side (stagemesh.push_stream, offered from here too) says hello, pushes messages and
pings. The answering side accepts or refuses, receives in order, and ends the stream with a typed
error when it cannot go on. There is no flow control beyond that of the connection, since the number
of steps in flight is bounded by the scheduler. What steps mean is the business of the handler.
"""

from __future__ import annotations

import asyncio
import time
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
    SERVICE_NAME,
    PushStream,
    Traffic,
    open_push_stream,
)
from stagemesh.rpc import abort_with
from stagemesh.wire import error_to_proto

__all__ = [
    "SERVICE_NAME",
    "Hello",
    "Message",
    "PushHandler",
    "PushStream",
    "StepFrame",
    "StepResult",
    "Traffic",
    "open_push_stream",
    "push_handlers",
]

HELLO_TIMEOUT_S = 10.0

_Context = grpc.aio.ServicerContext[Any, Any]

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


def push_handlers(handler: PushHandler, traffic: Traffic | None = None) -> grpc.GenericRpcHandler:
    """The answering side's rpc handler, for `RpcServer.server.add_generic_rpc_handlers`."""
    counted = traffic or Traffic()

    async def push(_: object, context: _Context) -> None:
        try:
            await _answer(handler, context, counted)
        except StageMeshError as error:
            refusal = plan_pb2.Refusal(error=error_to_proto(error))
            await context.write(encode_frame(plan_pb2.FrameHeader(refusal=refusal)))
            await abort_with(context, error)

    method: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(push)
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {METHOD_NAME: method})


async def _answer(handler: PushHandler, context: _Context, traffic: Traffic) -> None:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await context.read()
    except TimeoutError:
        raise ProtocolError(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
    if not isinstance(first, bytes):
        return
    hello = hello_from_header(decode_frame(first)[0])
    await handler.accept(hello)
    error: StageMeshError | None = PeerLost(f"the stream from {hello.sender_id} broke")
    try:
        await _receive_all(handler, hello, context, traffic)
        await context.write(encode_frame(plan_pb2.FrameHeader(pong=plan_pb2.Ping())))
        error = None  # a cut stream also reads as ended, but takes no write
    except (grpc.aio.UsageError, grpc.aio.InternalError):
        pass
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
    handler: PushHandler, hello: Hello, context: _Context, traffic: Traffic
) -> None:
    reassembler = Reassembler()
    while isinstance(frame := await context.read(), bytes):
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

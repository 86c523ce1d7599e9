"""The streams that KV pages travel on, asked for by the worker that wants them.

While the answering side waits for its device it says that it lives. What pages are, and who may
have them, is the business of the source.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from protos import plan_pb2
from stagemesh.errors import InternalError, PeerLost, StageMeshError
from stagemesh.frames import decode_frame, encode_frame
from stagemesh.page_frames import (
    BatchAssembler,
    PageBatch,
    PagesRequest,
    encode_batch,
    encode_request,
    request_from_header,
)
from stagemesh.push_stream import PING_INTERVAL_S, SERVICE_NAME
from stagemesh.rpc import make_channel, read_from
from stagemesh.silence import Silence
from stagemesh.transport import Context, first_frame, refuse
from stagemesh.wire import error_from_proto

METHOD_NAME = "Pages"
WRITE_TIMEOUT_S = 30.0

log = structlog.get_logger()


class PageSource(Protocol):
    """Whoever holds pages."""

    def pages(self, request: PagesRequest) -> AsyncGenerator[PageBatch]:
        """Raises a StageMeshError for what it does not give."""
        ...


def page_handlers(source: PageSource) -> grpc.GenericRpcHandler:
    """The answering side's rpc handler, for `RpcServer.server.add_generic_rpc_handlers`."""

    async def pages(_: object, context: Context) -> None:
        try:
            await _answer(source, context)
        except StageMeshError as error:
            log.warning("no pages are given", code=error.code, reason=str(error))
            await refuse(context, error)

    method: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(pages)
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {METHOD_NAME: method})


async def _answer(source: PageSource, context: Context) -> None:
    first = await first_frame(context)
    if first is None:
        return
    request = request_from_header(decode_frame(first)[0])
    async with contextlib.aclosing(source.pages(request)) as batches:
        try:
            while (batch := await _next(batches, context)) is not None:
                for frame in encode_batch(batch):
                    await _write(context, frame)
        except (grpc.aio.UsageError, grpc.aio.InternalError, TimeoutError):
            log.warning("whoever asked for pages is gone", pipeline=request.pipeline_id)
        except StageMeshError:
            raise
        except Exception as raised:
            log.exception("pages could not be given")
            raise InternalError(f"pages could not be given: {raised!r}") from raised


async def _next(batches: AsyncIterator[PageBatch], context: Context) -> PageBatch | None:
    """The next batch, None after the last. Says that this side lives while it has to wait."""
    getting = asyncio.ensure_future(anext(batches, None))
    try:
        while not getting.done():
            await asyncio.wait([getting], timeout=PING_INTERVAL_S)
            if not getting.done():
                await _write(context, encode_frame(plan_pb2.FrameHeader(pong=plan_pb2.Ping())))
        return getting.result()
    finally:
        if not getting.done():
            getting.cancel()
            await asyncio.wait([getting])


async def _write(context: Context, frame: bytes) -> None:
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await context.write(frame)


async def fetch_pages(
    address: str, request: PagesRequest, *, ping_timeout_s: float
) -> AsyncGenerator[PageBatch]:
    """The batches that `address` answers with, until it says that there are no more.

    Raises what the peer refused with, or PeerLost: also where nothing is heard for
    `ping_timeout_s`.
    """
    assembler = BatchAssembler()
    async with make_channel(address) as channel:
        call: grpc.aio.StreamStreamCall[Any, Any] = channel.stream_stream(
            f"/{SERVICE_NAME}/{METHOD_NAME}", None, None
        )()
        try:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(encode_request(request))  # whoever reads learns why it failed
            while (frame := await _read(call, address, ping_timeout_s)) is not None:
                header, payload = decode_frame(frame)
                if header.WhichOneof("kind") == "refusal":
                    raise error_from_proto(header.refusal.error)
                if header.WhichOneof("kind") == "pong":
                    continue
                if (batch := assembler.feed(header, payload)) is not None:
                    yield batch
        finally:
            call.cancel()


async def _read(
    call: grpc.aio.StreamStreamCall[Any, Any], address: str, ping_timeout_s: float
) -> bytes | None:
    try:
        async with Silence(ping_timeout_s).limited():
            return await read_from(call, address)
    except TimeoutError:
        raise PeerLost(f"{address} was silent for {ping_timeout_s:g} s") from None

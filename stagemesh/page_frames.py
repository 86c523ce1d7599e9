"""Frames by which KV pages travel from one worker to another, cut and put together.

A request is one frame. The answer is batches of blocks: a frame with the batch's header and the
first of its payload, and continuations with the rest. What the payload means is the business of
those who hold pages; see protos/plan.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protos import plan_pb2
from stagemesh import wire
from stagemesh.errors import ProtocolError
from stagemesh.frames import (
    MAX_ID_CHARS,
    MAX_PAYLOAD_BYTES,
    SENT_FRAME_BYTES,
    check_protocol_version,
    encode_frame,
)
from stagemesh.plan import Epoch, Span


@dataclass(frozen=True, slots=True)
class PagesRequest:
    """Asks for what the worker that held `span` in a pipeline has in these blocks.

    `epoch` is the one that the asking worker joins.
    """

    pipeline_id: str
    epoch: Epoch
    span: Span
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Some blocks, in order; the first `num_logged` of them with what was logged of them.

    `dtype` is what is computed with, and that of the log; `kv_dtype` is that of the KV.
    """

    block_ids: tuple[int, ...]
    dtype: str
    kv_dtype: str
    kv_block_bytes: int
    log_block_bytes: int
    num_logged: int
    payload: bytes | bytearray | memoryview

    @property
    def num_bytes(self) -> int:
        """What the payload must have."""
        return len(self.block_ids) * self.kv_block_bytes + self.num_logged * self.log_block_bytes


def encode_request(request: PagesRequest) -> bytes:
    message = plan_pb2.PagesRequest(
        pipeline_id=request.pipeline_id,
        epoch=wire.epoch_to_proto(request.epoch),
        start_layer=request.span.start,
        end_layer=request.span.end,
        block_ids=request.block_ids,
        protocol_version=wire.PROTOCOL_VERSION,
    )
    return encode_frame(plan_pb2.FrameHeader(pages_request=message))


def request_from_header(header: plan_pb2.FrameHeader) -> PagesRequest:
    """Raises ProtocolError where it is no request, or one of another protocol."""
    if header.WhichOneof("kind") != "pages_request":
        raise ProtocolError("a stream of pages begins with a request for some")
    message = header.pages_request
    check_protocol_version(message.protocol_version)
    if len(message.pipeline_id) > MAX_ID_CHARS:
        raise ProtocolError(f"a name in a request is longer than {MAX_ID_CHARS} characters")
    return PagesRequest(
        pipeline_id=message.pipeline_id,
        epoch=wire.epoch_from_proto(message.epoch),
        span=Span(message.start_layer, message.end_layer),
        block_ids=tuple(message.block_ids),
    )


def encode_batch(batch: PageBatch) -> Iterator[bytes]:
    """The frames of a batch, made one by one."""
    payload = memoryview(batch.payload).cast("B")
    assert len(payload) == batch.num_bytes
    pages = plan_pb2.Pages(
        block_ids=batch.block_ids,
        dtype=wire.dtype_to_proto(batch.dtype),
        kv_block_bytes=batch.kv_block_bytes,
        log_block_bytes=batch.log_block_bytes,
        num_logged=batch.num_logged,
        kv_dtype=wire.dtype_to_proto(batch.kv_dtype),
    )
    yield encode_frame(plan_pb2.FrameHeader(pages=pages), payload[:SENT_FRAME_BYTES])
    for offset in range(SENT_FRAME_BYTES, len(payload), SENT_FRAME_BYTES):
        continuation = plan_pb2.Continuation(offset_bytes=offset)
        header = plan_pb2.FrameHeader(continuation=continuation)
        yield encode_frame(header, payload[offset : offset + SENT_FRAME_BYTES])


class BatchAssembler:
    """Puts the batches of one answer together, one after another."""

    def __init__(self) -> None:
        self._pages: plan_pb2.Pages | None = None
        self._received = bytearray()

    def feed(self, header: plan_pb2.FrameHeader, payload: memoryview) -> PageBatch | None:
        """The batch that this frame completes, if it does. Raises ProtocolError."""
        kind = header.WhichOneof("kind")
        if kind == "pages" and self._pages is None:
            self._pages, self._received = header.pages, bytearray(payload)
        elif kind == "continuation" and self._pages is not None and payload:
            if header.continuation.offset_bytes != len(self._received):
                raise ProtocolError("pages do not follow one another")
            self._received += payload
        else:
            raise ProtocolError(f"a frame of kind {kind} has no place among pages")
        return self._complete(self._pages)

    def _complete(self, pages: plan_pb2.Pages) -> PageBatch | None:
        batch = PageBatch(
            block_ids=tuple(pages.block_ids),
            dtype=wire.dtype_from_proto(pages.dtype),
            kv_dtype=wire.dtype_from_proto(pages.kv_dtype or pages.dtype),
            kv_block_bytes=pages.kv_block_bytes,
            log_block_bytes=pages.log_block_bytes,
            num_logged=pages.num_logged,
            payload=self._received,
        )
        if batch.num_logged > len(batch.block_ids) or batch.num_bytes > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a batch names {batch.num_bytes} bytes of pages")
        if len(self._received) > batch.num_bytes:
            raise ProtocolError(f"{len(self._received)} bytes came of {batch.num_bytes} of pages")
        if len(self._received) < batch.num_bytes:
            return None
        self._pages, self._received = None, bytearray()
        return batch

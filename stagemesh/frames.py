"""Frames of the data streams: a small protobuf header beside raw bytes, cut and put together.

    frame = header_len (uint32, little endian) | FrameHeader (header_len bytes) | payload

Every malformed frame is a ProtocolError. Knows nothing of streams and connections.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from protos import plan_pb2
from stagemesh import wire, wire_steps
from stagemesh.errors import ProtocolError, StageMeshError
from stagemesh.plan import Epoch, HopTiming, Step, StepResult
from stagemesh.rpc import MAX_FRAME_BYTES, MAX_HEADER_BYTES

SENT_FRAME_BYTES = 2**19
"""Payload of one frame as this side cuts them: a slow link still shows that something moves."""

MAX_PAYLOAD_BYTES = 512 * 2**20
"""Hidden states of one step, over all of its frames."""

MAX_ID_CHARS = 256

_LENGTH = struct.Struct("<I")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a stream. `to_stage` of the scheduler is the number of stages."""

    pipeline_id: str
    epoch: Epoch
    to_stage: int
    sender_id: str


@dataclass(frozen=True, slots=True)
class StepFrame:
    """A step on its way into a stage.

    `payload` holds the hidden states [num_tokens, hidden_size] of the rows that travel, in `dtype`
    ("float32", "bfloat16", "float16", "int8"; "" where there are none). `timings` are those of the
    stages before. `receive_ns` is from the first frame to the last, as measured by the receiver.
    """

    step: Step
    payload: bytes | bytearray | memoryview = b""
    dtype: str = ""
    num_tokens: int = 0
    hidden_size: int = 0
    timings: tuple[HopTiming, ...] = ()
    receive_ns: int = 0


Message = StepFrame | StepResult


def encode_frame(header: plan_pb2.FrameHeader, payload: bytes | memoryview = b"") -> bytes:
    """Raises ProtocolError for a header that no receiver would take."""
    encoded = header.SerializeToString()
    if len(encoded) > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"a header of {len(encoded)} bytes is over the limit of {MAX_HEADER_BYTES}"
        )
    return b"".join((_LENGTH.pack(len(encoded)), encoded, payload))


def decode_frame(frame: bytes) -> tuple[plan_pb2.FrameHeader, memoryview]:
    """(header, payload); the payload is a view of `frame`. Raises ProtocolError."""
    if len(frame) < _LENGTH.size:
        raise ProtocolError(f"a frame of {len(frame)} bytes has no header length")
    (header_bytes,) = _LENGTH.unpack_from(frame)
    start = _LENGTH.size + header_bytes
    if header_bytes > MAX_HEADER_BYTES or start > len(frame):
        raise ProtocolError(f"a frame of {len(frame)} bytes names {header_bytes} of header")
    if len(frame) - start > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame has {len(frame) - start} bytes of payload")
    view = memoryview(frame)
    header = plan_pb2.FrameHeader()
    try:
        header.ParseFromString(frame[_LENGTH.size : start])
    except DecodeError as error:
        raise ProtocolError(f"a frame's header cannot be read: {error}") from None
    return header, view[start:]


def hidden_bytes(dtype: str, num_tokens: int, hidden_size: int) -> int:
    """Hidden states of so many tokens on their way; int8 ones have a float32 scale each."""
    scale_bytes = 4 if dtype == "int8" else 0
    return num_tokens * (hidden_size * _DTYPE_BYTES.get(dtype, 0) + scale_bytes)


def hello_header(hello: Hello) -> plan_pb2.FrameHeader:
    message = plan_pb2.StreamHello(
        pipeline_id=hello.pipeline_id,
        epoch=wire.epoch_to_proto(hello.epoch),
        to_stage=hello.to_stage,
        sender_id=hello.sender_id,
        protocol_version=wire.PROTOCOL_VERSION,
    )
    return plan_pb2.FrameHeader(hello=message)


def check_protocol_version(version: int) -> None:
    """Raises ProtocolError for another than this side's."""
    if version != wire.PROTOCOL_VERSION:
        raise ProtocolError(
            f"the peer speaks protocol {version}, this side {wire.PROTOCOL_VERSION}"
        )


def hello_from_header(header: plan_pb2.FrameHeader) -> Hello:
    """Raises ProtocolError where it is no hello, or one of another protocol."""
    if header.WhichOneof("kind") != "hello":
        raise ProtocolError("a stream begins with a hello")
    message = header.hello
    check_protocol_version(message.protocol_version)
    if max(len(message.pipeline_id), len(message.sender_id)) > MAX_ID_CHARS:
        raise ProtocolError(f"a name in a hello is longer than {MAX_ID_CHARS} characters")
    epoch = wire.epoch_from_proto(message.epoch)
    return Hello(message.pipeline_id, epoch, message.to_stage, message.sender_id)


def encode_message(message: Message) -> Iterator[bytes]:
    """The frames of a message, made one by one.

    Where the last timing has no `serialise_ns` yet, it is the sender's own and gets the time that
    making the header took (the last copy of the payload cannot be timed in its own frame).
    """
    if isinstance(message, StepResult):
        yield _encode_result(message)
    else:
        yield from _encode_step(message)


def _encode_result(result: StepResult) -> bytes:
    start_ns = time.perf_counter_ns()
    header = plan_pb2.FrameHeader()
    wire_steps.write_step_result(header.result, replace(result, timings=()))
    header.result.timings.extend(_finished_timings(result.timings, start_ns))
    return encode_frame(header)


def _encode_step(message: StepFrame) -> Iterator[bytes]:
    start_ns = time.perf_counter_ns()
    payload = memoryview(message.payload).cast("B")
    header = plan_pb2.FrameHeader()
    wire_steps.write_step(header.step.step, message.step)
    header.step.dtype = wire.dtype_to_proto(message.dtype)
    header.step.num_tokens = message.num_tokens
    header.step.hidden_size = message.hidden_size
    header.step.payload_bytes = len(payload)
    header.step.timings.extend(_finished_timings(message.timings, start_ns))
    yield encode_frame(header, payload[:SENT_FRAME_BYTES])
    for offset in range(SENT_FRAME_BYTES, len(payload), SENT_FRAME_BYTES):
        continuation = plan_pb2.Continuation(step=message.step.step, offset_bytes=offset)
        header = plan_pb2.FrameHeader(continuation=continuation)
        yield encode_frame(header, payload[offset : offset + SENT_FRAME_BYTES])


def _finished_timings(
    timings: tuple[HopTiming, ...], start_ns: int
) -> Iterator[plan_pb2.HopTiming]:
    for timing in timings[:-1]:
        yield wire_steps.hop_timing_to_proto(timing)
    for timing in timings[-1:]:
        spent_ns = timing.serialise_ns or time.perf_counter_ns() - start_ns
        yield wire_steps.hop_timing_to_proto(replace(timing, serialise_ns=spent_ns))


class Reassembler:
    """Puts the messages of one stream together. At most one step is incomplete at a time."""

    def __init__(self) -> None:
        self._header: plan_pb2.StepHeader | None = None
        self._received = bytearray()
        self._first_frame_ns = 0

    def feed(
        self, header: plan_pb2.FrameHeader, payload: memoryview, now_ns: int
    ) -> Message | None:
        """The message that this frame completes, if it does. Raises ProtocolError."""
        kind = header.WhichOneof("kind")
        if kind == "continuation":
            return self._continue(header.continuation, payload, now_ns)
        if self._header is not None:
            raise ProtocolError(f"step {self._header.step.step} is cut off by another frame")
        if kind == "step":
            return self._begin(header.step, payload, now_ns)
        if kind == "result" and not payload:
            return _checked_result(header.result)
        raise ProtocolError(f"a frame of kind {kind} has no place here")

    def _begin(
        self, header: plan_pb2.StepHeader, payload: memoryview, now_ns: int
    ) -> StepFrame | None:
        _check_payload_size(header, len(payload))
        self._first_frame_ns = now_ns
        if len(payload) == header.payload_bytes:
            return self._complete(header, payload, now_ns)
        self._header = header
        self._received = bytearray(payload)
        return None

    def _continue(
        self, continuation: plan_pb2.Continuation, payload: memoryview, now_ns: int
    ) -> StepFrame | None:
        header = self._header
        if header is None or continuation.step != header.step.step:
            raise ProtocolError(f"nothing of step {continuation.step} is to be continued")
        missing_bytes = header.payload_bytes - len(self._received)
        if continuation.offset_bytes != len(self._received) or not (
            0 < len(payload) <= missing_bytes
        ):
            raise ProtocolError(f"a continuation of step {continuation.step} does not fit")
        self._received += payload
        if len(payload) < missing_bytes:
            return None
        received, self._received, self._header = self._received, bytearray(), None
        return self._complete(header, received, now_ns)

    def _complete(
        self, header: plan_pb2.StepHeader, payload: bytearray | memoryview, now_ns: int
    ) -> StepFrame:
        return StepFrame(
            step=_checked_step(header.step),
            payload=payload,
            dtype=wire.dtype_from_proto(header.dtype),
            num_tokens=header.num_tokens,
            hidden_size=header.hidden_size,
            timings=tuple(wire_steps.hop_timing_from_proto(timing) for timing in header.timings),
            receive_ns=max(0, now_ns - self._first_frame_ns),
        )


def _check_payload_size(header: plan_pb2.StepHeader, first_bytes: int) -> None:
    dtype = wire.dtype_from_proto(header.dtype)
    expected_bytes = hidden_bytes(dtype, header.num_tokens, header.hidden_size)
    if header.payload_bytes != expected_bytes:
        raise ProtocolError(
            f"a step names {header.payload_bytes} bytes of hidden states, its shape and dtype "
            f"make {expected_bytes}"
        )
    if header.payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a step names {header.payload_bytes} bytes of hidden states")
    if first_bytes > header.payload_bytes:
        raise ProtocolError(f"a step names {header.payload_bytes} bytes, {first_bytes} came")
    if first_bytes == 0 < header.payload_bytes:
        raise ProtocolError("a step's first frame has none of its hidden states")


def _checked_step(message: plan_pb2.Step) -> Step:
    try:
        return wire_steps.step_from_proto(message)
    except StageMeshError as error:
        raise ProtocolError(f"a step cannot be taken: {error}") from error


def _checked_result(message: plan_pb2.StepResult) -> StepResult:
    return wire_steps.step_result_from_proto(message)

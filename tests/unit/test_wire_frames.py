"""Frames: messages survive them, and every malformed one is a ProtocolError."""

from __future__ import annotations

import struct
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plan_values import EPOCHS, RESULTS, STEPS, TEXT, TIMINGS, U32

from protos import plan_pb2
from stagemesh.errors import ProtocolError
from stagemesh.frames import (
    MAX_PAYLOAD_BYTES,
    Hello,
    Reassembler,
    StepFrame,
    decode_frame,
    encode_frame,
    encode_message,
    hello_from_header,
    hello_header,
)
from stagemesh.plan import Epoch, HopTiming, Step, StepResult
from stagemesh.rpc import MAX_FRAME_BYTES


def reassemble(frames: typing.Iterable[bytes]) -> list[object]:
    reassembler = Reassembler()
    fed = [reassembler.feed(*decode_frame(frame), 0) for frame in frames]
    return [message for message in fed if message is not None]


@given(step=STEPS, num_tokens=st.integers(0, 40), timings=st.lists(TIMINGS, max_size=2))
def test_a_step_frame_survives(step: Step, num_tokens: int, timings: list[HopTiming]) -> None:
    payload = bytes(range(256))[: num_tokens * 6]
    sent = StepFrame(
        step=step,
        payload=payload,
        dtype="float16" if payload else "",
        num_tokens=num_tokens,
        hidden_size=3,
        timings=tuple(timings),
    )
    assert reassemble(encode_message(sent)) == [sent]


@given(result=RESULTS)
def test_a_result_frame_survives(result: StepResult) -> None:
    assert reassemble(encode_message(result)) == [result]


@given(EPOCHS, U32, TEXT, TEXT)
def test_a_hello_survives(epoch: Epoch, stage: int, pipeline: str, sender: str) -> None:
    hello = Hello(pipeline, epoch, stage, sender)
    assert hello_from_header(decode_frame(encode_frame(hello_header(hello)))[0]) == hello


def test_a_hello_of_another_protocol_is_refused() -> None:
    header = hello_header(Hello("p", Epoch(1, 1), 0, "w"))
    header.hello.protocol_version += 1
    with pytest.raises(ProtocolError, match="protocol 2"):
        hello_from_header(header)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_protocol_error_or_a_frame(frame: bytes) -> None:
    feed_or_protocol_error([frame])


@given(step=STEPS, result=RESULTS, data=st.data())
def test_damaged_frames_are_a_protocol_error_or_a_frame(
    step: Step, result: StepResult, data: st.DataObject
) -> None:
    sent = StepFrame(step, b"abcd" * 3, "float32", num_tokens=3, hidden_size=1)
    frames = [*encode_message(sent), *encode_message(result)]
    damaged = bytearray(frames[data.draw(st.integers(0, 1))])
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= data.draw(st.integers(1, 255))
    feed_or_protocol_error([bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), frames[0]])


def feed_or_protocol_error(frames: list[bytes]) -> None:
    try:
        reassemble(frames)
        hello_from_header(decode_frame(frames[0])[0])
    except ProtocolError:
        pass


def step_header(**values: int) -> plan_pb2.FrameHeader:
    shape = {"dtype": plan_pb2.DTYPE_FLOAT32, "num_tokens": 2, "hidden_size": 1} | values
    return plan_pb2.FrameHeader(step=plan_pb2.StepHeader(**shape))  # type: ignore[arg-type]


def continuation(step: int, offset_bytes: int) -> plan_pb2.FrameHeader:
    message = plan_pb2.Continuation(step=step, offset_bytes=offset_bytes)
    return plan_pb2.FrameHeader(continuation=message)


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        pytest.param([(step_header(payload_bytes=7), b"abcdefg")], "7 bytes", id="shape"),
        pytest.param([(step_header(payload_bytes=8), b"x" * 9)], "9 came", id="too much"),
        pytest.param([(step_header(payload_bytes=8), b"")], "none of its", id="nothing"),
        pytest.param([(step_header(dtype=9, payload_bytes=8), b"x" * 8)], "dtype 9", id="dtype"),
        pytest.param(
            [
                (
                    step_header(num_tokens=MAX_PAYLOAD_BYTES, payload_bytes=4 * MAX_PAYLOAD_BYTES),
                    b"x",
                )
            ],
            "bytes of hidden",
            id="huge",
        ),
        pytest.param([(continuation(0, 0), b"x")], "nothing of step 0", id="no start"),
        pytest.param(
            [(step_header(payload_bytes=8), b"xxxx"), (continuation(0, 3), b"xxxx")],
            "does not fit",
            id="offset",
        ),
        pytest.param(
            [(step_header(payload_bytes=8), b"xxxx"), (continuation(0, 4), b"x" * 5)],
            "does not fit",
            id="overrun",
        ),
        pytest.param(
            [(step_header(payload_bytes=8), b"xxxx"), (continuation(0, 4), b"")],
            "does not fit",
            id="empty",
        ),
        pytest.param(
            [(step_header(payload_bytes=8), b"xxxx"), (continuation(1, 4), b"xxxx")],
            "nothing of step 1",
            id="other step",
        ),
        pytest.param(
            [(step_header(payload_bytes=8), b"xxxx"), (step_header(), b"")], "cut off", id="cut off"
        ),
        pytest.param([(plan_pb2.FrameHeader(), b"")], "kind None", id="no kind"),
        pytest.param(
            [(plan_pb2.FrameHeader(result=plan_pb2.StepResult()), b"x")], "result", id="payload"
        ),
    ],
)
def test_frames_that_make_no_sense(
    frames: list[tuple[plan_pb2.FrameHeader, bytes]], complaint: str
) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        reassemble(encode_frame(header, payload) for header, payload in frames)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0\0",
        struct.pack("<I", 5) + b"abcd",
        struct.pack("<I", 2**32 - 1) + b"abcd",
        struct.pack("<I", 0) + bytes(MAX_FRAME_BYTES + 1),
    ],
    ids=["empty", "short", "cut header", "huge header", "huge payload"],
)
def test_what_is_no_frame(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(frame)


def test_a_step_with_senseless_sampling_is_a_protocol_error() -> None:
    row = plan_pb2.Row()
    row.state.sampling.temperature = -1
    header = plan_pb2.FrameHeader(step=plan_pb2.StepHeader(step=plan_pb2.Step(rows=[row])))
    with pytest.raises(ProtocolError, match="temperature"):
        reassemble([encode_frame(header)])

"""Every value of the plan survives the wire; every malformed frame is a ProtocolError."""

from __future__ import annotations

import dataclasses
import struct
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import plan_pb2
from stagemesh import plan, wire
from stagemesh.errors import InvalidRequest, ProtocolError, StaleEpoch, from_code
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
from stagemesh.plan import NOT_FINITE, Epoch, HopTiming, RowResult, Step, StepResult
from stagemesh.rpc import MAX_FRAME_BYTES
from stagemesh.sampling import SamplingSpec

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
FEW_U32 = st.lists(U32, max_size=4).map(tuple)
TEXT = st.text(max_size=8)


def real(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


EPOCHS = st.builds(Epoch, U64, U64)
SAMPLINGS = st.builds(
    SamplingSpec,
    temperature=real(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=real(0.5, 1),
    min_p=real(0, 1),
    repetition_penalty=real(0.5, 1000),
    presence_penalty=real(-2, 2),
    frequency_penalty=real(-2, 2),
    logit_bias=st.dictionaries(U32, real(-100, 100), max_size=3),
    seed=U64,
    min_tokens=st.integers(0, 2**31 - 1),
    stop_token_ids=FEW_U32,
    num_logprobs=st.none() | st.integers(0, 20),
    num_prompt_logprobs=st.none() | st.integers(0, 20),
)
STATES = st.builds(plan.SequenceState, FEW_U32, FEW_U32, SAMPLINGS, U32)
RUNS = st.builds(plan.SequenceRun, U64, U32)
UPDATES = st.builds(plan.BlockUpdate, U32, FEW_U32)
ROWS = st.builds(
    plan.Row,
    sequence_id=U64,
    run=U32,
    start=U32,
    num_tokens=U32,
    token_ids=FEW_U32,
    block_updates=st.lists(UPDATES, max_size=2).map(tuple),
    first_stage=U32,
    end_stage=U32,
    sample_positions=FEW_U32,
    logprob_positions=FEW_U32,
    input_from_log_of_stage=st.none() | U32,
    state=st.none() | STATES,
)
STEPS = st.builds(
    Step,
    pipeline_id=TEXT,
    epoch=EPOCHS,
    step=U64,
    rows=st.lists(ROWS, max_size=3).map(tuple),
    forget=st.lists(RUNS, max_size=2).map(tuple),
)
TOKENS = st.builds(
    plan.SampledToken,
    position=U32,
    token_id=U32,
    logprob=st.none() | real(-1e9, 0),
    alternatives=st.lists(st.tuples(U32, real(-1e9, 0)), max_size=3).map(tuple),
)
ROW_RESULTS = st.builds(
    RowResult,
    sequence_id=U64,
    run=U32,
    sampled=st.lists(TOKENS, max_size=2).map(tuple),
    prompt_logprobs=st.lists(TOKENS, max_size=2).map(tuple),
    error=st.sampled_from([None, NOT_FINITE]),
)
TIMINGS = st.builds(HopTiming, U32, U64, U64, U64, st.integers(1, 2**63), U64, U64)
RESULTS = st.builds(
    StepResult,
    pipeline_id=TEXT,
    epoch=EPOCHS,
    step=U64,
    rows=st.lists(ROW_RESULTS, max_size=3).map(tuple),
    timings=st.lists(TIMINGS, max_size=3).map(tuple),
)
SUMMARIES = st.builds(
    plan.ModelSummary,
    name=TEXT,
    architecture=TEXT,
    num_layers=U32,
    hidden_size=U32,
    vocab_size=U32,
    max_position=U32,
    layer_bytes=U64,
    embedding_bytes=U64,
    head_bytes=U64,
    structure_hash=TEXT,
    part_hashes=st.dictionaries(TEXT, TEXT, max_size=3),
    dynamic_rope_length=U32,
)
CONVERSIONS = {
    Epoch: (EPOCHS, wire.epoch_to_proto, wire.epoch_from_proto),
    plan.Span: (st.builds(plan.Span, U32, U32), wire.span_to_proto, wire.span_from_proto),
    plan.SequenceRun: (RUNS, wire.sequence_run_to_proto, wire.sequence_run_from_proto),
    plan.BlockUpdate: (UPDATES, wire.block_update_to_proto, wire.block_update_from_proto),
    plan.SequenceState: (STATES, wire.sequence_state_to_proto, wire.sequence_state_from_proto),
    plan.Row: (ROWS, wire.row_to_proto, wire.row_from_proto),
    Step: (STEPS, wire.step_to_proto, wire.step_from_proto),
    plan.SampledToken: (TOKENS, wire.sampled_token_to_proto, wire.sampled_token_from_proto),
    RowResult: (ROW_RESULTS, wire.row_result_to_proto, wire.row_result_from_proto),
    HopTiming: (TIMINGS, wire.hop_timing_to_proto, wire.hop_timing_from_proto),
    StepResult: (RESULTS, wire.step_result_to_proto, wire.step_result_from_proto),
    plan.ModelSummary: (SUMMARIES, wire.model_summary_to_proto, wire.model_summary_from_proto),
    SamplingSpec: (SAMPLINGS, wire.sampling_to_proto, wire.sampling_from_proto),
}


@pytest.mark.parametrize("cls", CONVERSIONS, ids=lambda cls: str(cls.__name__))
@given(data=st.data())
def test_a_value_survives_the_wire(cls: type, data: st.DataObject) -> None:
    values, to_proto, from_proto = typing.cast(typing.Any, CONVERSIONS[cls])
    value = data.draw(values)
    message = to_proto(value)
    assert from_proto(type(message).FromString(message.SerializeToString())) == value


def test_every_dataclass_of_the_plan_has_conversions() -> None:
    declared = {
        value
        for value in vars(plan).values()
        if dataclasses.is_dataclass(value) and isinstance(value, type)
    }
    assert declared == set(CONVERSIONS)


def test_values_out_of_range_name_their_parameter() -> None:
    message = wire.sampling_to_proto(SamplingSpec())
    message.temperature = float("nan")
    with pytest.raises(InvalidRequest, match="temperature"):
        wire.sampling_from_proto(message)


@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16", "float16"])
def test_dtypes_survive_the_wire(dtype: str) -> None:
    assert wire.dtype_from_proto(wire.dtype_to_proto(dtype)) == dtype


def test_an_unknown_dtype_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="99"):
        wire.dtype_from_proto(99)


def test_errors_keep_their_type_and_long_messages_are_cut() -> None:
    error = wire.error_from_proto(wire.error_to_proto(StaleEpoch("x" * 10_000)))
    assert isinstance(error, StaleEpoch)
    assert 0 < len(error.message) < 10_000
    assert from_code("nobody knows", "message").code == "internal"


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

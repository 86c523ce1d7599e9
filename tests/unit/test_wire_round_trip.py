"""Every value of the plan survives the wire; every malformed frame is a ProtocolError."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plan_values import (
    EPOCHS,
    RESULTS,
    ROW_RESULTS,
    ROWS,
    RUNS,
    SAMPLINGS,
    STATES,
    STEPS,
    SUMMARIES,
    TIMINGS,
    TOKENS,
    U32,
    UPDATES,
)

from stagemesh import plan, wire
from stagemesh import wire_steps as steps
from stagemesh.errors import InvalidRequest, ProtocolError, StaleEpoch, from_code
from stagemesh.plan import Epoch, HopTiming, RowResult, Step, StepResult
from stagemesh.sampling import SamplingSpec

CONVERSIONS = {
    Epoch: (EPOCHS, wire.epoch_to_proto, wire.epoch_from_proto),
    plan.Span: (st.builds(plan.Span, U32, U32), wire.span_to_proto, wire.span_from_proto),
    plan.SequenceRun: (RUNS, wire.sequence_run_to_proto, wire.sequence_run_from_proto),
    plan.BlockUpdate: (
        UPDATES,
        steps.block_update_to_proto,
        steps.block_update_from_proto,
    ),
    plan.SequenceState: (STATES, wire.sequence_state_to_proto, wire.sequence_state_from_proto),
    plan.Row: (ROWS, steps.row_to_proto, steps.row_from_proto),
    Step: (STEPS, steps.step_to_proto, steps.step_from_proto),
    plan.SampledToken: (
        TOKENS,
        steps.sampled_token_to_proto,
        steps.sampled_token_from_proto,
    ),
    RowResult: (ROW_RESULTS, steps.row_result_to_proto, steps.row_result_from_proto),
    HopTiming: (TIMINGS, steps.hop_timing_to_proto, steps.hop_timing_from_proto),
    StepResult: (RESULTS, steps.step_result_to_proto, steps.step_result_from_proto),
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
        if isinstance(value, type) and (dataclasses.is_dataclass(value) or issubclass(value, tuple))
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

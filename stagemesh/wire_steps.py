"""Steps and their results as protobuf messages, and back: what travels with every step.

As in stagemesh.wire. Messages are written where they belong, by `write_*`, since protobuf copies a
message that is put into another one; and what a row seldom has is asked for before it is touched.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from protos import plan_pb2
from stagemesh.errors import ProtocolError
from stagemesh.plan import (
    NOT_FINITE,
    BlockUpdate,
    HopTiming,
    Row,
    RowResult,
    SampledToken,
    Step,
    StepResult,
)
from stagemesh.wire import (
    epoch_from_proto,
    epoch_to_proto,
    sequence_run_from_proto,
    sequence_state_from_proto,
    sequence_state_to_proto,
)

_ROW_ERRORS = {None: plan_pb2.ROW_ERROR_UNSPECIFIED, NOT_FINITE: plan_pb2.ROW_ERROR_NOT_FINITE}
_ROW_ERROR_NAMES = {number: name for name, number in _ROW_ERRORS.items()}
_TIMING_FIELDS = tuple(field.name for field in fields(HopTiming))


def block_update_to_proto(update: BlockUpdate) -> plan_pb2.BlockUpdate:
    return plan_pb2.BlockUpdate(first_index=update.first_index, block_ids=update.block_ids)


def block_update_from_proto(message: plan_pb2.BlockUpdate) -> BlockUpdate:
    return BlockUpdate(message.first_index, tuple(message.block_ids))


def row_to_proto(row: Row) -> plan_pb2.Row:
    message = plan_pb2.Row()
    write_row(message, row)
    return message


def write_row(message: plan_pb2.Row, row: Row) -> None:
    message.sequence_id = row.sequence_id
    message.run = row.run
    message.start = row.start
    message.num_tokens = row.num_tokens
    message.end_stage = row.end_stage
    message.token_ids.extend(row.token_ids)
    message.sample_positions.extend(row.sample_positions)
    for update in row.block_updates:
        message.block_updates.add(first_index=update.first_index, block_ids=update.block_ids)
    if row.logprob_positions:
        message.logprob_positions.extend(row.logprob_positions)
    if row.first_stage:
        message.first_stage = row.first_stage
    if row.first_writing_stage:
        message.first_writing_stage = row.first_writing_stage
    if row.input_from_log_of_stage is not None:
        message.input_from_log_of_stage = row.input_from_log_of_stage
    if row.state is not None:
        message.state.CopyFrom(sequence_state_to_proto(row.state))


def row_from_proto(message: plan_pb2.Row) -> Row:
    """Raises InvalidRequest for sampling parameters out of range."""
    has_log = message.HasField("input_from_log_of_stage")
    has_state = message.HasField("state")
    return Row(
        message.sequence_id,
        message.run,
        message.start,
        message.num_tokens,
        tuple(message.token_ids),
        tuple([block_update_from_proto(update) for update in message.block_updates]),
        message.first_stage,
        message.end_stage,
        tuple(message.sample_positions),
        tuple(message.logprob_positions),
        message.input_from_log_of_stage if has_log else None,
        sequence_state_from_proto(message.state) if has_state else None,
        message.first_writing_stage,
    )


def step_to_proto(step: Step) -> plan_pb2.Step:
    message = plan_pb2.Step()
    write_step(message, step)
    return message


def write_step(message: plan_pb2.Step, step: Step) -> None:
    message.pipeline_id = step.pipeline_id
    message.epoch.CopyFrom(epoch_to_proto(step.epoch))
    message.step = step.step
    for run in step.forget:
        message.forget.add(sequence_id=run.sequence_id, run=run.run)
    add_row = message.rows.add
    for row in step.rows:
        write_row(add_row(), row)
    if step.alone:
        message.alone = True


def step_from_proto(message: plan_pb2.Step) -> Step:
    """Raises InvalidRequest for sampling parameters out of range."""
    return Step(
        pipeline_id=message.pipeline_id,
        epoch=epoch_from_proto(message.epoch),
        step=message.step,
        rows=tuple([row_from_proto(row) for row in message.rows]),
        forget=tuple([sequence_run_from_proto(run) for run in message.forget]),
        alone=message.alone,
    )


def sampled_token_to_proto(token: SampledToken) -> plan_pb2.SampledToken:
    message = plan_pb2.SampledToken()
    write_token(message, token)
    return message


def write_token(message: plan_pb2.SampledToken, token: SampledToken) -> None:
    message.position = token.position
    message.token_id = token.token_id
    if token.logprob is not None:
        message.logprob = token.logprob
    for token_id, logprob in token.alternatives:
        message.alternative_ids.append(token_id)
        message.alternative_logprobs.append(logprob)


def sampled_token_from_proto(message: plan_pb2.SampledToken) -> SampledToken:
    """Raises ProtocolError where alternatives and their log-probabilities differ in number."""
    token_ids, logprobs = message.alternative_ids, message.alternative_logprobs
    if len(token_ids) != len(logprobs):
        raise ProtocolError("a sampled token has alternatives without log-probabilities")
    return SampledToken(
        message.position,
        message.token_id,
        message.logprob if message.HasField("logprob") else None,
        tuple(zip(token_ids, logprobs, strict=True)) if token_ids else (),
    )


def row_result_to_proto(row: RowResult) -> plan_pb2.RowResult:
    message = plan_pb2.RowResult()
    write_row_result(message, row)
    return message


def write_row_result(message: plan_pb2.RowResult, row: RowResult) -> None:
    message.sequence_id = row.sequence_id
    message.run = row.run
    for token in row.sampled:
        write_token(message.sampled.add(), token)
    for token in row.prompt_logprobs:
        write_token(message.prompt_logprobs.add(), token)
    if row.error is not None:
        message.error = _ROW_ERRORS[row.error]


def row_result_from_proto(message: plan_pb2.RowResult) -> RowResult:
    """Raises ProtocolError for an error that this version does not know."""
    error = message.error
    if error not in _ROW_ERROR_NAMES:
        raise ProtocolError(f"unknown row error {error}")
    return RowResult(
        message.sequence_id,
        message.run,
        tuple([sampled_token_from_proto(token) for token in message.sampled]),
        tuple([sampled_token_from_proto(token) for token in message.prompt_logprobs]),
        _ROW_ERROR_NAMES[error],
    )


def hop_timing_to_proto(timing: HopTiming) -> plan_pb2.HopTiming:
    return plan_pb2.HopTiming(**_timing_values(timing))


def hop_timing_from_proto(message: plan_pb2.HopTiming) -> HopTiming:
    return HopTiming(**_timing_values(message))


def step_result_to_proto(result: StepResult) -> plan_pb2.StepResult:
    message = plan_pb2.StepResult()
    write_step_result(message, result)
    return message


def write_step_result(message: plan_pb2.StepResult, result: StepResult) -> None:
    message.pipeline_id = result.pipeline_id
    message.epoch.CopyFrom(epoch_to_proto(result.epoch))
    message.step = result.step
    add_row = message.rows.add
    for row in result.rows:
        write_row_result(add_row(), row)
    message.timings.extend([hop_timing_to_proto(timing) for timing in result.timings])


def step_result_from_proto(message: plan_pb2.StepResult) -> StepResult:
    """Raises ProtocolError."""
    return StepResult(
        pipeline_id=message.pipeline_id,
        epoch=epoch_from_proto(message.epoch),
        step=message.step,
        rows=tuple([row_result_from_proto(row) for row in message.rows]),
        timings=tuple([hop_timing_from_proto(timing) for timing in message.timings]),
    )


def _timing_values(source: HopTiming | plan_pb2.HopTiming) -> dict[str, Any]:
    return {name: getattr(source, name) for name in _TIMING_FIELDS}

"""The plan and its values as protobuf messages, and back.

`<name>_to_proto` and `<name>_from_proto` for every dataclass of stagemesh.plan, for SamplingSpec
and for errors. What comes from a peer is checked here as far as types and ranges go; whether a plan
makes sense is for those who execute it. Frames, which carry these messages beside raw bytes, are
the business of stagemesh.frames.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from protos import mesh_pb2, plan_pb2
from stagemesh.errors import ProtocolError, StageMeshError, from_code
from stagemesh.plan import (
    NOT_FINITE,
    BlockUpdate,
    Epoch,
    HopTiming,
    ModelSummary,
    Row,
    RowResult,
    SampledToken,
    SequenceRun,
    SequenceState,
    Span,
    Step,
    StepResult,
)
from stagemesh.sampling import SamplingSpec

PROTOCOL_VERSION = 1

_MAX_ERROR_CHARS = 4000

_DTYPES = {
    "": plan_pb2.DTYPE_UNSPECIFIED,
    "float32": plan_pb2.DTYPE_FLOAT32,
    "bfloat16": plan_pb2.DTYPE_BFLOAT16,
    "float16": plan_pb2.DTYPE_FLOAT16,
    "int8": plan_pb2.DTYPE_INT8,
}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}

_ROW_ERRORS = {None: plan_pb2.ROW_ERROR_UNSPECIFIED, NOT_FINITE: plan_pb2.ROW_ERROR_NOT_FINITE}
_ROW_ERROR_NAMES = {number: name for name, number in _ROW_ERRORS.items()}

# Fields of a plain type, which have the same name on both sides.
_SAMPLING_FIELDS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "min_tokens"),
)
_TIMING_FIELDS = tuple(field.name for field in fields(HopTiming))
_SUMMARY_FIELDS = tuple(field.name for field in fields(ModelSummary) if field.name != "part_hashes")


def dtype_to_proto(name: str) -> plan_pb2.DType:
    """`name` is "float32", "bfloat16", "float16", "int8", or "" for unspecified."""
    return _DTYPES[name]


def dtype_from_proto(number: int) -> str:
    """Raises ProtocolError for a dtype that this version does not know."""
    name = _DTYPE_NAMES.get(number)  # type: ignore[call-overload]
    if name is None:
        raise ProtocolError(f"unknown dtype {number}")
    return str(name)


def error_to_proto(error: StageMeshError) -> plan_pb2.Error:
    return plan_pb2.Error(code=error.code, message=error.message[:_MAX_ERROR_CHARS])


def error_from_proto(message: plan_pb2.Error) -> StageMeshError:
    return from_code(message.code, message.message)


def epoch_to_proto(epoch: Epoch) -> plan_pb2.Epoch:
    return plan_pb2.Epoch(term=epoch.term, n=epoch.n)


def epoch_from_proto(message: plan_pb2.Epoch) -> Epoch:
    return Epoch(message.term, message.n)


def span_to_proto(span: Span) -> mesh_pb2.LayerSpan:
    return mesh_pb2.LayerSpan(start=span.start, end=span.end)


def span_from_proto(message: mesh_pb2.LayerSpan) -> Span:
    return Span(message.start, message.end)


def sequence_run_to_proto(run: SequenceRun) -> plan_pb2.SequenceRun:
    return plan_pb2.SequenceRun(sequence_id=run.sequence_id, run=run.run)


def sequence_run_from_proto(message: plan_pb2.SequenceRun) -> SequenceRun:
    return SequenceRun(message.sequence_id, message.run)


def block_update_to_proto(update: BlockUpdate) -> plan_pb2.BlockUpdate:
    return plan_pb2.BlockUpdate(first_index=update.first_index, block_ids=update.block_ids)


def block_update_from_proto(message: plan_pb2.BlockUpdate) -> BlockUpdate:
    return BlockUpdate(message.first_index, tuple(message.block_ids))


def sampling_to_proto(spec: SamplingSpec) -> plan_pb2.SamplingSpec:
    """Real numbers lose what float32 cannot hold; after one passage nothing more is lost."""
    return plan_pb2.SamplingSpec(
        **_values(spec, _SAMPLING_FIELDS),
        logit_bias=dict(spec.logit_bias),
        stop_token_ids=spec.stop_token_ids,
        num_logprobs=spec.num_logprobs,
        num_prompt_logprobs=spec.num_prompt_logprobs,
    )


def sampling_from_proto(message: plan_pb2.SamplingSpec) -> SamplingSpec:
    """Raises InvalidRequest, naming the parameter that is out of range."""
    has_prompt_logprobs = message.HasField("num_prompt_logprobs")
    return SamplingSpec(
        **_values(message, _SAMPLING_FIELDS),
        logit_bias=dict(message.logit_bias),
        stop_token_ids=tuple(message.stop_token_ids),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        num_prompt_logprobs=message.num_prompt_logprobs if has_prompt_logprobs else None,
    )


def sequence_state_to_proto(state: SequenceState) -> plan_pb2.SequenceState:
    return plan_pb2.SequenceState(
        prompt_token_ids=state.prompt_token_ids,
        output_token_ids=state.output_token_ids,
        sampling=sampling_to_proto(state.sampling),
        total_length=state.total_length,
    )


def sequence_state_from_proto(message: plan_pb2.SequenceState) -> SequenceState:
    """Raises InvalidRequest for sampling parameters out of range."""
    return SequenceState(
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=sampling_from_proto(message.sampling),
        total_length=message.total_length,
    )


def row_to_proto(row: Row) -> plan_pb2.Row:
    return plan_pb2.Row(
        sequence_id=row.sequence_id,
        run=row.run,
        start=row.start,
        num_tokens=row.num_tokens,
        token_ids=row.token_ids,
        block_updates=[block_update_to_proto(update) for update in row.block_updates],
        sample_positions=row.sample_positions,
        logprob_positions=row.logprob_positions,
        first_stage=row.first_stage,
        end_stage=row.end_stage,
        input_from_log_of_stage=row.input_from_log_of_stage,
        state=None if row.state is None else sequence_state_to_proto(row.state),
        first_writing_stage=row.first_writing_stage,
    )


def row_from_proto(message: plan_pb2.Row) -> Row:
    """Raises InvalidRequest for sampling parameters out of range."""
    has_log = message.HasField("input_from_log_of_stage")
    has_state = message.HasField("state")
    return Row(
        sequence_id=message.sequence_id,
        run=message.run,
        start=message.start,
        num_tokens=message.num_tokens,
        token_ids=tuple(message.token_ids),
        block_updates=tuple(block_update_from_proto(update) for update in message.block_updates),
        first_stage=message.first_stage,
        end_stage=message.end_stage,
        sample_positions=tuple(message.sample_positions),
        logprob_positions=tuple(message.logprob_positions),
        input_from_log_of_stage=message.input_from_log_of_stage if has_log else None,
        state=sequence_state_from_proto(message.state) if has_state else None,
        first_writing_stage=message.first_writing_stage,
    )


def step_to_proto(step: Step) -> plan_pb2.Step:
    return plan_pb2.Step(
        pipeline_id=step.pipeline_id,
        epoch=epoch_to_proto(step.epoch),
        step=step.step,
        forget=[sequence_run_to_proto(run) for run in step.forget],
        rows=[row_to_proto(row) for row in step.rows],
        alone=step.alone,
    )


def step_from_proto(message: plan_pb2.Step) -> Step:
    """Raises InvalidRequest for sampling parameters out of range."""
    return Step(
        pipeline_id=message.pipeline_id,
        epoch=epoch_from_proto(message.epoch),
        step=message.step,
        rows=tuple(row_from_proto(row) for row in message.rows),
        forget=tuple(sequence_run_from_proto(run) for run in message.forget),
        alone=message.alone,
    )


def sampled_token_to_proto(token: SampledToken) -> plan_pb2.SampledToken:
    return plan_pb2.SampledToken(
        position=token.position,
        token_id=token.token_id,
        logprob=token.logprob,
        alternative_ids=[token_id for token_id, _ in token.alternatives],
        alternative_logprobs=[logprob for _, logprob in token.alternatives],
    )


def sampled_token_from_proto(message: plan_pb2.SampledToken) -> SampledToken:
    """Raises ProtocolError where alternatives and their log-probabilities differ in number."""
    if len(message.alternative_ids) != len(message.alternative_logprobs):
        raise ProtocolError("a sampled token has alternatives without log-probabilities")
    return SampledToken(
        position=message.position,
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        alternatives=tuple(zip(message.alternative_ids, message.alternative_logprobs, strict=True)),
    )


def row_result_to_proto(row: RowResult) -> plan_pb2.RowResult:
    return plan_pb2.RowResult(
        sequence_id=row.sequence_id,
        run=row.run,
        sampled=[sampled_token_to_proto(token) for token in row.sampled],
        prompt_logprobs=[sampled_token_to_proto(token) for token in row.prompt_logprobs],
        error=_ROW_ERRORS[row.error],
    )


def row_result_from_proto(message: plan_pb2.RowResult) -> RowResult:
    """Raises ProtocolError for an error that this version does not know."""
    if message.error not in _ROW_ERROR_NAMES:
        raise ProtocolError(f"unknown row error {message.error}")
    return RowResult(
        sequence_id=message.sequence_id,
        run=message.run,
        sampled=tuple(sampled_token_from_proto(token) for token in message.sampled),
        prompt_logprobs=tuple(sampled_token_from_proto(token) for token in message.prompt_logprobs),
        error=_ROW_ERROR_NAMES[message.error],
    )


def hop_timing_to_proto(timing: HopTiming) -> plan_pb2.HopTiming:
    return plan_pb2.HopTiming(**_values(timing, _TIMING_FIELDS))


def hop_timing_from_proto(message: plan_pb2.HopTiming) -> HopTiming:
    return HopTiming(**_values(message, _TIMING_FIELDS))


def step_result_to_proto(result: StepResult) -> plan_pb2.StepResult:
    return plan_pb2.StepResult(
        pipeline_id=result.pipeline_id,
        epoch=epoch_to_proto(result.epoch),
        step=result.step,
        rows=[row_result_to_proto(row) for row in result.rows],
        timings=[hop_timing_to_proto(timing) for timing in result.timings],
    )


def step_result_from_proto(message: plan_pb2.StepResult) -> StepResult:
    """Raises ProtocolError."""
    return StepResult(
        pipeline_id=message.pipeline_id,
        epoch=epoch_from_proto(message.epoch),
        step=message.step,
        rows=tuple(row_result_from_proto(row) for row in message.rows),
        timings=tuple(hop_timing_from_proto(timing) for timing in message.timings),
    )


def model_summary_to_proto(summary: ModelSummary) -> mesh_pb2.ModelSummary:
    values = _values(summary, _SUMMARY_FIELDS)
    return mesh_pb2.ModelSummary(**values, part_hashes=dict(summary.part_hashes))


def model_summary_from_proto(message: mesh_pb2.ModelSummary) -> ModelSummary:
    values = _values(message, _SUMMARY_FIELDS)
    return ModelSummary(**values, part_hashes=dict(message.part_hashes))


def _values(source: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}

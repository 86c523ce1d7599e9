"""The plan's values as protobuf messages, and back; steps and results are in stagemesh.wire_steps.

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
from stagemesh.plan import Epoch, ModelSummary, SequenceRun, SequenceState, Span
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

# Fields of a plain type, which have the same name on both sides.
_SAMPLING_FIELDS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "min_tokens"),
)
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
        adapter=state.adapter,
    )


def sequence_state_from_proto(message: plan_pb2.SequenceState) -> SequenceState:
    """Raises InvalidRequest for sampling parameters out of range."""
    return SequenceState(
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=sampling_from_proto(message.sampling),
        total_length=message.total_length,
        adapter=message.adapter,
    )


def model_summary_to_proto(summary: ModelSummary) -> mesh_pb2.ModelSummary:
    values = _values(summary, _SUMMARY_FIELDS)
    return mesh_pb2.ModelSummary(**values, part_hashes=dict(summary.part_hashes))


def model_summary_from_proto(message: mesh_pb2.ModelSummary) -> ModelSummary:
    values = _values(message, _SUMMARY_FIELDS)
    return ModelSummary(**values, part_hashes=dict(message.part_hashes))


def _values(source: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}

"""Protobuf messages of mesh.proto to the scheduler's values, and back.

Nothing beyond this module, the sessions and the status sees protobuf.
"""

from __future__ import annotations

from dataclasses import fields

from protos import mesh_pb2
from scheduler.core import Request, RequestKey
from scheduler.messages import (
    Command,
    JoinEpoch,
    LoadedSpan,
    LoadSpan,
    Registration,
    ShutdownWorker,
)
from scheduler.workers import WorkerStats
from stagemesh import wire
from stagemesh.errors import ProtocolError

# All but `routing`, which is a message of its own.
_STATS_FIELDS = tuple(field.name for field in fields(WorkerStats) if field.name != "routing")


def check_protocol(version: int) -> None:
    """Raises ProtocolError for a peer of another version."""
    if version != wire.PROTOCOL_VERSION:
        raise ProtocolError(
            f"the peer speaks protocol {version}, the scheduler {wire.PROTOCOL_VERSION}"
        )


def registration_from_proto(
    message: mesh_pb2.RegisterWorker, scheduler_address: str
) -> Registration:
    """Raises ProtocolError."""
    check_protocol(message.protocol_version)
    if not message.worker_id or not message.address:
        raise ProtocolError("a worker must name itself and its address")
    has_fixed, has_loaded = message.HasField("fixed_span"), message.HasField("loaded")
    return Registration(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        address=message.address,
        model=wire.model_summary_from_proto(message.model),
        fixed_span=wire.span_from_proto(message.fixed_span) if has_fixed else None,
        loaded=loaded_from_proto(message.loaded) if has_loaded else None,
        device=message.device,
        dtype=wire.dtype_from_proto(message.dtype),
        batch_invariant=message.batch_invariant,
        quantization=message.quantization or "auto",
        pid=message.pid,
        scheduler_address=scheduler_address,
        available_memory_bytes=message.available_memory_bytes,
        followed_term=message.followed_term,
        wire_dtype=wire.dtype_from_proto(message.wire_dtype),
        kv_dtype=wire.dtype_from_proto(message.kv_dtype or message.dtype),
        tensor_parallel=message.tensor_parallel or 1,
        adapters=dict(message.adapters),
    )


def loaded_from_proto(message: mesh_pb2.SpanLoaded) -> LoadedSpan:
    """Raises ProtocolError where there is no room for KV."""
    if not message.num_blocks or not message.block_size_tokens:
        raise ProtocolError("a worker loaded layers, but has no block of KV")
    return LoadedSpan(
        span=wire.span_from_proto(message.span),
        num_blocks=message.num_blocks,
        block_size_tokens=message.block_size_tokens,
        weight_bytes=message.weight_bytes,
        kv_block_bytes=message.kv_block_bytes,
        load_ns=message.load_ns,
        num_log_blocks=message.num_log_blocks,
    )


def stats_from_proto(message: mesh_pb2.WorkerStats) -> WorkerStats:
    routing = tuple((layer.layer, tuple(layer.tokens)) for layer in message.routing)
    return WorkerStats(**{name: getattr(message, name) for name in _STATS_FIELDS}, routing=routing)


def stats_to_proto(stats: WorkerStats) -> mesh_pb2.WorkerStats:
    routing = [mesh_pb2.LayerRouting(layer=i, tokens=tokens) for i, tokens in stats.routing]
    numbers = {name: getattr(stats, name) for name in _STATS_FIELDS}
    return mesh_pb2.WorkerStats(**numbers, routing=routing)


def command_to_proto(command: Command) -> mesh_pb2.WorkerCommand:
    if isinstance(command, LoadSpan):
        load = mesh_pb2.LoadSpan(span=wire.span_to_proto(command.span))
        return mesh_pb2.WorkerCommand(load_span=load)
    if isinstance(command, ShutdownWorker):
        return mesh_pb2.WorkerCommand(shutdown=mesh_pb2.ShutdownWorker(reason=command.reason))
    epoch = wire.epoch_to_proto(command.epoch)
    if isinstance(command, JoinEpoch):
        join = mesh_pb2.JoinEpoch(
            pipeline_id=command.pipeline_id,
            epoch=epoch,
            stage=command.stage,
            num_stages=command.num_stages,
            next_address=command.next_address,
            num_blocks=command.num_blocks,
            keep_kv=command.keep_kv,
            from_end=command.from_end,
            num_log_blocks=command.num_log_blocks,
        )
        if command.pages_from:
            join.pages.address = command.pages_from
            join.pages.block_ids.extend(command.page_block_ids)
        return mesh_pb2.WorkerCommand(join_epoch=join)
    leave = mesh_pb2.LeaveEpoch(pipeline_id=command.pipeline_id, epoch=epoch)
    return mesh_pb2.WorkerCommand(leave_epoch=leave)


def request_from_proto(message: mesh_pb2.SubmitRequest, gateway: int, now_ns: int) -> Request:
    """Raises InvalidRequest, naming the parameter."""
    remaining_ns = message.remaining_ns if message.HasField("remaining_ns") else None
    return Request(
        key=RequestKey(gateway, message.request),
        attempt=message.attempt,
        label=message.label,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=wire.sampling_from_proto(message.sampling),
        max_tokens=message.max_tokens,
        priority=message.priority,
        deadline_ns=None if remaining_ns is None else now_ns + remaining_ns,
        cache_salt=message.cache_salt,
        adapter=message.adapter,
    )

"""What rank 0 tells the others, as messages of protos/ranks.proto and back, both ways side by side.

Steps have conversions of their own, `stagemesh.wire_steps`.
"""

from __future__ import annotations

from pathlib import Path

from protos import ranks_pb2
from stage_worker.block_ranges import BlockRange, PipelineBlocks
from stage_worker.executor_config import ExecutorConfig
from stage_worker.expert_placement import Placement
from stage_worker.tenancy import Joining
from stagemesh import wire
from stagemesh.quantization import parse_quantization

NOT_TOLD = ("max_kv_memory_bytes", "num_blocks", "max_log_memory_bytes")
"""Fields of ExecutorConfig by which rank 0 decides how many blocks all ranks have; the others log
nothing."""


def load_to_proto(config: ExecutorConfig) -> ranks_pb2.LoadShard:
    return ranks_pb2.LoadShard(
        model_dir=str(config.model_dir),
        span=wire.span_to_proto(config.span),
        device=config.device,
        dtype=config.dtype,
        batch_invariant=config.batch_invariant,
        block_size_tokens=config.block_size_tokens,
        wire_dtype=config.wire_dtype,
        kv_dtype=config.kv_dtype,
        quantization=str(config.quantization),
        lone_threads=config.lone_threads,
        adapters={identity: str(path) for identity, path in config.adapters.items()},
        expert_parallel=config.expert_parallel,
        redundant_experts=config.redundant_experts,
    )


def load_from_proto(load: ranks_pb2.LoadShard) -> ExecutorConfig:
    return ExecutorConfig(
        model_dir=Path(load.model_dir),
        span=wire.span_from_proto(load.span),
        device=load.device,
        dtype=load.dtype,
        batch_invariant=load.batch_invariant,
        block_size_tokens=load.block_size_tokens,
        wire_dtype=load.wire_dtype,
        kv_dtype=load.kv_dtype,
        quantization=parse_quantization(load.quantization),
        lone_threads=load.lone_threads,
        adapters={identity: Path(path) for identity, path in load.adapters.items()},
        expert_parallel=load.expert_parallel,
        redundant_experts=load.redundant_experts,
    )


def joining_to_proto(joining: Joining) -> ranks_pb2.JoinPipeline:
    return ranks_pb2.JoinPipeline(
        pipeline_id=joining.pipeline_id,
        stage=joining.stage,
        num_stages=joining.num_stages,
        kv=_range_to_proto(joining.blocks.kv),
        log=_range_to_proto(joining.blocks.log),
        keep_kv=joining.keep_kv,
    )


def joining_from_proto(join: ranks_pb2.JoinPipeline) -> Joining:
    return Joining(
        pipeline_id=join.pipeline_id,
        stage=join.stage,
        num_stages=join.num_stages,
        blocks=PipelineBlocks(_range_from_proto(join.kv), _range_from_proto(join.log)),
        keep_kv=join.keep_kv,
    )


def _range_to_proto(blocks: BlockRange) -> ranks_pb2.BlockRange:
    return ranks_pb2.BlockRange(
        capacity=blocks.capacity, num_blocks=blocks.num_blocks, from_end=blocks.from_end
    )


def _range_from_proto(message: ranks_pb2.BlockRange) -> BlockRange:
    return BlockRange(message.capacity, message.num_blocks, message.from_end)


def placement_to_proto(layer: int, placement: Placement) -> ranks_pb2.PlaceExperts:
    ranks = [ranks_pb2.RankExperts(experts=experts) for experts in placement]
    return ranks_pb2.PlaceExperts(layer=layer, ranks=ranks)


def fetch_to_proto(number: int, layer: int, placement: Placement) -> ranks_pb2.FetchExperts:
    return ranks_pb2.FetchExperts(number=number, placement=placement_to_proto(layer, placement))


def fetch_from_proto(fetch: ranks_pb2.FetchExperts) -> tuple[int, int, Placement]:
    return fetch.number, *placement_from_proto(fetch.placement)


def placement_from_proto(placed: ranks_pb2.PlaceExperts) -> tuple[int, Placement]:
    return placed.layer, tuple(tuple(rank.experts) for rank in placed.ranks)

"""Loads one stage: its weights into the decoder, as many KV blocks as there is memory for, and the
log of what the stage sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from stage_worker.adapter_loading import AdapterLoader
from stage_worker.boundary_log import BoundaryLog, choose_num_log_blocks, log_block_bytes
from stage_worker.checkpoint import TORCH_DTYPES
from stage_worker.collectives import ALONE, Group
from stage_worker.cuda_support import check_supported
from stage_worker.decoding import Decoding, make_decoding
from stage_worker.devices import as_out_of_memory, check_fits, find_device
from stage_worker.executor_config import ExecutorConfig, ExecutorFacts
from stage_worker.expert_files import ExpertFiles
from stage_worker.identity import file_stamps
from stage_worker.kernels import Kernels, choose_kernels
from stage_worker.kv_cache import (
    KvCache,
    LogCost,
    PlainKvCache,
    block_bytes,
    choose_num_blocks,
)
from stage_worker.kv_dtype import resolve_kv_dtype
from stage_worker.linear_schemes import Numerics
from stage_worker.lora import StageAdapters
from stage_worker.memory import trim
from stage_worker.packed_kv_cache import PackedKvCache
from stage_worker.payload import resolve_wire_dtype
from stage_worker.sharding import Shards, check_divides
from stage_worker.stage_experts import StageExperts
from stage_worker.thread_counts import ThreadCounts
from stage_worker.weights import StageWeights, WeightLoader
from stagemesh.errors import ConfigError
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What a rank has of a span, before there are pages."""

    config: ExecutorConfig
    shards: Shards
    group: Group
    weights: StageWeights
    adapters: StageAdapters
    num_bytes: int
    kernels: Kernels
    dtype: torch.dtype
    kv_dtype: str
    device: torch.device
    experts: ExpertFiles
    started_ns: int


@dataclass(frozen=True, slots=True)
class LoadedStage:
    spec: ModelSpec
    span: Span
    decoding: Decoding
    cache: KvCache
    log: BoundaryLog
    facts: ExecutorFacts
    wire_dtype: str
    threads: ThreadCounts
    experts: StageExperts
    group: Group
    adapters: StageAdapters


def resolve_dtype(dtype: str, spec: ModelSpec, device: torch.device) -> str:
    """The dtype that "auto" stands for: the files' own on a GPU, float32 on a CPU.

    CPUs multiply no faster in half precision, and most of them slower.
    """
    if dtype == "auto":
        return "float32" if device.type == "cpu" else spec.dtype
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(TORCH_DTYPES)}, not {dtype!r}")
    return dtype


def load_stage(
    config: ExecutorConfig, on_progress: Callable[[int, int], None], group: Group = ALONE
) -> LoadedStage:
    """Loads the span; `on_progress(loaded_bytes, total_bytes)` is called all along.

    Raises ConfigError, CheckpointError, UnsupportedModel, SpanError, OutOfMemory.
    """
    return make_stage(load_weights(config, on_progress, group))


def load_weights(
    config: ExecutorConfig, on_progress: Callable[[int, int], None], group: Group = ALONE
) -> LoadedWeights:
    """The span's weights, or what this rank of a group has of them; errors as `load_stage`."""
    started_ns = time.monotonic_ns()
    if config.block_size_tokens < 1:
        raise ConfigError(f"block_size must be at least 1, not {config.block_size_tokens}")
    spec = ModelSpec.from_directory(config.model_dir)
    check_divides(spec, group.size, config.expert_parallel)
    shards = Shards(spec, group.rank, group.size, config.expert_parallel, config.redundant_experts)
    device = find_device(config.device)
    dtype_name = resolve_dtype(config.dtype, spec, device)
    dtype = TORCH_DTYPES[dtype_name]
    if device.type == "cuda":
        check_supported(spec)
    numerics = Numerics(dtype, device, config.quantization, config.batch_invariant)
    kernels = choose_kernels(spec, config.batch_invariant, dtype, device)
    kv_dtype = resolve_kv_dtype(config.kv_dtype, dtype_name, config.device)
    experts = ExpertFiles(config.model_dir, spec, numerics, file_stamps(config.model_dir))
    progress = _Progress(on_progress)
    loader = WeightLoader(config.model_dir, spec, numerics, progress.advance, shards)
    adapter_loader = AdapterLoader(config.adapters, spec, dtype, device, shards)
    progress.total_bytes = loader.span_bytes(config.span) + adapter_loader.span_bytes(config.span)
    check_fits(progress.total_bytes * group.size, device)
    try:
        weights = loader.load(config.span)
        adapters = adapter_loader.load(
            config.span, progress.advance, one_by_one=config.batch_invariant
        )
        progress.end()
        trim()
    except (RuntimeError, MemoryError) as error:
        raise as_out_of_memory(error) from error
    num_bytes = progress.loaded_bytes
    return LoadedWeights(
        config,
        shards,
        group,
        weights,
        adapters,
        num_bytes,
        kernels,
        dtype,
        kv_dtype,
        device,
        experts,
        started_ns,
    )


def make_stage(loaded: LoadedWeights, num_blocks: int | None = None) -> LoadedStage:
    """With KV pages and a log beside the weights: so many blocks, or what the config says. A rank
    that follows another logs nothing. Raises OutOfMemory."""
    shards, group, dtype = loaded.shards, loaded.group, loaded.dtype
    spec, config = shards.spec, loaded.config
    config = replace(config, num_blocks=num_blocks or config.num_blocks)
    if group.rank:
        config = replace(config, max_log_memory_bytes=0)
    try:
        cache = _make_cache(loaded, config)
        log = _make_log(spec, config, cache.num_blocks, dtype)
        local, weights, kernels = shards.local_spec, loaded.weights, loaded.kernels
        decoding = make_decoding(
            local, config.span, weights, cache, kernels, dtype, loaded.adapters, shards, group
        )
    except (RuntimeError, MemoryError) as error:
        raise as_out_of_memory(error) from error
    facts = ExecutorFacts(
        num_blocks=cache.num_blocks,
        block_size_tokens=config.block_size_tokens,
        weight_bytes=loaded.num_bytes,
        kv_block_bytes=cache.block_bytes,
        load_ns=time.monotonic_ns() - loaded.started_ns,
        num_log_blocks=log.num_blocks,
    )
    wire_dtype = resolve_wire_dtype(config.wire_dtype, dtype)
    threads = ThreadCounts(config.lone_threads)
    experts = StageExperts(weights, config.span, shards.expert_rank, loaded.experts)
    return LoadedStage(
        spec,
        config.span,
        decoding,
        cache,
        log,
        facts,
        wire_dtype,
        threads,
        experts,
        group,
        loaded.adapters,
    )


class _Progress:
    """`total_bytes` is what is expected, until the end."""

    def __init__(self, on_progress: Callable[[int, int], None]) -> None:
        self.loaded_bytes = self.total_bytes = 0
        self._on_progress = on_progress

    def advance(self, num_bytes: int) -> None:
        self.loaded_bytes += num_bytes
        self._on_progress(min(self.loaded_bytes, self.total_bytes), self.total_bytes)

    def end(self) -> None:
        self.total_bytes = self.loaded_bytes
        self._on_progress(self.loaded_bytes, self.total_bytes)


def _make_cache(loaded: LoadedWeights, config: ExecutorConfig) -> KvCache:
    spec, dtype, kv_dtype = loaded.shards.local_spec, loaded.dtype, loaded.kv_dtype
    num_layers, size = config.span.num_layers, config.block_size_tokens
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = choose_num_blocks(
            spec,
            # The ranks of a group are of one host, and each has as many.
            block_bytes(spec, num_layers, size, kv_dtype) * loaded.group.size,
            size,
            config.max_kv_memory_bytes,
            loaded.device,
            _log_cost(spec, config, dtype, loaded.device),
        )
    if TORCH_DTYPES.get(kv_dtype) == dtype:
        return PlainKvCache(spec, num_layers, num_blocks, size, dtype, loaded.device)
    return PackedKvCache(spec, num_layers, num_blocks, size, dtype, kv_dtype)


def _logs(spec: ModelSpec, config: ExecutorConfig) -> bool:
    """The last stage has nobody to send to."""
    return config.span.end < spec.num_layers


def _log_cost(
    spec: ModelSpec, config: ExecutorConfig, dtype: torch.dtype, device: torch.device
) -> LogCost:
    if not _logs(spec, config) or device.type != "cpu":
        return LogCost(0, 0)
    size = config.block_size_tokens
    return LogCost(
        log_block_bytes(spec.hidden_size, size, dtype.itemsize), config.max_log_memory_bytes
    )


def _make_log(
    spec: ModelSpec, config: ExecutorConfig, num_kv_blocks: int, dtype: torch.dtype
) -> BoundaryLog:
    size = config.block_size_tokens
    num_blocks = 0
    if _logs(spec, config):
        bytes_per_block = log_block_bytes(spec.hidden_size, size, dtype.itemsize)
        num_blocks = choose_num_log_blocks(
            num_kv_blocks, bytes_per_block, config.max_log_memory_bytes
        )
    return BoundaryLog(num_blocks, size, spec.hidden_size, dtype)

"""Stages in this process, without workers: loading one, and giving it its place in a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage_worker.executor import ExecutorConfig, StageExecutor
from stage_worker.tenancy import Joining
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span

PIPELINE = "benchmark"
BLOCK_SIZE_TOKENS = 16


def load(model_dir: Path, span: Span, num_blocks: int, **others: Any) -> StageExecutor:
    """Float32 on the CPU, where `others` (fields of ExecutorConfig) do not say otherwise."""
    fields: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "batch_invariant": False,
        "block_size_tokens": BLOCK_SIZE_TOKENS,
    }
    config = ExecutorConfig(model_dir, span, num_blocks=num_blocks, **{**fields, **others})
    return StageExecutor.load(config, lambda loaded_bytes, total_bytes: None)


def join(executor: StageExecutor, stage: int = 0, num_stages: int = 1) -> None:
    """With all its blocks, and without any sequence."""
    blocks = executor.facts.blocks_for(executor.facts.num_blocks)
    executor.join(Joining(pipeline_id=PIPELINE, stage=stage, num_stages=num_stages, blocks=blocks))


def load_pipeline(
    model_dir: Path, num_stages: int, num_blocks: int, **others: Any
) -> list[StageExecutor]:
    """The stages of a whole model, of as many layers each as can be, in their places."""
    num_layers = ModelSpec.from_directory(model_dir).num_layers
    bounds = [num_layers * i // num_stages for i in range(num_stages + 1)]
    stages = []
    for stage in range(num_stages):
        executor = load(model_dir, Span(bounds[stage], bounds[stage + 1]), num_blocks, **others)
        join(executor, stage, num_stages)
        stages.append(executor)
    return stages

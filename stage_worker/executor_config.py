"""What a stage is loaded as, and what was found out then. Without torch: the event loop asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stage_worker.block_ranges import PipelineBlocks
from stagemesh.plan import Span
from stagemesh.quantization import AS_STORED, Quantization


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    """`dtype` may be "auto", `wire_dtype` and `kv_dtype` too: what is computed with. KV:
    `num_blocks` where given, else what fits the memory. The log has as many blocks where
    `max_log_memory_bytes` is None and the host has room; 0 is for no log. `lone_threads`: of steps
    that are alone in their pipeline; 0: as of all steps. `adapters`: directories by identity.
    `expert_parallel`: ranks have whole experts, instead of a part of each, and each of them
    `redundant_experts` more than its share.
    """

    model_dir: Path
    span: Span
    device: str
    dtype: str
    batch_invariant: bool
    block_size_tokens: int
    max_kv_memory_bytes: int | None = None
    num_blocks: int | None = None
    max_log_memory_bytes: int | None = None
    wire_dtype: str = "auto"
    quantization: Quantization = AS_STORED
    lone_threads: int = 0
    kv_dtype: str = "auto"
    expert_parallel: bool = False
    redundant_experts: int = 0
    adapters: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExecutorFacts:
    """Found out while loading. `weight_bytes` is of the tensors as they are held. What is
    sent is logged for blocks [0, num_log_blocks): none on a last stage.
    """

    num_blocks: int
    block_size_tokens: int
    weight_bytes: int
    kv_block_bytes: int
    load_ns: int
    num_log_blocks: int = 0

    def blocks_for(
        self, num_blocks: int, *, from_end: bool = False, num_log_blocks: int | None = None
    ) -> PipelineBlocks:
        """A pipeline's blocks at one end of the stage's. Raises ProtocolError."""
        return PipelineBlocks.at_end(
            self.num_blocks,
            self.num_log_blocks,
            num_blocks=num_blocks,
            from_end=from_end,
            num_log_blocks=num_log_blocks,
        )

"""A pipeline's place on a stage: which stage of it this is, where its blocks lie, its sequences.

    T tokens

A stage serves at most two pipelines. They share its weights and know nothing of one another: ids of
sequences and blocks mean something within a pipeline only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stage_worker.block_ranges import PipelineBlocks
from stage_worker.boundary_log import NOT_LOGGED
from stage_worker.sequences import SequenceTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """A place in a pipeline that a stage is to take; with `keep_kv` it keeps the sequences that it
    has of the pipeline at this end of its blocks."""

    pipeline_id: str
    stage: int
    num_stages: int
    blocks: PipelineBlocks
    keep_kv: bool = False


@dataclass(frozen=True, slots=True)
class Tenancy:
    pipeline_id: str
    stage: int
    num_stages: int
    blocks: PipelineBlocks
    sequences: SequenceTable

    @property
    def is_last(self) -> bool:
        return self.stage + 1 == self.num_stages

    def log_slots(self, slots: Tensor) -> Tensor:
        """[T] of the KV -> [T] of the log, on the CPU; NOT_LOGGED where the block is not."""
        kv, log, size = self.blocks.kv, self.blocks.log, self.sequences.block_size_tokens
        shift = log.capacity - kv.capacity if kv.from_end else 0
        in_log = slots.to("cpu") + shift * size
        is_logged = (in_log >= log.start * size) & (in_log < log.end * size)
        return torch.where(is_logged, in_log, NOT_LOGGED)

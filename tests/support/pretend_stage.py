"""What a pretend worker holds and computes: the simulator's stage behind the frames of the wire."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simulation.fake_stage import FakeStage
from simulation.pretend_model import NUM_LAYERS, VOCAB_SIZE
from simulation.stage_memory import MemoryPart, StageMemory

from protos import mesh_pb2
from stagemesh import wire
from stagemesh.plan import HopTiming, ModelSummary, Row, Span, StepResult
from stagemesh.transport import Message, StepFrame

PARTS = ["embedding", *(f"layer.{index}" for index in range(NUM_LAYERS)), "norm", "head"]
MODEL = ModelSummary(
    name="pretend",
    architecture="Pretend",
    num_layers=NUM_LAYERS,
    hidden_size=2,
    vocab_size=VOCAB_SIZE,
    max_position=256,
    layer_bytes=100,
    embedding_bytes=1,
    head_bytes=1,
    structure_hash="pretend",
    part_hashes={part: part for part in PARTS},
)


@dataclass(frozen=True)
class Shape:
    """What a pretend worker has; `fixed` is its operator's wish."""

    fixed: Span | None = None
    num_blocks: int = 512
    num_log_blocks: int = 512
    block_size: int = 4
    model: ModelSummary = MODEL
    dtype: str = "float32"
    available_memory_bytes: int = 0
    followed_term: int = 0


class PretendStage:
    """One load of a span. `num_tokens` are those that it computed."""

    def __init__(self, span: Span, shape: Shape, salt: int) -> None:
        self.num_tokens = 0
        self._memory = StageMemory(
            range(span.start, span.end),
            num_blocks=shape.num_blocks,
            num_log_blocks=shape.num_log_blocks,
            block_size=shape.block_size,
            salt=salt,
        )
        self._stage = FakeStage(self._memory, 0, {})
        self.loaded = mesh_pb2.SpanLoaded(
            span=wire.span_to_proto(span),
            num_blocks=shape.num_blocks,
            num_log_blocks=0 if span.end == NUM_LAYERS else shape.num_log_blocks,
            block_size_tokens=shape.block_size,
            weight_bytes=100 * span.num_layers,
            kv_block_bytes=span.num_layers,
        )

    @property
    def num_sequences(self) -> int:
        return self._stage.num_held

    def join(self, join: mesh_pb2.JoinEpoch) -> None:
        num_log_blocks = self._memory.num_log_blocks
        if join.HasField("num_log_blocks"):
            num_log_blocks = join.num_log_blocks
        self._stage.join(
            wire.epoch_from_proto(join.epoch),
            MemoryPart(self._memory, join.num_blocks, num_log_blocks, from_end=join.from_end),
            stage=join.stage,
            num_stages=join.num_stages,
            keep_kv=join.keep_kv,
        )

    def fetch(self, source: PretendStage, block_ids: Sequence[int]) -> None:
        self._stage.part.take(source._stage.part.copy(block_ids), block_ids)

    def execute(self, frame: StepFrame, join: mesh_pb2.JoinEpoch) -> Message:
        """What is to be sent on: to the next stage, or to the scheduler."""
        step = frame.step
        self.num_tokens += sum(
            row.num_tokens for row in step.rows if row.first_stage <= join.stage < row.end_stage
        )
        outs, results = self._stage.execute(step, _unpack(step.rows, join.stage, frame.payload))
        timings = (*frame.timings, HopTiming(join.stage, compute_ns=1000))
        if join.stage + 1 == join.num_stages:
            return StepResult(step.pipeline_id, step.epoch, step.step, results, timings)
        payload = _pack(outs)
        return StepFrame(step, payload, "float32", len(payload) // 8, 2, timings)


def _pack(rows: Sequence[Sequence[int | None]]) -> bytes:
    """Eight bytes a position, which the transport takes for two float32."""
    return b"".join(struct.pack("<q", state) for row in rows for state in row)


def _unpack(rows: Sequence[Row], stage: int, payload: Any) -> list[list[int | None]]:
    states = iter(struct.unpack(f"<{len(payload) // 8}q", payload))
    travelling = [row for row in rows if _travels_to(row, stage)]
    return [[next(states) for _ in range(row.num_tokens)] for row in travelling]


def _travels_to(row: Row, stage: int) -> bool:
    comes_from_log = row.first_stage == stage and row.input_from_log_of_stage is not None
    return comes_from_log or row.first_stage < stage < row.end_stage

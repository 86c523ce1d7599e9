"""What membership sees of workers: registrations, and a worker that does what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from support.fake_memory import FakeMemory

from scheduler.messages import Command, JoinEpoch, LoadedSpan, LoadSpan, Registration
from stagemesh.plan import ModelSummary

MS = 1_000_000
S = 1_000_000_000


def model(num_layers: int = 6, **changes: Any) -> ModelSummary:
    parts = ["embedding", *(f"layer.{index}" for index in range(num_layers)), "norm", "head"]
    summary = ModelSummary(
        name="tiny",
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=8,
        vocab_size=64,
        max_position=128,
        layer_bytes=100,
        embedding_bytes=10,
        head_bytes=10,
        structure_hash="structure",
        part_hashes={part: f"hash of {part}" for part in parts},
    )
    return replace(summary, **changes)


@dataclass
class FakeWorker:
    """Does at once what it is told, unless it is told not to."""

    registration: Registration
    session: int
    loads: bool = True
    joins: bool = True
    # Whether it can fetch pages.
    fetches: bool = True
    num_blocks: int = 100
    block_size_tokens: int = 16
    num_log_blocks: int = 0
    loaded: LoadedSpan | None = None
    commands: list[Command] = field(default_factory=list)
    # Of what it has loaded.
    memory: FakeMemory | None = None

    def __post_init__(self) -> None:
        self.begin_memory()

    def begin_memory(self) -> None:
        """Nothing is known of what is in it."""
        load = self.loaded
        self.memory = FakeMemory(load.num_blocks, load.num_log_blocks) if load else None

    @property
    def loads_told(self) -> list[tuple[int, int]]:
        told = [command.span for command in self.commands if isinstance(command, LoadSpan)]
        return [(span.start, span.end) for span in told]

    @property
    def joins_told(self) -> list[JoinEpoch]:
        return [command for command in self.commands if isinstance(command, JoinEpoch)]

    @property
    def last_join(self) -> JoinEpoch:
        return self.joins_told[-1]

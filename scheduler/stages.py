"""The stages of a pipeline: which layers each has, who holds them, how much KV they have room for.

Knows nothing of epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.workers import Worker
from stagemesh.plan import Span


@dataclass(frozen=True, slots=True)
class Room:
    """Blocks of KV, and of the stages' logs, that an epoch has."""

    num_blocks: int = 0
    num_log_blocks: tuple[int, ...] = ()

    def is_within(self, stage: int, worker: Worker, divisor: int = 1) -> bool:
        """Whether the stage takes no more of its worker than what is a pipeline's there now, or a
        part of that."""
        fits_log = self.num_log_blocks[stage] <= worker.num_log_blocks // divisor
        return fits_log and self.num_blocks <= worker.num_blocks // divisor


class Stages:
    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        # One place for each; None where it is vacant.
        self.workers: list[Worker | None] = [None] * len(spans)

    @property
    def num_stages(self) -> int:
        return len(self.spans)

    @property
    def members(self) -> list[Worker]:
        return [worker for worker in self.workers if worker is not None]

    @property
    def vacancies(self) -> list[int]:
        return [stage for stage, worker in enumerate(self.workers) if worker is None]

    def is_ready(self, stage: int) -> bool:
        """Whether the stage's worker is there with its span loaded."""
        worker = self.workers[stage]
        return (
            worker is not None
            and worker.session is not None
            and worker.loading is None
            and worker.holds(self.spans[stage])
        )

    @property
    def is_complete(self) -> bool:
        return all(map(self.is_ready, range(self.num_stages)))

    @property
    def room(self) -> Room:
        """Blocks of the smallest stage, none where one is not loaded; of a worker that others have
        a place on as well, its share. What a last stage sends is nobody's input."""
        num_blocks = min((worker.num_blocks for worker in self.members), default=0)
        logs = (min(num_blocks, worker.num_log_blocks) for worker in self.members[:-1])
        return Room(num_blocks, (*logs, 0))

    @property
    def block_size_tokens(self) -> int:
        load = self.members[0].loaded if self.members else None
        return load.block_size_tokens if load else 0

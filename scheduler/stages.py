"""The stages of a pipeline: which layers each has, who holds them, how much KV they have room for.

Knows nothing of epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.workers import Worker
from stagemesh.plan import Span


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
    def num_blocks(self) -> int:
        """Blocks of the smallest stage; 0 where one is not loaded."""
        loads = [worker.loaded for worker in self.members]
        return min((load.num_blocks if load else 0 for load in loads), default=0)

    @property
    def block_size_tokens(self) -> int:
        load = self.members[0].loaded if self.members else None
        return load.block_size_tokens if load else 0

    @property
    def num_log_blocks(self) -> tuple[int, ...]:
        """What a last stage sends is nobody's input."""
        loads = [worker.loaded for worker in self.members]
        return (*(load.num_log_blocks if load else 0 for load in loads[:-1]), 0)

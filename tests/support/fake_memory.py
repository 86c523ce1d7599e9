"""Whose KV lies where in a scripted worker's memory: what the scheduler says of it is checked.

Every KV that ever was has a number; a block has the number of the KV that was written there last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.messages import JoinEpoch, LeaveEpoch
from stagemesh.plan import Epoch


@dataclass
class FakeMemory:
    num_blocks: int
    num_log_blocks: int
    _cells: dict[int, int] = field(default_factory=dict)
    _end_of: dict[str, bool] = field(default_factory=dict)
    # The epochs that go on here, by the end from which their blocks lie.
    _running: dict[bool, JoinEpoch] = field(default_factory=dict)

    def join(self, join: JoinEpoch) -> None:
        """As a worker does: blocks of two pipelines must not meet."""
        other = self._running.get(not join.from_end)
        if other is not None and other.pipeline_id != join.pipeline_id:
            num_blocks = other.num_blocks + join.num_blocks
            num_log_blocks = other.num_log_blocks + join.num_log_blocks
            assert num_blocks <= self.num_blocks, f"{join} meets {other}"
            assert num_log_blocks <= self.num_log_blocks, f"the log of {join} meets {other}"
        assert join.num_blocks <= self.num_blocks
        assert join.num_log_blocks <= self.num_log_blocks
        self._running[join.from_end] = join
        self._end_of[join.pipeline_id] = join.from_end

    def leave(self, leave: LeaveEpoch) -> None:
        for end, join in list(self._running.items()):
            if (join.pipeline_id, join.epoch) == (leave.pipeline_id, leave.epoch):
                del self._running[end]

    def leave_all(self) -> None:
        self._running.clear()

    def is_in(self, pipeline_id: str, epoch: Epoch) -> bool:
        joins = self._running.values()
        return any((join.pipeline_id, join.epoch) == (pipeline_id, epoch) for join in joins)

    def has(self, pipeline_id: str, kv: int, num_blocks: int) -> bool:
        """Whether the pipeline's first blocks are all of this KV."""
        return all(self._cells.get(i) == kv for i in self._places(pipeline_id, num_blocks))

    def write(self, pipeline_id: str, kv: int, num_blocks: int) -> None:
        self._cells |= dict.fromkeys(self._places(pipeline_id, num_blocks), kv)

    def _places(self, pipeline_id: str, num_blocks: int) -> list[int]:
        if self._end_of[pipeline_id]:
            return [self.num_blocks - 1 - i for i in range(num_blocks)]
        return list(range(num_blocks))

"""Where a pipeline's blocks lie in a worker's memory: a range of them, from one end.

    N blocks of KV, L <= N blocks of the log

Everybody else knows a pipeline's blocks by ids from 0 on. Here block i is the worker's i-th one
from the first, or from the last: of the KV as well as of the log. So there is room for two
pipelines, one at either end, and both may grow until they meet. Where a block lies does not depend
on how large the range is. Arithmetic without torch, since the event loop asks too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from stagemesh.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class BlockRange:
    """A pipeline's blocks [0, num_blocks) among the worker's [0, capacity)."""

    capacity: int
    num_blocks: int
    from_end: bool

    @property
    def start(self) -> int:
        """The worker's blocks [start, end) are the pipeline's."""
        return self.capacity - self.num_blocks if self.from_end else 0

    @property
    def end(self) -> int:
        return self.start + self.num_blocks

    def places(self, block_ids: Iterable[int]) -> list[int]:
        """The worker's blocks that these of the pipeline are."""
        if not self.from_end:
            return list(block_ids)
        last = self.capacity - 1
        return [last - block_id for block_id in block_ids]

    def meets(self, other: BlockRange) -> bool:
        return max(self.start, other.start) < min(self.end, other.end)

    def beside(self, other: BlockRange) -> BlockRange:
        """What of this range is left by one from the other end."""
        num_left = self.capacity - other.num_blocks
        return replace(self, num_blocks=min(self.num_blocks, num_left))


@dataclass(frozen=True, slots=True)
class PipelineBlocks:
    """A pipeline's blocks in the KV of a stage, and those of them that are in its log, which are
    the lowest ones. Both from the same end.
    """

    kv: BlockRange
    log: BlockRange

    @classmethod
    def at_end(
        cls,
        num_kv_blocks: int,
        max_log_blocks: int,
        *,
        num_blocks: int,
        from_end: bool,
        num_log_blocks: int | None,
    ) -> PipelineBlocks:
        """`num_blocks` of a stage that has N = `num_kv_blocks` and L = `max_log_blocks`; of them as
        many are logged as are named, or as the log has. Raises ProtocolError for what is not there.
        """
        if not 0 < num_blocks <= num_kv_blocks:
            raise ProtocolError(f"the pipeline has {num_blocks} blocks, this stage {num_kv_blocks}")
        num_logged = max_log_blocks if num_log_blocks is None else num_log_blocks
        if not 0 <= num_logged <= max_log_blocks:
            raise ProtocolError(f"{num_logged} blocks cannot be logged here, {max_log_blocks} can")
        return cls(
            BlockRange(num_kv_blocks, num_blocks, from_end),
            BlockRange(max_log_blocks, min(num_logged, num_blocks), from_end),
        )

    @property
    def from_end(self) -> bool:
        return self.kv.from_end

    def meets(self, other: PipelineBlocks) -> bool:
        """Whether some block of the KV, or of the log, is in both."""
        return self.kv.meets(other.kv) or self.log.meets(other.log)

    def beside(self, other: PipelineBlocks) -> PipelineBlocks:
        """What of these is left by those of a pipeline at the other end."""
        return PipelineBlocks(self.kv.beside(other.kv), self.log.beside(other.log))

    def order(self, block_ids: Iterable[int]) -> tuple[int, ...]:
        """Each block once, those that are logged first. Raises ProtocolError."""
        ordered = tuple(sorted(set(block_ids)))
        if ordered and not 0 <= ordered[0] <= ordered[-1] < self.kv.num_blocks:
            raise ProtocolError(
                f"the pipeline has {self.kv.num_blocks} blocks here, not all of these"
            )
        return ordered

    def num_logged(self, block_ids: Iterable[int]) -> int:
        return sum(block_id < self.log.num_blocks for block_id in block_ids)

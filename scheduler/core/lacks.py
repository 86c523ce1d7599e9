"""What stages lack of a pipeline's blocks since their workers were replaced, and how it comes back.

A replaced stage has no KV. What sequences hold there is rebuilt by rows that concern this stage, or
a few neighbouring ones, alone; blocks that several sequences share are rebuilt once. A block's
slots are rebuilt in order, so that two numbers tell how far it is, as with a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scheduler.core.table import BlockTable


@dataclass(slots=True)
class Lack:
    """Slots [computed, needed) of a block are not valid on a stage; those below `scheduled` will be
    once the steps in flight are done."""

    needed: int
    computed: int = 0
    scheduled: int = 0


@dataclass(frozen=True, slots=True)
class RebuildPart:
    """Positions [start, end) of a sequence, lacking on stages [writing_stage, end_stage).

    Stages from `first_stage` on execute it; its input is what the stage before logged, or tokens
    where `first_stage` is 0. `ends` has the covered slots' end for every block that it touches.
    """

    start: int
    end: int
    first_stage: int
    writing_stage: int
    end_stage: int
    ends: tuple[tuple[int, int], ...]

    @property
    def stages(self) -> range:
        return range(self.writing_stage, self.end_stage)


class Lacks:
    """Of one pipeline. `num_log_blocks[i]`: stage i logs what it sends for blocks below that."""

    def __init__(self, block_size_tokens: int, num_log_blocks: Sequence[int]) -> None:
        self._num_log_blocks = num_log_blocks
        # Blocks below that, by stage, that were written when the log did not reach so far.
        self._unlogged: dict[int, set[int]] = {}
        self._block_size = block_size_tokens
        self._by_stage: dict[int, dict[int, Lack]] = {}
        # Touched by the step under construction: nobody else may count on them before the next.
        self._in_making: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._by_stage)

    @property
    def by_stage(self) -> Mapping[int, Mapping[int, Lack]]:
        return self._by_stage

    @property
    def num_tokens(self) -> int:
        """Slots that some stage lacks, counted once for each stage."""
        lacks = (lack for blocks in self._by_stage.values() for lack in blocks.values())
        return sum(lack.needed - lack.computed for lack in lacks)

    def lose(self, stage: int, needed: Mapping[int, int]) -> None:
        """The stage has nothing any more. `needed`: slots in use, by block that has an owner."""
        self._by_stage.pop(stage, None)
        self._unlogged.pop(stage, None)  # what is rebuilt is logged again
        if needed:
            self._by_stage[stage] = {block_id: Lack(num) for block_id, num in needed.items()}

    def undo(self) -> None:
        """Rows in flight are lost."""
        self._in_making.clear()
        for blocks in self._by_stage.values():
            for lack in blocks.values():
                lack.scheduled = lack.computed

    def resize_logs(self, num_log_blocks: Sequence[int], in_use: Iterable[int]) -> None:
        """Blocks that a log reaches only from now on are not in it until they are written anew."""
        for stage, (old, new) in enumerate(zip(self._num_log_blocks, num_log_blocks, strict=True)):
            missing = {block_id for block_id in in_use if old <= block_id < new}
            if missing:
                self._unlogged.setdefault(stage, set()).update(missing)
        self._num_log_blocks = num_log_blocks

    def allocated(self, block_ids: Iterable[int]) -> None:
        """They have a new owner, who writes them from the beginning."""
        for unlogged in self._unlogged.values():
            unlogged.difference_update(block_ids)

    def drop(self, block_id: int) -> bool:
        """The block's content is of no use any more. Returns whether a stage lacked it."""
        found = [stage for stage, blocks in self._by_stage.items() if block_id in blocks]
        for stage in found:
            self._remove(stage, block_id)
        return bool(found)

    def num_unscheduled(self, table: BlockTable) -> int:
        """Positions of this table's blocks that are still to be planned, over all stages."""
        return sum(
            lack.needed - lack.scheduled
            for blocks in self._by_stage.values()
            for block_id in table.block_ids()
            if (lack := blocks.get(block_id)) is not None
        )

    def is_in_making(self, table: BlockTable) -> bool:
        """Whether a block of the table is being rebuilt by the step under construction."""
        return bool(self._in_making) and not self._in_making.isdisjoint(table.block_ids())

    # ---- planning ------------------------------------------------------------------------------

    def next_part(self, table: BlockTable, max_tokens: int) -> RebuildPart | None:
        """The next positions to rebuild, at most `max_tokens`; None if all of them are planned.

        The lowest stage comes first: those after it may need what it logs.
        """
        firsts = {stage: self._first_lacking(stage, table) for stage in sorted(self._by_stage)}
        lacking = {stage: first for stage, first in firsts.items() if first is not None}
        if not lacking or max_tokens < 1:
            return None
        writing_stage, start = next(iter(lacking.items()))
        end_stage = writing_stage + 1
        while lacking.get(end_stage) == start:
            end_stage += 1
        stages = range(writing_stage, end_stage)
        first_stage = self._source(writing_stage, table.log_block(start // self._block_size))
        end = start
        ends: list[tuple[int, int]] = []
        while end < start + max_tokens:
            index, offset = divmod(end, self._block_size)
            num = self._num_lacking_alike(stages, table, index, offset)
            is_same_source = num and first_stage == self._source(
                writing_stage, table.log_block(index)
            )
            if not is_same_source:
                break
            num = min(num, start + max_tokens - end)
            ends += [(block_id, offset + num) for block_id in table.entry(index)]
            end += num
        return RebuildPart(start, end, first_stage, writing_stage, end_stage, tuple(ends))

    def reserve(self, part: RebuildPart) -> None:
        """The part is in the step under construction."""
        for stage in part.stages:
            for block_id, end in part.ends:
                self._by_stage[stage][block_id].scheduled = end
        self._in_making.update(block_id for block_id, _ in part.ends)

    def release(self, part: RebuildPart) -> None:
        """The part is not in the step after all."""
        offset = part.start % self._block_size
        first_index_blocks = part.ends[: len(part.ends) // _num_entries(part, self._block_size)]
        first_blocks = {block_id for block_id, _ in first_index_blocks}
        for stage in part.stages:
            for block_id, _ in part.ends:
                if lack := self._by_stage.get(stage, {}).get(block_id):
                    lack.scheduled = offset if block_id in first_blocks else 0
        self._in_making.difference_update(block_id for block_id, _ in part.ends)

    def commit(self) -> None:
        """The step under construction is sent."""
        self._in_making.clear()

    def rebuilt(self, part: RebuildPart) -> None:
        """The part was executed. Blocks that were given up meanwhile are nobody's concern."""
        for stage in part.stages:
            for block_id, end in part.ends:
                lack = self._by_stage.get(stage, {}).get(block_id)
                if lack is None:
                    continue
                lack.computed = max(lack.computed, end)
                if lack.computed >= lack.needed:
                    self._remove(stage, block_id)

    # ---- inside --------------------------------------------------------------------------------

    def _first_lacking(self, stage: int, table: BlockTable) -> int | None:
        blocks = self._by_stage[stage]
        for index in range(table.num_entries):
            for block_id in table.entry(index):
                lack = blocks.get(block_id)
                if lack is not None and lack.scheduled < lack.needed:
                    return index * self._block_size + lack.scheduled
        return None

    def _num_lacking_alike(
        self, stages: Iterable[int], table: BlockTable, index: int, offset: int
    ) -> int:
        """How many slots from `offset` on all stages lack of all blocks at `index`."""
        if index >= table.num_entries:
            return 0
        num = self._block_size
        for stage in stages:
            for block_id in table.entry(index):
                lack = self._by_stage[stage].get(block_id)
                if lack is None or lack.scheduled != offset:
                    return 0
                num = min(num, lack.needed - offset)
        return num

    def _source(self, stage: int, log_block: int) -> int:
        """The stage to begin with so that `stage` gets its input: right there where the one before
        has logged it, else further up."""
        while stage > 0 and not self._is_logged(stage - 1, log_block):
            stage -= 1
        return stage

    def _is_logged(self, stage: int, block_id: int) -> bool:
        is_missing = block_id in self._unlogged.get(stage, ())
        return block_id < self._num_log_blocks[stage] and not is_missing

    def _remove(self, stage: int, block_id: int) -> None:
        blocks = self._by_stage[stage]
        del blocks[block_id]
        if not blocks:
            del self._by_stage[stage]


def _num_entries(part: RebuildPart, block_size_tokens: int) -> int:
    """How many entries of the block table the part touches."""
    return -(-part.end // block_size_tokens) - part.start // block_size_tokens

"""The block table of one sequence: which block holds which positions, per cache group."""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.core.blocks import BlockPool
from stagemesh.plan import BlockUpdate

# Sliding-window layers, recurrent state and latent attention will want groups of their own.
NUM_CACHE_GROUPS = 1


class BlockTable:
    """Entry i of every group holds positions [i * block_size, (i + 1) * block_size)."""

    def __init__(self, num_groups: int = NUM_CACHE_GROUPS) -> None:
        self.groups: tuple[list[int], ...] = tuple([] for _ in range(num_groups))
        self._num_sent = 0

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_entries(self) -> int:
        return len(self.groups[0])

    def block_ids(self) -> Iterator[int]:
        for group in self.groups:
            yield from group

    def entry(self, index: int) -> tuple[int, ...]:
        """The blocks of one entry, one per group."""
        return tuple(group[index] for group in self.groups)

    def log_block(self, index: int) -> int:
        """Under which id stages log what they send for the positions of this entry."""
        return self.groups[0][index]

    def share(self, pool: BlockPool, entry: tuple[int, ...]) -> None:
        """Appends blocks, one per group, that others may own too."""
        for group, block_id in zip(self.groups, entry, strict=True):
            pool.share(block_id)
            group.append(block_id)

    def grow(self, pool: BlockPool, num_entries: int) -> None:
        """Allocates what is missing up to `num_entries`."""
        num_missing = num_entries - self.num_entries
        if num_missing > 0:
            for group in self.groups:
                group.extend(pool.allocate(num_missing))

    def release(self, pool: BlockPool) -> None:
        for group in self.groups:
            pool.release(reversed(group))
            group.clear()
        self._num_sent = 0

    def discard(self) -> None:
        """Forgets the blocks of a pool that is no more."""
        for group in self.groups:
            group.clear()
        self._num_sent = 0

    def take_updates(self, *, whole: bool) -> tuple[BlockUpdate, ...]:
        """What the stages do not know yet, or everything; they know it from now on."""
        first, num_entries = 0 if whole else self._num_sent, len(self.groups[0])
        if first == num_entries:
            return ()
        self._num_sent = num_entries
        return tuple(BlockUpdate(first, tuple(group[first:])) for group in self.groups)

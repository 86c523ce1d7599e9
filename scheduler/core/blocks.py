"""The pool of KV blocks of one pipeline: who owns which, and what free ones still hold.

A block id means the same on every stage. A block is in exactly one of three places: owned (by one
sequence or, full and unchanging, by several), cached (free, but its content has a name in the
prefix index), or blank (free). Blocks of all cache groups come from this one pool.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple


class BlockName(NamedTuple):
    """What a full block holds: a cache group's KV of the tokens that `hash` names."""

    group: int
    hash: bytes


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_owners = [0] * num_blocks
        # A heap: stages with a short log keep it for the lowest ids.
        self._blank = list(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[BlockName, int] = {}
        self._name_of: dict[int, BlockName] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def num_owners(self, block_id: int) -> int:
        return self._num_owners[block_id]

    def blocks_in_use(self) -> tuple[int, ...]:
        """Blocks that are owned or cached, in order."""
        owned = (block_id for block_id, num in enumerate(self._num_owners) if num > 0)
        return tuple(sorted([*owned, *self._cached]))

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks for one new owner; cached content is forgotten, least recently used first."""
        assert num_blocks <= self.num_free, "the caller asks num_free first"
        block_ids = [self._take_free() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_owners[block_id] = 1
        return block_ids

    def share(self, block_id: int) -> None:
        """One more owner for a block that `lookup` gave."""
        if self._num_owners[block_id] == 0:
            del self._cached[block_id]
        self._num_owners[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """One owner less for each. Give the blocks of a sequence's end first: cached blocks are
        evicted in this order, and a prefix is of no use without its beginning."""
        for block_id in block_ids:
            self._num_owners[block_id] -= 1
            assert self._num_owners[block_id] >= 0, f"block {block_id} was released twice"
            if self._num_owners[block_id] == 0:
                self._set_free(block_id)

    def lookup(self, name: BlockName) -> int | None:
        return self._block_of.get(name)

    def register(self, name: BlockName, block_id: int) -> None:
        """Makes an owned, full, computed block known; of equal blocks the first stays known."""
        assert self._num_owners[block_id] > 0, "only owned blocks are registered"
        if name not in self._block_of and block_id not in self._name_of:
            self._block_of[name] = block_id
            self._name_of[block_id] = name

    def forget(self, block_id: int) -> None:
        """Nobody will be given this content any more; present owners keep it."""
        name = self._name_of.pop(block_id, None)
        if name is None:
            return
        del self._block_of[name]
        if self._num_owners[block_id] == 0:
            del self._cached[block_id]
            heapq.heappush(self._blank, block_id)

    def forget_cached(self) -> None:
        """Whatever nobody owns has no content any more."""
        for block_id in list(self._cached):
            self.forget(block_id)

    def resize(self, num_blocks: int) -> None:
        """Blocks [0, num_blocks) from now on; those that go must have no owner."""
        for block_id in range(num_blocks, self.num_blocks):
            assert self._num_owners[block_id] == 0, f"block {block_id} has an owner"
            self.forget(block_id)
        gone = set(range(num_blocks, self.num_blocks))
        added = range(self.num_blocks, num_blocks)
        self._blank = [b for b in self._blank if b not in gone] + list(added)
        heapq.heapify(self._blank)
        self._num_owners = self._num_owners[:num_blocks] + [0] * len(added)
        self.num_blocks = num_blocks

    def check_integrity(self, num_owners: dict[int, int]) -> None:
        """Compares with what the owners say they hold: owners per block id.

        Raises AssertionError."""
        expected = [0] * self.num_blocks
        for block_id, num in num_owners.items():
            expected[block_id] = num
        if self._num_owners != expected:
            raise AssertionError(f"owners of blocks: {self._num_owners}, expected {expected}")
        free = sorted([*self._blank, *self._cached])
        if free != [block_id for block_id in range(self.num_blocks) if not expected[block_id]]:
            raise AssertionError(f"free blocks {free} are not those without an owner")
        if {block: name for name, block in self._block_of.items()} != self._name_of:
            raise AssertionError("the prefix index and its inverse differ")
        unnamed = self._cached.keys() - self._name_of.keys()
        named = self._name_of.keys() & set(self._blank)
        if unnamed or named:
            raise AssertionError(f"cached without a name: {unnamed}, blank with one: {named}")

    def name_of(self, block_id: int) -> BlockName | None:
        return self._name_of.get(block_id)

    def _take_free(self) -> int:
        if self._blank:
            return heapq.heappop(self._blank)
        block_id, _ = self._cached.popitem(last=False)
        del self._block_of[self._name_of.pop(block_id)]
        return block_id

    def _set_free(self, block_id: int) -> None:
        if block_id in self._name_of:
            self._cached[block_id] = None
        else:
            heapq.heappush(self._blank, block_id)

"""Runs of a block table: which slots of a context lie side by side in the pages.

Blocks that are neighbours in memory are a run, in whatever order the table has them: whoever
attends to all slots of a run does not care. Of a block that is used in part, at either end of what
is read, nothing else is in a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Slots [low, high)."""

    low: int
    high: int

    @property
    def num_slots(self) -> int:
        return self.high - self.low


def runs_of(blocks: Sequence[int], begin: int, end: int, block_size: int) -> list[Run]:
    """Maximal runs of the slots of positions [begin, end), lowest first."""
    first_whole, end_whole = -(-begin // block_size), end // block_size
    if begin >= end:
        return []
    if first_whole > end_whole:  # a part of one block
        return [_partial(blocks, begin, end, block_size)]
    runs = [
        Run(low * block_size, high * block_size)
        for low, high in _id_runs(sorted(blocks[first_whole:end_whole]))
    ]
    if begin < first_whole * block_size:
        runs.append(_partial(blocks, begin, first_whole * block_size, block_size))
    if end_whole * block_size < end:
        runs.append(_partial(blocks, end_whole * block_size, end, block_size))
    return _joined(sorted(runs))


def _partial(blocks: Sequence[int], begin: int, end: int, block_size: int) -> Run:
    """Positions [begin, end) of one block."""
    index = begin // block_size
    shift = (blocks[index] - index) * block_size
    return Run(begin + shift, end + shift)


def _id_runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges [low, high) of rising ids without a gap."""
    if not ids:
        return
    low = previous = ids[0]
    if ids[-1] - low == len(ids) - 1:  # mostly
        yield low, ids[-1] + 1
        return
    for block in ids:
        if block > previous + 1:
            yield low, previous + 1
            low = block
        previous = block
    yield low, previous + 1


def _joined(runs: Sequence[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].high == run.low:
            run = Run(joined.pop().low, run.high)
        joined.append(run)
    return joined

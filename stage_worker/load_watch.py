"""How far the ranks of a worker have come with their layers, and a rank that gets no further.

Counts, in memory that all ranks see: a process that has stopped tells nothing, and what it counted
stays as it was. A worker of one rank counts for itself. Looked at by the event loop of the first.
"""

from __future__ import annotations

import mmap

from stage_worker.awake_time import looks
from stage_worker.rank_options import rank_words
from stagemesh.errors import LoadStalled

_WORD = 1  # of a rank's line


class LoadProgress:
    """A count for each rank, 0 while it loads nothing. `memory`: the page that ranks share, zero
    before any of them begins."""

    def __init__(self, size: int = 1, memory: mmap.mmap | None = None) -> None:
        self._words = rank_words(memory, size, _WORD)

    @property
    def counts(self) -> list[int]:
        """By rank."""
        return self._words.tolist()

    def begin(self, rank: int) -> None:
        """By whoever tells the rank to load, before it is told."""
        self._words[rank] = 1

    def advance(self, rank: int) -> None:
        """By the rank itself, and so is `end`."""
        self._words[rank] += 1

    def end(self, rank: int) -> None:
        self._words[rank] = 0


async def watch_load(progress: LoadProgress, limit_s: float) -> LoadStalled:
    """Returns once a rank has got no further for longer than `limit_s`, as far as this process was
    awake. The first rank waits for the others: what they do counts for it as well, and where it
    stands still with another, the other is told of."""
    counts = progress.counts
    still_s = [0.0] * len(counts)
    async for awake_s in looks():
        before, counts = counts, progress.counts
        for rank, count in reversed(list(enumerate(counts))):
            moved = counts != before if rank == 0 else count != before[rank]
            still_s[rank] = 0.0 if moved or not count else still_s[rank] + awake_s
            if still_s[rank] > limit_s:
                who = f"rank {rank} of {len(counts)}" if len(counts) > 1 else "this worker"
                return LoadStalled(
                    f"{who} has got no further with its layers for {still_s[rank]:.1f} s, of "
                    f"{limit_s:.1f} s that it may stand still"
                )
    raise AssertionError("looks have no end")

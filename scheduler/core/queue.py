"""Sequences that wait for a pipeline: by priority, then by arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from scheduler.core.sequence import Sequence


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


class WaitingQueue:
    """Whoever is preempted comes back to the place that arrival gave it."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self.num_tokens = 0  # of all that wait

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Over a copy: the queue may change meanwhile."""
        return iter(tuple(self._sequences))

    @property
    def best_priority(self) -> int | None:
        return self._sequences[0].request.priority if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_rank)
        self.num_tokens += sequence.num_tokens

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._sequences, sequence.rank, key=_rank)
        assert self._sequences[index] is sequence, "the sequence does not wait"
        del self._sequences[index]
        self.num_tokens -= sequence.num_tokens

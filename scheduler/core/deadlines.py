"""Which sequence's time is up next."""

from __future__ import annotations

import heapq

from scheduler.core.sequence import Sequence


class Deadlines:
    """A heap that sequences leave lazily: ended ones are thrown out at the top, or all at once
    when they are the majority."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._num_live = 0

    def add(self, sequence: Sequence) -> None:
        if sequence.request.deadline_ns is not None:
            entry = (sequence.request.deadline_ns, sequence.sequence_id, sequence)
            heapq.heappush(self._heap, entry)
            self._num_live += 1

    def sequence_ended(self, sequence: Sequence) -> None:
        if sequence.request.deadline_ns is None:
            return
        self._num_live -= 1
        if len(self._heap) > 2 * self._num_live + 64:
            self._heap = [entry for entry in self._heap if not entry[2].has_ended]
            heapq.heapify(self._heap)

    def next_ns(self) -> int | None:
        while self._heap and self._heap[0][2].has_ended:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expired(self, now_ns: int) -> list[Sequence]:
        """Those whose deadline has come; they stay until they are ended."""
        found = []
        while (deadline_ns := self.next_ns()) is not None and deadline_ns <= now_ns:
            found.append(heapq.heappop(self._heap)[2])
        return found

"""Whose turn it is: the sequences that run on a pipeline, and those of them that wait for a step.

Only the latter are looked at to plan a step, however many others are under way.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from scheduler.core.sequence import Sequence


class Turns:
    """`num_tokens` are those of all that run, prompt and output."""

    def __init__(self) -> None:
        self.running: dict[int, Sequence] = {}
        # Those of them that have something to plan, and maybe others; whoever waited longest first.
        self.ready: OrderedDict[int, Sequence] = OrderedDict()
        self.num_tokens = 0
        self._num_by_priority: Counter[int] = Counter()

    @property
    def worst_priority(self) -> int | None:
        """Of all that run."""
        return max(self._num_by_priority, default=None)

    def begin(self, sequence: Sequence) -> None:
        self.running[sequence.sequence_id] = self.ready[sequence.sequence_id] = sequence
        self.num_tokens += sequence.num_tokens
        self._num_by_priority[sequence.request.priority] += 1

    def end(self, sequence: Sequence) -> None:
        del self.running[sequence.sequence_id]
        self.ready.pop(sequence.sequence_id, None)
        self.num_tokens -= sequence.num_tokens
        priority = sequence.request.priority
        self._num_by_priority[priority] -= 1
        if self._num_by_priority[priority] == 0:
            del self._num_by_priority[priority]

    def token_came(self, sequence: Sequence) -> None:
        """The sequence has one token more, which is to be planned."""
        self.num_tokens += 1
        self.ready[sequence.sequence_id] = sequence

    def had_turn(self, sequence: Sequence, *, may_wait: bool) -> None:
        """Something of it was planned; more of it may be to plan."""
        if may_wait:
            self.ready.move_to_end(sequence.sequence_id)
        else:
            self.ready.pop(sequence.sequence_id, None)

    def all_wait(self) -> None:
        """Whatever was planned is undone."""
        self.ready = OrderedDict(self.running)

    def split(
        self, num_pending: Callable[[Sequence], int] | None
    ) -> tuple[list[Sequence], list[Sequence]]:
        """(those that need one token, those that need more), whoever waited longest first.

        `num_pending` where more is to be planned than what a sequence says itself. Then those that
        need nothing now are looked at again.
        """
        decoding: list[Sequence] = []
        catching_up: list[Sequence] = []
        done: list[Sequence] = []
        for sequence in self.ready.values():
            if num_pending is None:
                num = len(sequence.tokens) - sequence.num_scheduled
            else:
                num = num_pending(sequence)
            if num == 1:
                decoding.append(sequence)
            elif num > 1:
                catching_up.append(sequence)
            else:
                done.append(sequence)
        if num_pending is None:
            for sequence in done:
                del self.ready[sequence.sequence_id]
        return decoding, catching_up

"""A step under way: what was sent, and whose rows these are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.core.lacks import RebuildPart
from scheduler.core.sequence import Sequence
from stagemesh.plan import Step


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """`sequences` are those of the step's rows, one each.

    Rows of the sequences in `rebuilds`, by id, were computed before and come back to the stages
    that lack them.
    """

    step: Step
    sequences: tuple[Sequence, ...]
    rebuilds: Mapping[int, RebuildPart]
    sent_ns: int

    def current_sequences(self) -> list[Sequence]:
        """Those that did not end and were not preempted since."""
        pairs = zip(self.sequences, self.step.rows, strict=True)
        return [one for one, row in pairs if one.run == row.run and not one.has_ended]

    def num_tokens_and_positions(self) -> tuple[int, float]:
        """Positions are those that each token attends to, summed over the tokens."""
        num_tokens, num_positions = 0, 0.0
        for row in self.step.rows:
            num = row.num_tokens
            num_tokens += num
            num_positions += num * (row.start + (num + 1) / 2)
        return num_tokens, num_positions

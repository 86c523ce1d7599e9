"""What a step should take on this stage, learned from those that were done.

    T tokens of a row, S where it starts, E hidden size, L layers of the stage, V vocabulary

A step's work is counted in tokens without context: linear layers cost 24 L E² operations a token,
attention 4 L E for each position that a token sees, logits 2 E V. What a unit of work takes is
measured for each order of magnitude of the work apart, since small steps are bound by memory and
large ones by arithmetic. Meant for limits, so it rather says too much.
"""

from __future__ import annotations

from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Row, Span, Step

# Weight of a new measurement against those before.
_FRESHNESS = 0.2


class StepCost:
    """`num_observed` counts the steps that were learned from."""

    def __init__(self, spec: ModelSpec, span: Span) -> None:
        self._position_work = 1 / (6 * spec.hidden_size)
        self._logits_work = spec.vocab_size / (12 * span.num_layers * spec.hidden_size)
        # Mean work and seconds by order of magnitude.
        self._means: dict[int, tuple[float, float]] = {}
        self.num_observed = 0

    def work_of(self, step: Step, stage: int) -> float:
        """In tokens without context; at least 1."""
        rows = (row for row in step.rows if row.first_stage <= stage < row.end_stage)
        return max(1.0, sum(self._row_work(row) for row in rows))

    def observe(self, work: float, seconds: float) -> None:
        self.num_observed += 1
        order = int(work).bit_length()
        old_work, old_seconds = self._means.get(order, (work, seconds))
        self._means[order] = (
            old_work + _FRESHNESS * (work - old_work),
            old_seconds + _FRESHNESS * (seconds - old_seconds),
        )

    def predict_s(self, work: float) -> float:
        """Seconds, in proportion to what less work took, or as much as more work did."""
        if not self._means:
            return 0.0
        order = int(work).bit_length()
        smaller = [known for known in self._means if known <= order]
        known_work, seconds = self._means[max(smaller, default=min(self._means))]
        return seconds * max(1.0, work / known_work)

    def _row_work(self, row: Row) -> float:
        num_seen = row.num_tokens * (row.start + (row.num_tokens + 1) / 2)
        num_logits = len(row.sample_positions) + len(row.logprob_positions)
        return row.num_tokens + num_seen * self._position_work + num_logits * self._logits_work

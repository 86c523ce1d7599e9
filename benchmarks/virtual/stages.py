"""Stages that compute nothing and take as long as a stated cost model says.

    T tokens of a step, P positions that its tokens attend to, summed over the tokens

A step costs `base_ns + per_token_ns * T + per_position_ns * P` on a stage, which executes steps in
order, one at a time. A message takes `hop_ns`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from stagemesh.plan import HopTiming, Row, RowResult, SampledToken, Step, StepResult


@dataclass(frozen=True, slots=True)
class Cost:
    base_ns: int
    per_token_ns: float
    per_position_ns: float

    def of(self, step: Step) -> int:
        num_tokens = step.num_tokens
        num_positions = sum(
            row.num_tokens * (row.start + (row.num_tokens + 1) / 2) for row in step.rows
        )
        work_ns = self.per_token_ns * num_tokens + self.per_position_ns * num_positions
        return round(self.base_ns + work_ns)

    def scaled(self, factor: float) -> Cost:
        return Cost(
            round(self.base_ns * factor), self.per_token_ns * factor, self.per_position_ns * factor
        )


class FakeStages:
    """One pipeline. `busy` has for each stage when it computed: [start, end)."""

    def __init__(self, costs: tuple[Cost, ...], hop_ns: int) -> None:
        self.costs = costs
        self.hop_ns = hop_ns
        self.busy: list[list[tuple[int, int]]] = [[] for _ in costs]
        self._free_ns = [0] * len(costs)
        self._results: deque[tuple[int, StepResult]] = deque()

    def send(self, step: Step, now_ns: int) -> int:
        """When its result will be there."""
        at_ns, timings = now_ns, []
        for stage, cost in enumerate(self.costs):
            received_ns = at_ns + self.hop_ns
            idle_from_ns = self._free_ns[stage]
            start_ns = max(received_ns, idle_from_ns)
            at_ns = self._free_ns[stage] = start_ns + cost.of(step)
            self.busy[stage].append((start_ns, at_ns))
            timings.append(
                HopTiming(
                    stage=stage,
                    queue_ns=start_ns - received_ns,
                    compute_ns=at_ns - start_ns,
                    idle_ns=start_ns - idle_from_ns,
                    started_ns=start_ns,
                )
            )
        rows = tuple(map(_sampled, step.rows))
        result = StepResult(step.pipeline_id, step.epoch, step.step, rows, tuple(timings))
        self._results.append((at_ns + self.hop_ns, result))
        return at_ns + self.hop_ns

    @property
    def next_result_ns(self) -> int | None:
        return self._results[0][0] if self._results else None

    def take_result(self) -> StepResult:
        return self._results.popleft()[1]

    def busy_share(self, stage: int, start_ns: int, end_ns: int) -> float:
        """Of the time [start_ns, end_ns)."""
        spans = self.busy[stage]
        busy_ns = sum(max(0, min(end, end_ns) - max(start, start_ns)) for start, end in spans)
        return busy_ns / (end_ns - start_ns)


def _sampled(row: Row) -> RowResult:
    tokens = tuple(SampledToken(position + 1, 7) for position in row.sample_positions)
    return RowResult(row.sequence_id, row.run, tokens)

"""Drives a scheduling core by hand: requests with few words, steps answered at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from scheduler.core import (
    Finished,
    PipelineFacts,
    Request,
    RequestKey,
    SchedulerCore,
    SchedulerLimits,
    Tokens,
)
from stagemesh.plan import NOT_FINITE, Epoch, Row, RowResult, SampledToken, Step, StepResult
from stagemesh.sampling import SamplingSpec

TOKEN = 7


def request(number: int = 0, num_prompt: int = 4, max_tokens: int = 4, **changes: Any) -> Request:
    """Prompts of different numbers share no block."""
    prompt = tuple(range(100 * number, 100 * number + num_prompt))
    fields: dict[str, Any] = {
        "key": RequestKey(1, number),
        "attempt": 0,
        "label": f"r{number}",
        "prompt_token_ids": prompt,
        "output_token_ids": (),
        "sampling": SamplingSpec(),
        "max_tokens": max_tokens,
    }
    return Request(**(fields | changes))


def facts(pipeline_id: str = "p", **changes: Any) -> PipelineFacts:
    fields: dict[str, Any] = {
        "pipeline_id": pipeline_id,
        "epoch": Epoch(1, 1),
        "num_stages": 1,
        "num_blocks": 64,
        "block_size_tokens": 4,
        "max_model_len": 128,
        "model_identity": "model",
    }
    return PipelineFacts(**(fields | changes))


def core_with(*pipelines: PipelineFacts, **limits: Any) -> SchedulerCore:
    core = SchedulerCore(SchedulerLimits(**limits))
    for pipeline in pipelines:
        core.add_pipeline(pipeline, 0)
    return core


def restart(core: SchedulerCore, changes: PipelineFacts, lost_stages: Iterable[int] = ()) -> None:
    """The pipeline's epoch ends and the one of `changes` begins."""
    core.suspend_pipeline(changes.pipeline_id, 0)
    core.resume_pipeline(changes, frozenset(lost_stages), 0)


def answer(step: Step, broken: Iterable[int] = (), token_id: int = TOKEN) -> StepResult:
    """What the last stage says; sequences in `broken` became NaN."""
    rows = tuple(
        RowResult(row.sequence_id, row.run, error=NOT_FINITE)
        if row.sequence_id in broken
        else _row_result(row, token_id)
        for row in step.rows
    )
    return StepResult(step.pipeline_id, step.epoch, step.step, rows)


def _row_result(row: Row, token_id: int) -> RowResult:
    return RowResult(
        row.sequence_id,
        row.run,
        tuple(SampledToken(position + 1, token_id) for position in row.sample_positions),
        tuple(SampledToken(position + 1, 0, -1.0) for position in row.logprob_positions),
    )


class Drive:
    """Steps of a core that were planned and not answered yet, oldest first."""

    def __init__(self, core: SchedulerCore) -> None:
        self.core = core
        self.now_ns = 0
        self.in_flight: list[Step] = []
        self.events: list[Tokens | Finished] = []

    def plan(self) -> list[Step]:
        """What is new in flight."""
        steps = self.core.schedule(self.now_ns)
        self.core.check_integrity()
        self.in_flight += steps
        self._collect()
        return steps

    def answer(self, **how: Any) -> Step:
        """Answers the oldest step."""
        step = self.in_flight.pop(0)
        self.core.on_result(answer(step, **how), self.now_ns)
        self.core.check_integrity()
        self._collect()
        return step

    def finish(self, max_steps: int = 1000) -> list[Step]:
        """Until nothing is left to do; all steps that were answered."""
        answered = []
        for _ in range(max_steps):
            self.plan()
            if not self.in_flight:
                return answered
            answered.append(self.answer())
        raise AssertionError(f"work is left after {max_steps} steps")

    def ended(self) -> dict[int, Finished]:
        """Endings by request number."""
        ends = [event for event in self.events if isinstance(event, Finished)]
        assert len({(end.key, end.attempt) for end in ends}) == len(ends)
        return {end.key.request: end for end in ends}

    def output(self, number: int) -> list[int]:
        tokens = [
            event
            for event in self.events
            if isinstance(event, Tokens) and event.key.request == number
        ]
        return [token.token_id for event in tokens for token in event.tokens]

    def _collect(self) -> None:
        self.events += self.core.take_events()

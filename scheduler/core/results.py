"""Holds a step's result against the step: what does not answer it is refused as a whole."""

from __future__ import annotations

from scheduler.core.pipeline import Pipeline, RowInFlight, StepInFlight
from stagemesh.errors import ProtocolError, StepOutOfOrder
from stagemesh.plan import RowResult, StepResult


def match_result(pipeline: Pipeline, result: StepResult) -> StepInFlight | None:
    """The oldest step in flight if `result` answers it; None for what was answered before or
    belongs to another epoch.

    Raises StepOutOfOrder, ProtocolError.
    """
    if result.epoch != pipeline.epoch:
        return None
    oldest = pipeline.next_step - len(pipeline.in_flight)
    if result.step < oldest:
        return None
    where = f"{result.pipeline_id}, step {result.step}"
    if result.step > oldest or not pipeline.in_flight:
        raise StepOutOfOrder(f"{where}: the result of step {oldest} is still to come")
    step = pipeline.in_flight[0]
    if len(result.rows) != len(step.rows):
        raise ProtocolError(f"{where}: {len(result.rows)} results for {len(step.rows)} rows")
    for row, answer in zip(step.rows, result.rows, strict=True):
        _check_row(where, row, answer)
    return step


def _check_row(where: str, row: RowInFlight, answer: RowResult) -> None:
    expected = (row.sequence.sequence_id, row.run)
    if (answer.sequence_id, answer.run) != expected:
        raise ProtocolError(
            f"{where}: a result for sequence {answer.sequence_id} run {answer.run} where "
            f"{expected[0]} run {expected[1]} was planned"
        )
    if answer.error is not None:
        return
    for what, planned, given in (
        ("tokens sampled", row.sample_positions, answer.sampled),
        ("log-probabilities", row.logprob_positions, answer.prompt_logprobs),
    ):
        if tuple(token.position - 1 for token in given) != planned:
            raise ProtocolError(
                f"{where}, sequence {expected[0]}: {what} after positions "
                f"{[token.position - 1 for token in given]}, planned {list(planned)}"
            )

"""Holds a step's result against the step: what does not answer it is refused as a whole."""

from __future__ import annotations

from scheduler.core.pipeline import Pipeline, RowInFlight, StepInFlight
from stagemesh.errors import ProtocolError, StepOutOfOrder
from stagemesh.plan import RowResult, SampledToken, StepResult


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
        if not _is_one_token(row, answer):
            _check_row(where, row, answer)
    return step


def _is_one_token(row: RowInFlight, answer: RowResult) -> bool:
    """Whether it is what most answers are, so that nothing more is to be asked about it."""
    planned, sampled = row.sample_positions, answer.sampled
    return (
        len(sampled) == len(planned) == 1
        and sampled[0].position == planned[0] + 1
        and answer.sequence_id == row.sequence.sequence_id
        and answer.run == row.run
        and not (row.logprob_positions or answer.prompt_logprobs or answer.error)
    )


def _check_row(where: str, row: RowInFlight, answer: RowResult) -> None:
    sequence_id = row.sequence.sequence_id
    if answer.sequence_id != sequence_id or answer.run != row.run:
        raise ProtocolError(
            f"{where}: a result for sequence {answer.sequence_id} run {answer.run} where "
            f"{sequence_id} run {row.run} was planned"
        )
    if answer.error is not None:
        return
    if not _stand_after(row.sample_positions, answer.sampled):
        what, planned, given = "tokens sampled", row.sample_positions, answer.sampled
    elif answer.prompt_logprobs or row.logprob_positions:
        what, planned, given = "log-probabilities", row.logprob_positions, answer.prompt_logprobs
        if _stand_after(planned, given):
            return
    else:
        return
    raise ProtocolError(
        f"{where}, sequence {sequence_id}: {what} after positions "
        f"{[token.position - 1 for token in given]}, planned {list(planned)}"
    )


def _stand_after(positions: tuple[int, ...], tokens: tuple[SampledToken, ...]) -> bool:
    return tuple(token.position - 1 for token in tokens) == positions

"""Holds a step's result against the step: what does not answer it is refused as a whole."""

from __future__ import annotations

from scheduler.core.in_flight import StepInFlight
from scheduler.core.pipeline import Pipeline
from stagemesh.errors import (
    InternalError,
    NotFiniteError,
    ProtocolError,
    StageMeshError,
    StepOutOfOrder,
)
from stagemesh.plan import NOT_FINITE, Row, RowResult, SampledToken, StepResult


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
    in_flight = pipeline.in_flight[0]
    rows = in_flight.step.rows
    if len(result.rows) != len(rows):
        raise ProtocolError(f"{where}: {len(result.rows)} results for {len(rows)} rows")
    for row, answer in zip(rows, result.rows, strict=True):
        planned, sampled = row.sample_positions, answer.sampled
        # Most answers are one token that was asked for: nothing more is to be asked about those.
        if not (
            len(sampled) == len(planned) == 1
            and sampled[0].position == planned[0] + 1
            and answer.sequence_id == row.sequence_id
            and answer.run == row.run
            and not (answer.prompt_logprobs or row.logprob_positions or answer.error)
        ):
            _check_row(where, row, answer)
    return in_flight


def row_error(error: str) -> StageMeshError:
    """What the client is told where a stage says this of a row."""
    if error == NOT_FINITE:
        return NotFiniteError("the model's numbers became NaN or infinite for this request")
    return InternalError(f"a stage failed: {error}")


def _check_row(where: str, row: Row, answer: RowResult) -> None:
    sequence_id = row.sequence_id
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

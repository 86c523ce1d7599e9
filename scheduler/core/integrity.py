"""What must hold in the core between any two calls; a breach is a bug of ours.

Written against what the sequences say they hold, not with the code that keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scheduler.core.pipeline import Pipeline
from scheduler.core.roster import Roster
from scheduler.core.sequence import Sequence


def check_core(pipelines: Iterable[Pipeline], roster: Roster) -> None:
    """Raises AssertionError."""
    waiting = list(roster.queue)
    ranks = [sequence.rank for sequence in waiting]
    _check(ranks == sorted(ranks), "queue", "is out of order")
    placed = {sequence.sequence_id for sequence in waiting}
    for sequence in waiting:
        _check_waiting(sequence)
    for pipeline in pipelines:
        _check(placed.isdisjoint(pipeline.running), pipeline, "runs who is elsewhere too")
        placed |= {one.sequence_id for one in pipeline.running.values() if not one.is_probe}
        _check_pipeline(pipeline)
    live = {sequence.sequence_id for sequence in roster.live.values()}
    _check(placed == live, "live sequences", "are not those that wait or run")
    counters = roster.counters
    num_ended = counters.num_finished + counters.num_aborted + counters.num_failed
    _check(counters.num_accepted == num_ended + len(live), "a request", "was lost or ended twice")


def _check_waiting(sequence: Sequence) -> None:
    _check(not sequence.has_ended, sequence, "ended and waits")
    _check(sequence.pipeline is None, sequence, "waits and has a pipeline")
    _check(sequence.num_scheduled == sequence.num_computed == 0, sequence, "waits with KV")
    _check(not any(sequence.table.groups), sequence, "waits with blocks")


def _check_pipeline(pipeline: Pipeline) -> None:
    running = pipeline.running.values()
    held = Counter(block_id for one in running for block_id in one.table.block_ids())
    pipeline.pool.check_integrity(held)
    _check_turns(pipeline)
    _check_steps(pipeline)
    _check_lacks(pipeline)
    shared = {block_id for block_id, num in held.items() if num > 1}
    for sequence in running:
        _check_running(pipeline, sequence)
        _check_table(pipeline, sequence, shared)
        _check_names(pipeline, sequence)


def _check_turns(pipeline: Pipeline) -> None:
    """Nobody who has something to plan is overlooked."""
    running, turns = pipeline.running, pipeline.turns
    waiting = {number for number, one in running.items() if pipeline.num_pending(one)}
    _check(waiting <= turns.ready.keys(), pipeline, "overlooks a sequence")
    _check(turns.ready.keys() <= running.keys(), pipeline, "has a turn for who does not run")
    num_tokens = sum(one.num_tokens for one in running.values())
    _check(turns.num_tokens == num_tokens, pipeline, "has miscounted its tokens")
    worst = max((one.request.priority for one in running.values()), default=None)
    _check(turns.worst_priority == worst, pipeline, "has miscounted its priorities")


def _check_steps(pipeline: Pipeline) -> None:
    """Rows in flight cover [num_computed, num_scheduled) of every sequence, in order."""
    steps = [each.step.step for each in pipeline.in_flight]
    expected = list(range(pipeline.next_step - len(steps), pipeline.next_step))
    _check(steps == expected, pipeline, "has a gap among its steps in flight")
    reached = {one.sequence_id: one.num_computed for one in pipeline.running.values()}
    for each in pipeline.in_flight:
        for sequence, row in zip(each.sequences, each.step.rows, strict=True):
            number = sequence.sequence_id
            _check(row.sequence_id == number, sequence, "is given the row of another")
            is_current = not sequence.has_ended and sequence.run == row.run
            if is_current and number not in each.rebuilds:
                _check(row.start == reached[number], sequence, "has a gap in flight")
                reached[number] = row.end
    for sequence in pipeline.running.values():
        is_covered = reached[sequence.sequence_id] == sequence.num_scheduled
        _check(is_covered, sequence, "is scheduled and not in flight")


def _check_lacks(pipeline: Pipeline) -> None:
    """Rows in flight bring [computed, scheduled) of every lacking block back, in order."""
    reached = {
        (stage, block_id): lack.computed
        for stage, blocks in pipeline.lacks.by_stage.items()
        for block_id, lack in blocks.items()
    }
    for part in (part for each in pipeline.in_flight for part in each.rebuilds.values()):
        for stage in part.stages:
            reached |= {(stage, b): end for b, end in part.ends if (stage, b) in reached}
    for (stage, block_id), end in reached.items():
        lack = pipeline.lacks.by_stage[stage][block_id]
        what = f"block {block_id} on stage {stage}"
        _check(pipeline.pool.num_owners(block_id) > 0, pipeline, f"rebuilds {what}, of nobody")
        is_ordered = 0 <= lack.computed <= lack.scheduled <= lack.needed
        _check(is_ordered and lack.computed < lack.needed, pipeline, f"miscounts {what}")
        _check(lack.scheduled == end, pipeline, f"has {what} scheduled and not in flight")


def _check_running(pipeline: Pipeline, sequence: Sequence) -> None:
    _check(not sequence.has_ended, sequence, "ended and runs")
    _check(sequence.pipeline is pipeline, sequence, "runs elsewhere")
    is_ordered = 0 <= sequence.num_computed <= sequence.num_scheduled <= sequence.num_tokens
    _check(is_ordered, sequence, "has counters out of order")
    _check(sequence.num_computed < sequence.num_tokens, sequence, "is computed and not sampled")
    _check(sequence.num_tokens < pipeline.facts.capacity_tokens, sequence, "is too long")
    max_length = min(sequence.request.total_length, pipeline.facts.capacity_tokens)
    _check(sequence.max_length == max_length, sequence, "would end too late or too soon")


def _check_table(pipeline: Pipeline, sequence: Sequence, shared: set[int]) -> None:
    table, size = sequence.table, pipeline.facts.block_size_tokens
    block_ids = list(table.block_ids())
    num_blocks = table.num_entries * table.num_groups
    _check(len(block_ids) == num_blocks, sequence, "has groups of different lengths")
    _check(len(set(block_ids)) == num_blocks, sequence, "holds a block twice")
    num_positions = table.num_entries * size
    _check(num_positions >= sequence.num_scheduled, sequence, "is scheduled beyond its blocks")
    is_computed = sequence.num_named * size <= sequence.num_computed
    _check(is_computed, sequence, "has named what is not computed")
    for group in table.groups:
        for block_id in group[sequence.num_named :]:
            _check(block_id not in shared, sequence, "shares a block that will be written")
            is_blank = pipeline.pool.name_of(block_id) is None
            _check(is_blank, sequence, "will write to a block that the prefix index knows")


def _check_names(pipeline: Pipeline, sequence: Sequence) -> None:
    num_named = sequence.num_named
    hashes = sequence.chain(pipeline.facts).extend(sequence.tokens, num_named)
    for group, block_ids in enumerate(sequence.table.groups):
        for digest, block_id in zip(hashes, block_ids[:num_named], strict=False):
            known = pipeline.pool.name_of(block_id)
            _check(known is None or known == (group, digest), sequence, "has a misnamed block")


def _check(condition: bool, subject: Sequence | Pipeline | str, message: str) -> None:
    if not condition:
        raise AssertionError(f"{_describe(subject)} {message}")


def _describe(subject: Sequence | Pipeline | str) -> str:
    if isinstance(subject, Pipeline):
        return f"pipeline {subject.pipeline_id}"
    if isinstance(subject, str):
        return subject
    return (
        f"sequence {subject.sequence_id} run {subject.run} (computed {subject.num_computed}, "
        f"scheduled {subject.num_scheduled}, tokens {subject.num_tokens})"
    )

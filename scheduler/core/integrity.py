"""What must hold in the core between any two calls; a breach is a bug of ours.

Written against what the sequences say they hold, not with the code that keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scheduler.core.pipeline import Pipeline
from scheduler.core.roster import Roster
from scheduler.core.sequence import Sequence


def check_core(
    pipelines: Iterable[Pipeline],
    roster: Roster,
) -> None:
    """Raises AssertionError."""
    waiting = list(roster.queue)
    _check(waiting == sorted(waiting, key=lambda s: s.rank), "the queue is out of order")
    placed = {s.sequence_id for s in waiting}
    for sequence in waiting:
        _check_waiting(sequence)
    for pipeline in pipelines:
        _check(placed.isdisjoint(pipeline.running), "a sequence is in two places")
        placed |= pipeline.running.keys()
        _check_pipeline(pipeline)
    live = {sequence.sequence_id for sequence in roster.live.values()}
    _check(placed == live, "live sequences are not those that are placed")
    counters = roster.counters
    num_ended = counters.num_finished + counters.num_aborted + counters.num_failed
    _check(counters.num_accepted == num_ended + len(live), "a request was lost or ended twice")


def _check_waiting(sequence: Sequence) -> None:
    name = _name(sequence)
    _check(not sequence.has_ended, f"{name} ended and waits")
    _check(sequence.pipeline is None, f"{name} waits and has a pipeline")
    _check(sequence.num_scheduled == sequence.num_computed == 0, f"{name} waits with KV")
    _check(not any(sequence.table.groups), f"{name} waits with blocks")


def _check_pipeline(pipeline: Pipeline) -> None:
    running = pipeline.running.values()
    held = Counter(block_id for s in running for block_id in s.table.block_ids())
    pipeline.pool.check_integrity(held)
    _check(pipeline.num_step_slots >= 0, f"{pipeline.pipeline_id}: too many steps in flight")
    _check_steps(pipeline)
    shared = {block_id for block_id, num in held.items() if num > 1}
    for sequence in running:
        _check_running(pipeline, sequence)
        _check_table(pipeline, sequence, shared)


def _check_steps(pipeline: Pipeline) -> None:
    steps = [step.step for step in pipeline.in_flight]
    expected = list(range(pipeline.next_step - len(steps), pipeline.next_step))
    _check(steps == expected, f"{pipeline.pipeline_id}: steps in flight are {steps}")
    reached = {s.sequence_id: s.num_computed for s in pipeline.running.values()}
    for step in pipeline.in_flight:
        for row in step.rows:
            if row.is_current:
                name = _name(row.sequence)
                _check(
                    row.start == reached[row.sequence.sequence_id], f"{name} has a gap in flight"
                )
                reached[row.sequence.sequence_id] = row.end
    for sequence in pipeline.running.values():
        in_flight = reached[sequence.sequence_id]
        _check(in_flight == sequence.num_scheduled, f"{_name(sequence)}: {in_flight} is in flight")


def _check_running(pipeline: Pipeline, sequence: Sequence) -> None:
    name = _name(sequence)
    _check(not sequence.has_ended, f"{name} ended and runs")
    _check(sequence.pipeline is pipeline, f"{name} runs elsewhere")
    _check(
        0 <= sequence.num_computed <= sequence.num_scheduled <= sequence.num_tokens,
        f"{name}: computed {sequence.num_computed}, scheduled {sequence.num_scheduled}, "
        f"tokens {sequence.num_tokens}",
    )
    _check(sequence.num_computed < sequence.num_tokens, f"{name} is computed and not sampled")
    _check(sequence.num_tokens < pipeline.facts.capacity_tokens, f"{name} is too long")


def _check_table(pipeline: Pipeline, sequence: Sequence, shared: set[int]) -> None:
    name, table, size = _name(sequence), sequence.table, pipeline.facts.block_size_tokens
    num_entries = table.num_entries
    block_ids = list(table.block_ids())
    _check(len(block_ids) == num_entries * table.num_groups, f"{name}: groups differ in length")
    _check(len(set(block_ids)) == len(block_ids), f"{name} holds a block twice")
    _check(num_entries * size >= sequence.num_scheduled, f"{name} is scheduled beyond its blocks")
    _check(sequence.num_named * size <= sequence.num_computed, f"{name} named what is not computed")
    for group in table.groups:
        unnamed = group[sequence.num_named :]
        _check(shared.isdisjoint(unnamed), f"{name} shares a block that will be written")
        _check(
            all(pipeline.pool.name_of(block_id) is None for block_id in unnamed),
            f"{name}: a block that will be written is known to the prefix index",
        )
    _check_names(pipeline, sequence)


def _check_names(pipeline: Pipeline, sequence: Sequence) -> None:
    hashes = sequence.chain(pipeline.facts).extend(sequence.tokens, sequence.num_named)
    for group, block_ids in enumerate(sequence.table.groups):
        for index in range(sequence.num_named):
            known = pipeline.pool.name_of(block_ids[index])
            _check(
                known is None or known == (group, hashes[index]),
                f"{_name(sequence)}: block {block_ids[index]} has another name",
            )


def _name(sequence: Sequence) -> str:
    return f"sequence {sequence.sequence_id} run {sequence.run}"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)

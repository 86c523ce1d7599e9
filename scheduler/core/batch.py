"""Fills one step of one pipeline: who takes part, with how many tokens.

Sequences that need one token (decoding, mostly) come first, those that waited longest before the
others, and are dealt evenly over the steps that may be in flight, so that every stage has work.
Those that have more to catch up share what is left of the token budget, by rank; a part of it is
theirs alone. What a replaced stage lacks of a sequence is rebuilt before anything new of it is
computed. Where blocks are short, the worst ranked running sequence is preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from scheduler.core.budgets import TokenBudget
from scheduler.core.lacks import RebuildPart
from scheduler.core.limits import SchedulerLimits
from scheduler.core.pipeline import Pipeline, RowInFlight
from scheduler.core.sequence import Sequence
from stagemesh.plan import Row, Step

# The share of a step's tokens that decoding leaves to sequences that catch up.
_CATCH_UP_DIVISOR = 4


def plan_step(
    pipeline: Pipeline,
    limits: SchedulerLimits,
    preempt: Callable[[Sequence], None],
    now_ns: int,
) -> Step | None:
    """The next step of a pipeline that may send one, or None if there is nothing to do in it."""
    decoding: list[Sequence] = []
    catching_up: list[Sequence] = []
    for sequence in pipeline.running.values():
        num_pending = pipeline.num_pending(sequence)
        if num_pending:
            (decoding if num_pending == 1 else catching_up).append(sequence)
    catching_up.sort(key=lambda sequence: sequence.rank)
    num_decoding = len(pipeline.running) - len(catching_up)
    decode_share = -(-num_decoding // pipeline.max_steps_in_flight)
    catch_up_share = -(-len(catching_up) // pipeline.num_step_slots)

    tokens = TokenBudget(limits.max_step_tokens, limits.max_chunk_tokens)
    batch = Batch(pipeline, tokens, preempt)
    if catching_up:
        # In a tiny budget: one token in every other step.
        reserve = limits.max_step_tokens // _CATCH_UP_DIVISOR or pipeline.next_step % 2
        tokens.reserve(reserve)
    num_added = batch.fill(decoding, decode_share)
    tokens.reserve(0)
    batch.fill(catching_up, catch_up_share)
    batch.fill(decoding, decode_share - num_added)
    return batch.send(now_ns)


class _Part(NamedTuple):
    """Positions [start, end) of a sequence: new ones or, with `rebuild`, computed before."""

    sequence: Sequence
    start: int
    end: int
    rebuild: RebuildPart | None = None


class Batch:
    """A step under construction."""

    def __init__(
        self, pipeline: Pipeline, tokens: TokenBudget, preempt: Callable[[Sequence], None]
    ) -> None:
        self._pipeline = pipeline
        self._tokens = tokens
        self._preempt = preempt
        self._parts: dict[int, _Part] = {}

    def fill(self, sequences: Iterable[Sequence], max_rows: int) -> int:
        """Adds up to `max_rows` of them, and says how many."""
        num_added = 0
        for sequence in sequences:
            if num_added >= max_rows or self._tokens.grant(1) == 0:
                break
            is_here = sequence.pipeline is self._pipeline  # not preempted a moment ago
            if is_here and sequence.sequence_id not in self._parts:
                num_added += self._add(sequence)
        return num_added

    def send(self, now_ns: int) -> Step | None:
        """The step, or None without rows. What is to be forgotten waits for rows, but not on an
        idle pipeline: the stages should not hold on to it."""
        parts = self._parts.values()
        if not parts and (self._pipeline.in_flight or not self._pipeline.to_forget):
            return None
        rows = tuple(self._row(part) for part in parts)
        in_flight = tuple(_in_flight(row, part) for row, part in zip(rows, parts, strict=True))
        return self._pipeline.send(rows, in_flight, now_ns)

    def _add(self, sequence: Sequence) -> bool:
        lacks = self._pipeline.lacks
        if lacks:
            if lacks.is_in_making(sequence.table):
                return False  # another sequence's row of this step brings back what both hold
            rebuild = lacks.next_part(sequence.table, self._tokens.grant(sequence.num_computed))
            if rebuild is not None:
                lacks.reserve(rebuild)
                self._take(_Part(sequence, rebuild.start, rebuild.end, rebuild))
                return True
        start = sequence.num_scheduled
        end = self._make_room(sequence, start + self._tokens.grant(sequence.num_pending))
        if end == start:
            return False
        self._take(_Part(sequence, start, end))
        sequence.num_scheduled = end
        return True

    def _take(self, part: _Part) -> None:
        self._tokens.take(part.end - part.start)
        self._parts[part.sequence.sequence_id] = part
        self._pipeline.running.move_to_end(part.sequence.sequence_id)

    def _make_room(self, sequence: Sequence, end: int) -> int:
        """Allocates blocks up to `end`, or up to where they last; preempts for the first only.

        A sequence for which there is no room keeps what it has and waits: those ranked before it
        can take it, and those behind it have been preempted.
        """
        facts, pool, table = self._pipeline.facts, self._pipeline.pool, sequence.table
        if end <= table.num_entries * facts.block_size_tokens:
            return end
        while True:
            num_entries = table.num_entries + pool.num_free // table.num_groups
            room = num_entries * facts.block_size_tokens
            if room > sequence.num_scheduled:
                break
            victim = max(self._pipeline.running.values(), key=lambda other: other.rank)
            if victim is sequence:
                return sequence.num_scheduled
            self._drop(victim)
        end = min(end, room)
        self._pipeline.grow(sequence, facts.num_blocks_for(end))
        return end

    def _drop(self, victim: Sequence) -> None:
        part = self._parts.pop(victim.sequence_id, None)
        if part is not None:
            self._tokens.give_back(part.end - part.start)
            if part.rebuild is not None:
                self._pipeline.lacks.release(part.rebuild)
        self._preempt(victim)

    def _row(self, part: _Part) -> Row:
        sequence, start, end, rebuild = part
        is_first = sequence.needs_state
        sequence.needs_state = False
        sequence.is_known_to_stages = True
        logprobs = sequence.wanted_prompt_logprobs if rebuild is None else range(0)
        is_new_end = rebuild is None and end == sequence.num_tokens
        is_from_log = rebuild is not None and rebuild.first_stage > 0
        return Row(
            sequence_id=sequence.sequence_id,
            run=sequence.run,
            start=start,
            num_tokens=end - start,
            token_ids=() if is_from_log else tuple(sequence.tokens[start:end]),
            block_updates=sequence.table.take_updates(whole=is_first),
            first_stage=rebuild.first_stage if rebuild else 0,
            end_stage=rebuild.end_stage if rebuild else self._pipeline.facts.num_stages,
            sample_positions=(end - 1,) if is_new_end else (),
            logprob_positions=_overlap(logprobs, start, end) if logprobs else (),
            input_from_log_of_stage=rebuild.first_stage - 1 if rebuild and is_from_log else None,
            state=sequence.state() if is_first else None,
            first_writing_stage=rebuild.writing_stage if rebuild else 0,
        )


def _overlap(wanted: range, start: int, end: int) -> tuple[int, ...]:
    return tuple(range(max(start, wanted.start), min(end, wanted.stop)))


def _in_flight(row: Row, part: _Part) -> RowInFlight:
    return RowInFlight(
        sequence=part.sequence,
        run=row.run,
        start=part.start,
        end=part.end,
        sample_positions=row.sample_positions,
        logprob_positions=row.logprob_positions,
        rebuild=part.rebuild,
    )

"""Fills one step of one pipeline: who takes part, with how many tokens.

Sequences that need one token (decoding, mostly) come first, those that waited longest before the
others. Those that have more to catch up go by rank, with what is left of the token budget; a part
of it is theirs alone. How much of either a step takes on is said by scheduler/core/balance.py. What
a replaced stage lacks of a sequence is rebuilt before anything new of it is computed. Where blocks
are short, the worst ranked running sequence is preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from scheduler.core.balance import share_out
from scheduler.core.budgets import CostBudget, TokenBudget
from scheduler.core.lacks import RebuildPart
from scheduler.core.limits import SchedulerLimits
from scheduler.core.pipeline import Pipeline
from scheduler.core.sequence import Sequence
from stagemesh.plan import Row, Step

# The share of a step's tokens that decoding leaves to sequences that catch up.
_CATCH_UP_DIVISOR = 4


def plan_step(
    pipeline: Pipeline,
    limits: SchedulerLimits,
    num_waiting_tokens: int,
    preempt: Callable[[Sequence], None],
    now_ns: int,
) -> Step | None:
    """The next step of a pipeline that may send one, or None if there is nothing to do in it."""
    decoding, catching_up = pipeline.take_ready()
    catching_up.sort(key=lambda sequence: sequence.rank)
    shares = share_out(pipeline, catching_up, num_waiting_tokens)
    rates = pipeline.pace.rates
    decode_share = CostBudget(shares.decoding, rates)

    tokens = TokenBudget(limits.max_step_tokens, limits.max_chunk_tokens)
    batch = Batch(pipeline, tokens, preempt)
    if catching_up:
        # In a tiny budget: one token in every other step.
        reserve = limits.max_step_tokens // _CATCH_UP_DIVISOR or pipeline.next_step % 2
        tokens.reserve(reserve)
    batch.deal(decoding, decode_share)
    tokens.reserve(0)
    batch.fill(catching_up, CostBudget(shares.catching_up, rates, shares.least))
    batch.deal(decoding, decode_share)
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
        # Who takes part, by id, in the order of rows; and how, unless with the last token alone.
        self._sequences: dict[int, Sequence] = {}
        self._parts: dict[int, _Part] = {}

    def fill(self, sequences: Iterable[Sequence], share: CostBudget) -> None:
        """Adds of them what the share allows, in their order."""
        for sequence in sequences:
            num_granted = share.grant(*self._pipeline.pending_span(sequence))
            if num_granted == 0 or self._tokens.grant(1) == 0:
                break
            is_here = sequence.pipeline is self._pipeline  # not preempted a moment ago
            if is_here and sequence.sequence_id not in self._sequences:
                self._add(sequence, num_granted, share)

    def deal(self, sequences: Iterable[Sequence], share: CostBudget) -> None:
        """The same for those that need one token each.

        Most rows of most steps are of this kind, so less is asked about those of them that stages
        know and that need no new block.
        """
        if self._pipeline.lacks:
            self.fill(sequences, share)
            return
        pipeline, tokens, chosen = self._pipeline, self._tokens, self._sequences
        size, ready = pipeline.facts.block_size_tokens, pipeline.turns.ready
        for sequence in sequences:
            if tokens.remaining <= tokens.reserved or share.is_used_up:
                break
            number, position = sequence.sequence_id, sequence.num_scheduled
            if sequence.pipeline is not pipeline or number in chosen:
                continue
            if sequence.needs_state or position == len(sequence.table.groups[0]) * size:
                self._add(sequence, 1, share)
                continue
            sequence.num_scheduled = position + 1
            tokens.remaining -= 1
            share.take_one(position)
            chosen[number] = sequence
            del ready[number]

    def send(self, now_ns: int) -> Step | None:
        """The step, or None without rows. What is to be forgotten waits for rows, but not on an
        idle pipeline: the stages should not hold on to it."""
        pipeline, parts = self._pipeline, self._parts
        if not self._sequences and (pipeline.in_flight or not pipeline.to_forget):
            return None
        num_stages = pipeline.facts.num_stages
        rows = tuple(
            [
                self._row(parts[number]) if number in parts else _decode_row(sequence, num_stages)
                for number, sequence in self._sequences.items()
            ]
        )
        rebuilds = {number: part.rebuild for number, part in parts.items() if part.rebuild}
        return pipeline.send(rows, tuple(self._sequences.values()), rebuilds, now_ns)

    def _add(self, sequence: Sequence, max_tokens: int, share: CostBudget) -> None:
        lacks = self._pipeline.lacks
        if lacks:
            if lacks.is_in_making(sequence.table):
                return  # another sequence's row of this step brings back what both hold
            num_tokens = self._tokens.grant(min(max_tokens, sequence.num_computed))
            rebuild = lacks.next_part(sequence.table, num_tokens)
            if rebuild is not None:
                lacks.reserve(rebuild)
                self._take(_Part(sequence, rebuild.start, rebuild.end, rebuild), share)
                return
        start = sequence.num_scheduled
        num_tokens = self._tokens.grant(min(max_tokens, sequence.num_pending))
        end = self._make_room(sequence, start + num_tokens)
        if end > start:
            sequence.num_scheduled = end
            self._take(_Part(sequence, start, end), share)

    def _take(self, part: _Part, share: CostBudget) -> None:
        num_tokens = part.end - part.start
        self._tokens.take(num_tokens)
        share.take(part.start, num_tokens)
        number = part.sequence.sequence_id
        self._sequences[number], self._parts[number] = part.sequence, part
        self._pipeline.had_turn(part.sequence)

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
        if self._sequences.pop(victim.sequence_id, None) is not None:
            self._tokens.give_back(part.end - part.start if part else 1)
        if part is not None and part.rebuild is not None:
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


def _decode_row(sequence: Sequence, num_stages: int) -> Row:
    """The last token of a sequence that the stages know, table and all: what most rows are."""
    position = sequence.num_scheduled - 1
    return Row(
        sequence.sequence_id,
        sequence.run,
        position,
        1,
        (sequence.tokens[position],),
        (),
        0,
        num_stages,
        (position,),
    )


def _overlap(wanted: range, start: int, end: int) -> tuple[int, ...]:
    return tuple(range(max(start, wanted.start), min(end, wanted.stop)))

"""One pipeline as the core sees it: its blocks, who runs on it, and the steps in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from scheduler.core.blocks import BlockName, BlockPool
from scheduler.core.in_flight import StepInFlight
from scheduler.core.lacks import Lacks, RebuildPart
from scheduler.core.limits import SchedulerLimits
from scheduler.core.pace import Pace
from scheduler.core.rates import MendTime, StepCost, Unscheduled
from scheduler.core.sequence import Sequence
from scheduler.core.turns import Turns
from stagemesh.errors import ConfigError
from stagemesh.plan import Epoch, HopTiming, Row, SequenceRun, Step


@dataclass(frozen=True, slots=True)
class PipelineFacts:
    """What was found out about a pipeline when it formed.

    `num_blocks` is the smallest stage's. `max_model_len` is in tokens. KV of requests longer than
    `dynamic_rope_length` depends on their total length; 0 for never. Stage i logs what it sends for
    blocks [0, num_log_blocks[i]); empty: no stage keeps a log. All stages hold `adapters`, by
    their identities.

    Raises ConfigError.
    """

    pipeline_id: str
    epoch: Epoch
    num_stages: int
    num_blocks: int
    block_size_tokens: int
    max_model_len: int
    model_identity: str
    dynamic_rope_length: int = 0
    num_log_blocks: tuple[int, ...] = ()
    adapters: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("num_stages", "num_blocks", "block_size_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a pipeline must be at least 1")
        if self.num_log_blocks and len(self.num_log_blocks) != self.num_stages:
            raise ConfigError("num_log_blocks of a pipeline must have one number per stage")

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence, prompt and output together."""
        return min(self.max_model_len, self.num_blocks * self.block_size_tokens)

    def has_adapter(self, adapter: str) -> bool:
        """Whether requests of it can run here; empty: of none."""
        return not adapter or adapter in self.adapters

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)


_NUM_RECENT_TIMINGS = 32


class Pipeline:
    def __init__(self, facts: PipelineFacts, limits: SchedulerLimits, now_ns: int) -> None:
        self.facts = facts
        self.capacity_tokens = facts.capacity_tokens
        self.epoch = facts.epoch
        self.pool = BlockPool(facts.num_blocks)
        self.turns = Turns()
        self.running = self.turns.running
        self.in_flight: deque[StepInFlight] = deque()
        self.to_forget: list[SequenceRun] = []
        self.next_step = 0
        self.num_steps_done = 0
        self.recent_timings: deque[tuple[HopTiming, ...]] = deque(maxlen=_NUM_RECENT_TIMINGS)
        self.lacks = Lacks(facts.block_size_tokens, self._num_log_blocks())
        self.step_cost = StepCost()
        self.pace = Pace(facts.num_stages, limits.max_steps_in_flight)
        self.mend_time = MendTime()
        self.unscheduled = Unscheduled()
        self.unscheduled.began(now_ns)
        self.suspended_ns: int | None = None
        self.num_tokens_rebuilt = 0

    @property
    def pipeline_id(self) -> str:
        return self.facts.pipeline_id

    @property
    def num_step_slots(self) -> int:
        """Steps that may be sent now."""
        return 0 if self.is_suspended else max(0, self.max_steps_in_flight - len(self.in_flight))

    @property
    def max_steps_in_flight(self) -> int:
        return self.pace.max_steps_in_flight

    @property
    def is_suspended(self) -> bool:
        """Between two epochs: nothing can be sent."""
        return self.suspended_ns is not None

    def num_pending(self, sequence: Sequence) -> int:
        """Tokens to plan until the sequence's next one, what stages lack of it included."""
        num_lacking = self.lacks.num_unscheduled(sequence.table) if self.lacks else 0
        return sequence.num_pending + num_lacking

    def pending_span(self, sequence: Sequence) -> tuple[int, int]:
        """(about where, how many) are the tokens of `num_pending`."""
        num_pending = self.num_pending(sequence)
        return max(0, len(sequence.tokens) - num_pending), num_pending

    def take_ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """(those that need one token, those that need more), whoever waited longest first."""
        # While stages lack something, what was planned of it may be released again by others.
        return self.turns.split(self.num_pending if self.lacks else None)

    def had_turn(self, sequence: Sequence) -> None:
        """Something of it was planned."""
        may_wait = sequence.num_pending > 0 or bool(self.lacks)
        self.turns.had_turn(sequence, may_wait=may_wait)

    def prefix_hits(self, sequence: Sequence) -> list[tuple[int, ...]]:
        """Blocks that hold a beginning of the sequence: one per cache group for each entry."""
        num_blocks = sequence.max_hit_tokens // self.facts.block_size_tokens
        if num_blocks == 0:
            return []
        hits = []
        chain = sequence.chain(self.facts)
        for index in range(num_blocks):
            digest = chain.extend(sequence.tokens, index + 1)[index]
            entry = [
                self.pool.lookup(BlockName(group, digest))
                for group in range(sequence.table.num_groups)
            ]
            found = tuple(block_id for block_id in entry if block_id is not None)
            if len(found) < len(entry):
                break
            hits.append(found)
        return hits

    def admit(self, sequence: Sequence, hits: list[tuple[int, ...]]) -> None:
        """The sequence runs here from now on, with what the prefix cache has of it."""
        for entry in hits:
            sequence.table.share(self.pool, entry)
        num_tokens = len(hits) * self.facts.block_size_tokens
        sequence.num_computed = sequence.num_scheduled = num_tokens
        sequence.num_named = len(hits)
        sequence.run_on(self)
        self.turns.begin(sequence)

    def grow(self, sequence: Sequence, num_entries: int) -> None:
        """Gives the sequence the blocks that it lacks up to so many."""
        num_before = sequence.table.num_entries
        sequence.table.grow(self.pool, num_entries)
        for index in range(num_before, num_entries):
            self.lacks.allocated(sequence.table.entry(index))

    def dismiss(self, sequence: Sequence) -> None:
        """The sequence ends or is preempted; its blocks are free for the next step at once.

        Rows in flight still write to them, but in the order of the plan: before any row that is
        planned from now on.
        """
        self.turns.end(sequence)
        block_ids = list(sequence.table.block_ids()) if self.lacks else []
        sequence.table.release(self.pool)
        for block_id in block_ids:
            if self.pool.num_owners(block_id) == 0 and self.lacks.drop(block_id):
                self.pool.forget(block_id)
        if sequence.is_known_to_stages:
            self.to_forget.append(sequence.sequence_run)

    def send(
        self,
        rows: tuple[Row, ...],
        sequences: tuple[Sequence, ...],
        rebuilds: Mapping[int, RebuildPart],
        now_ns: int,
    ) -> Step:
        """The next step, under way from now on; see StepInFlight."""
        self.lacks.commit()
        self.unscheduled.ended(now_ns)
        forget = tuple(self.to_forget)
        self.to_forget.clear()
        step = Step(self.pipeline_id, self.epoch, self.next_step, rows, forget, self._is_all(rows))
        self.in_flight.append(StepInFlight(step, sequences, rebuilds, now_ns))
        self.next_step += 1
        return step

    def _is_all(self, rows: tuple[Row, ...]) -> bool:
        """Whether these are all that can be done until their result is there."""
        is_rest = not self.in_flight and len(rows) == len(self.running)
        return is_rest and all(row.sample_positions for row in rows)

    def step_done(self, timings: tuple[HopTiming, ...], now_ns: int) -> None:
        """The oldest step in flight was answered: what it rebuilt is there."""
        done = self.in_flight.popleft()
        if not self.in_flight:
            self.unscheduled.began(now_ns)
        self.num_steps_done += 1
        for part in done.rebuilds.values():
            self.lacks.rebuilt(part)
            self.num_tokens_rebuilt += part.end - part.start
        if not done.rebuilds:  # a step through a part of the stages tells nothing of whole ones
            num_tokens, num_positions = done.num_tokens_and_positions()
            self.step_cost.step_done(num_tokens, done.sent_ns, now_ns)
            self.pace.step_done(num_tokens, num_positions, timings, now_ns - done.sent_ns)
            self.pace.tune(len(self.running), self.turns.num_tokens)
        if timings:
            self.recent_timings.append(timings)

    def has_new_block(self, sequence: Sequence) -> bool:
        """Whether one more block is full and computed, and not known to the prefix index."""
        return sequence.num_computed >= (sequence.num_named + 1) * self.facts.block_size_tokens

    def name_computed_blocks(self, sequence: Sequence) -> None:
        """Full blocks whose KV was acknowledged may be given to others from now on."""
        num_full = sequence.num_computed // self.facts.block_size_tokens
        hashes = sequence.chain(self.facts).extend(sequence.tokens, num_full)
        for index in range(sequence.num_named, num_full):
            for group, block_ids in enumerate(sequence.table.groups):
                self.pool.register(BlockName(group, hashes[index]), block_ids[index])
        sequence.num_named = num_full

    def forget_content(self, block_ids: Iterable[int]) -> None:
        """Takes blocks out of the prefix index; whoever owns them keeps them."""
        for block_id in block_ids:
            self.pool.forget(block_id)

    def suspend(self, now_ns: int) -> None:
        """The epoch ended: acknowledged KV stays, steps in flight are undone, none is planned.

        What they were to forget is said again, since nobody knows which stages heard it.
        """
        self.suspended_ns = now_ns if self.suspended_ns is None else self.suspended_ns
        self.unscheduled.ended(now_ns)
        self.to_forget[:0] = [run for each in self.in_flight for run in each.step.forget]
        self.in_flight.clear()
        self.lacks.undo()
        for sequence in self.running.values():
            sequence.rewind()
        self.turns.all_wait()

    def resume(
        self,
        facts: PipelineFacts,
        lost_stages: Collection[int],
        preempt: Callable[[Sequence], None],
        now_ns: int,
    ) -> None:
        """A new epoch begins. Sequences whose blocks have no room any more are preempted."""
        assert facts.epoch > self.epoch, f"epoch {facts.epoch} does not follow {self.epoch}"
        assert self.suspended_ns is not None
        self.mend_time.mended(now_ns - self.suspended_ns)
        for sequence in list(self.running.values()):
            is_outside = max(sequence.table.block_ids(), default=0) >= facts.num_blocks
            if is_outside or sequence.num_tokens >= facts.capacity_tokens:
                preempt(sequence)
        self.pool.resize(facts.num_blocks)
        self.facts = facts
        self.capacity_tokens = facts.capacity_tokens
        for sequence in self.running.values():
            sequence.run_on(self)
        self.epoch = facts.epoch
        self.lacks.resize_logs(self._num_log_blocks(), self.pool.blocks_in_use())
        self.next_step = 0
        self.suspended_ns = None
        self.unscheduled.began(now_ns)
        self.num_tokens_rebuilt = 0
        if lost_stages:
            self._lose(lost_stages)

    def _lose(self, stages: Collection[int]) -> None:
        self.pool.forget_cached()
        needed: dict[int, int] = {}
        size = self.facts.block_size_tokens
        for sequence in self.running.values():
            for index in range(self.facts.num_blocks_for(sequence.num_computed)):
                num_slots = min(size, sequence.num_computed - index * size)
                needed.update(dict.fromkeys(sequence.table.entry(index), num_slots))
        for stage in stages:
            self.lacks.lose(stage, needed)

    def _num_log_blocks(self) -> tuple[int, ...]:
        return self.facts.num_log_blocks or (0,) * self.facts.num_stages

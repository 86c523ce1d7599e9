"""A stage worker without numbers: executes plans on KV pages by block id, and enforces the rule.

It believes nothing that a plan did not tell it: pages start with rubbish, tables and sampling
parameters must come again in every epoch. Whether positions are missing is not checked: whoever
reads a page that holds something else computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from simulation.pretend_model import (
    adapter_number,
    attend,
    embed,
    key_value,
    prompt_logprob,
    rope_length,
    sample,
)
from simulation.stage_memory import MemoryPart, StageMemory, Value

from stagemesh.plan import (
    NOT_FINITE,
    Epoch,
    Row,
    RowResult,
    SampledToken,
    SequenceState,
    Step,
)

# The hidden states of the rows that a stage receives, in the step's order.
Payload = list[list[Value]]


class BrokenPlan(AssertionError):
    """A plan that a worker must not accept."""


@dataclass(slots=True)
class _Held:
    """What a stage holds of a sequence beside its pages."""

    run: int
    epoch: Epoch
    state: SequenceState
    tokens: list[int]
    table: list[int] = field(default_factory=list)


class FakeStage:
    """`poison`: position by seed, where the numbers of the sequence with that seed break."""

    def __init__(self, memory: StageMemory, dynamic_rope: int, poison: Mapping[int, int]) -> None:
        self.memory = memory
        self.part = MemoryPart.whole(memory)
        self.num_tokens_executed = 0
        self._dynamic_rope = dynamic_rope
        self._poison = poison
        self._held: dict[int, _Held] = {}
        self._epoch: Epoch | None = None
        self._stage = self._num_stages = 0
        self._next_step = 0

    @property
    def num_held(self) -> int:
        return len(self._held)

    def join(
        self, epoch: Epoch, part: MemoryPart, *, stage: int, num_stages: int, keep_kv: bool
    ) -> None:
        if part.num_blocks > self.memory.num_blocks:
            raise BrokenPlan(f"{part.num_blocks} blocks where {self.memory.num_blocks} fit")
        self.part = part
        if not keep_kv:
            part.spoil()
            self._held.clear()
        self._epoch, self._next_step = epoch, 0
        self._stage, self._num_stages = stage, num_stages

    def execute(self, step: Step, payload: Payload) -> tuple[Payload, tuple[RowResult, ...]]:
        """Hidden states in; hidden states or, on the last stage, results out."""
        if step.epoch != self._epoch:
            raise BrokenPlan(f"a step of epoch {step.epoch} in epoch {self._epoch}")
        if step.step != self._next_step:
            raise BrokenPlan(f"step {step.step} where {self._next_step} follows")
        self._next_step += 1
        for gone in step.forget:
            if gone.sequence_id in self._held and self._held[gone.sequence_id].run == gone.run:
                del self._held[gone.sequence_id]
        if len({row.sequence_id for row in step.rows}) < len(step.rows):
            raise BrokenPlan("a sequence has two rows in a step")
        helds = [self._note(row) for row in step.rows]
        inputs = self._inputs(step, payload)
        # The last row first: no row of a step may count on what another one does in it.
        outs = [
            self._take_row(row, held, states)
            for row, held, states in zip(step.rows[::-1], helds[::-1], inputs[::-1], strict=True)
        ][::-1]
        sent = [out for row, out in zip(step.rows, outs, strict=True) if self._is_sent(row)]
        if self._stage + 1 < self._num_stages:
            return sent, ()
        return [], tuple(map(self._result, step.rows, outs))

    def settle(self, step: Step) -> None:
        """The step was acknowledged: what it wrote here counts."""
        for row in step.rows:
            held = self._held.get(row.sequence_id)
            if held is None or held.run != row.run or not self._writes(row):
                continue
            size = self.memory.block_size
            for position in range(row.start, row.start + row.num_tokens):
                slot = self.part.slot(held.table[position // size], position % size)
                self.part.settled[slot] = (row.sequence_id, row.run, position)

    # ---- rows ----------------------------------------------------------------------------------

    def _executes(self, row: Row) -> bool:
        return row.first_stage <= self._stage < row.end_stage

    def _writes(self, row: Row) -> bool:
        return self._executes(row) and self._stage >= row.first_writing_stage

    def _is_sent(self, row: Row) -> bool:
        return row.first_stage <= self._stage + 1 < row.end_stage

    def _inputs(self, step: Step, payload: Payload) -> Payload:
        """One for each row: hidden states that came for it, or nothing."""
        incoming = iter(payload)
        needs = [self._stage > 0 and self._executes(row) for row in step.rows]
        inputs = [list(next(incoming, [])) if need else [] for need in needs]
        if next(incoming, None) is not None:
            raise BrokenPlan("hidden states of more rows than the plan says")
        return inputs

    def _take_row(self, row: Row, held: _Held, states: list[Value]) -> list[Value]:
        """What becomes of a row here: hidden states for the next stage, or nothing."""
        if self._executes(row):
            return self._execute_row(row, held, self._embedded(row, held, states))
        if self._is_sent(row):
            return self._logged(row, held)
        return []

    def _embedded(self, row: Row, held: _Held, states: list[Value]) -> list[Value]:
        if self._stage > 0:
            if len(states) != row.num_tokens:
                raise BrokenPlan(f"{_name(row)}: {len(states)} states for {row.num_tokens} tokens")
            return states
        rope = rope_length(held.state.total_length, self._dynamic_rope)
        adapter = adapter_number(held.state.adapter)
        return [embed(t, p, rope, adapter) for p, t in enumerate(row.token_ids, row.start)]

    def _execute_row(self, row: Row, held: _Held, states: list[Value]) -> list[Value]:
        self.num_tokens_executed += row.num_tokens
        poison = self._poison.get(held.state.sampling.seed)
        if poison is not None and row.start <= poison < row.start + row.num_tokens:
            states[poison - row.start] = None
        if self._writes(row):
            self._check_unsettled(row, held)
        for layer in self.memory.layers:
            states = self._layer(layer, held, row, states)
        self._write_log(row, held, states)
        return states

    def _layer(self, layer: int, held: _Held, row: Row, states: list[Value]) -> list[Value]:
        part, size, end = self.part, self.memory.block_size, row.start + row.num_tokens
        if self._writes(row):
            for position, hidden in enumerate(states, row.start):
                value = key_value(layer, hidden, position)
                part.write(layer, held.table[position // size], position % size, value)
        cache = part.read(layer, held.table, 0, end)
        return [attend(layer, h, cache[: p + 1]) for p, h in enumerate(states, row.start)]

    def _check_unsettled(self, row: Row, held: _Held) -> None:
        part, size = self.part, self.memory.block_size
        for position in range(row.start, row.start + row.num_tokens):
            slot = part.slot(held.table[position // size], position % size)
            if part.settled.pop(slot, None) == (row.sequence_id, row.run, position):
                raise BrokenPlan(f"{_name(row)}: KV of {position} is written again, it was valid")

    # ---- the log -------------------------------------------------------------------------------

    def _write_log(self, row: Row, held: _Held, states: list[Value]) -> None:
        if self._stage + 1 == self._num_stages:
            return
        size = self.memory.block_size
        for position, hidden in enumerate(states, row.start):
            self.part.write_log(held.table[position // size], position % size, hidden)

    def _logged(self, row: Row, held: _Held) -> list[Value]:
        end, size = row.start + row.num_tokens, self.memory.block_size
        touched = held.table[row.start // size : -(-end // size)]
        beyond = [block_id for block_id in touched if block_id >= self.part.num_log_blocks]
        if beyond:
            raise BrokenPlan(f"{_name(row)}: blocks {beyond} are not in the log")
        return self.part.read_log(held.table, row.start, end)

    # ---- what is held of sequences -------------------------------------------------------------

    def _note(self, row: Row) -> _Held:
        """Takes over what the row says of its sequence, whether the row concerns the stage or not.

        Raises BrokenPlan.
        """
        assert self._epoch is not None
        _check_row(row, self._num_stages)
        if row.state is not None:
            tokens = [*row.state.prompt_token_ids, *row.state.output_token_ids]
            self._held[row.sequence_id] = _Held(row.run, self._epoch, row.state, tokens)
        held = self._held.get(row.sequence_id)
        if held is None:
            raise BrokenPlan(f"{_name(row)} is unknown")
        if held.run != row.run or held.epoch != self._epoch:
            raise BrokenPlan(f"{_name(row)}: its state did not come with the first row")
        self._update_table(held, row)
        end = row.start + row.num_tokens
        if end > len(held.table) * self.memory.block_size:
            raise BrokenPlan(f"{_name(row)}: {end} positions in {len(held.table)} blocks")
        if row.start > len(held.tokens):
            raise BrokenPlan(f"{_name(row)}: tokens before {row.start} are not known")
        held.tokens[row.start : row.start + len(row.token_ids)] = row.token_ids
        return held

    def _update_table(self, held: _Held, row: Row) -> None:
        for update in row.block_updates:
            if update.first_index > len(held.table):
                raise BrokenPlan(f"{_name(row)}: a gap in the block table")
            if not all(0 <= block_id < self.part.num_blocks for block_id in update.block_ids):
                raise BrokenPlan(f"{_name(row)}: blocks that are not the pipeline's")
            held.table[update.first_index :] = update.block_ids

    # ---- results -------------------------------------------------------------------------------

    def _result(self, row: Row, outs: list[Value]) -> RowResult:
        if not self._executes(row):
            return RowResult(row.sequence_id, row.run)
        if None in outs:
            return RowResult(row.sequence_id, row.run, error=NOT_FINITE)
        held = self._held[row.sequence_id]
        finite = {p: out for p, out in enumerate(outs, row.start) if out is not None}
        num_prompt = len(held.state.prompt_token_ids)
        spec, tokens = held.state.sampling, held.tokens
        sampled = tuple(
            SampledToken(p + 1, sample(finite[p], p, tokens[num_prompt : p + 1], num_prompt, spec))
            for p in row.sample_positions
        )
        logprobs = tuple(prompt_logprob(finite[p], p, tokens[p + 1]) for p in row.logprob_positions)
        return RowResult(row.sequence_id, row.run, sampled, logprobs)


def _name(row: Row) -> str:
    return f"sequence {row.sequence_id} run {row.run}"


def _check_row(row: Row, num_stages: int) -> None:
    """Raises BrokenPlan for a row that contradicts itself."""
    if row.num_tokens < 1 or not 0 <= row.first_stage < row.end_stage <= num_stages:
        raise BrokenPlan(f"{_name(row)}: nothing to do for stages of {num_stages}: {row}")
    if not row.first_writing_stage < row.end_stage:
        raise BrokenPlan(f"{_name(row)}: nobody writes: {row}")
    log = row.input_from_log_of_stage
    if log is None:
        if row.first_stage > 0 or len(row.token_ids) != row.num_tokens:
            raise BrokenPlan(f"{_name(row)}: {len(row.token_ids)} ids for {row.num_tokens} tokens")
    elif row.token_ids or log != row.first_stage - 1:
        raise BrokenPlan(f"{_name(row)}: input from the log of stage {log}: {row}")
    has_outcome = bool(row.sample_positions or row.logprob_positions)
    if has_outcome and row.end_stage < num_stages:
        raise BrokenPlan(f"{_name(row)}: samples without the last stage")

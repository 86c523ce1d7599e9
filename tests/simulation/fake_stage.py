"""A stage worker without numbers: KV pages by block id, and the worker's rule, enforced.

It believes nothing that a plan did not tell it: pages start with rubbish, tables and sampling
parameters must come again in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from simulation.pretend_model import (
    attend,
    embed,
    key_value,
    mix,
    prompt_logprob,
    rope_length,
    sample,
)

from stagemesh.plan import (
    NOT_FINITE,
    Epoch,
    Row,
    RowResult,
    SampledToken,
    SequenceState,
    Step,
)


class BrokenPlan(AssertionError):
    """A plan that a worker must not accept."""


@dataclass(slots=True)
class _Held:
    """What a stage holds of a sequence beside its pages."""

    run: int
    epoch: Epoch
    state: SequenceState
    table: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: int | None = None


class FakeStage:
    def __init__(
        self,
        stage: int,
        layers: range,
        *,
        is_last: bool,
        num_blocks: int,
        block_size: int,
        dynamic_rope: int,
        poison: Mapping[int, int],
        salt: int,
    ) -> None:
        """`poison`: position by seed, where the numbers of the sequence with that seed break."""
        self._stage = stage
        self._layers = layers
        self._is_last = is_last
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._dynamic_rope = dynamic_rope
        self._poison = poison
        self._salt = salt
        self._held: dict[int, _Held] = {}
        self._epoch: Epoch | None = None
        self._next_step = 0
        self.forget_pages()

    @property
    def num_held(self) -> int:
        return len(self._held)

    def forget_pages(self) -> None:
        num_slots = self._num_blocks * self._block_size
        self._pages: dict[int, list[int | None]] = {
            layer: [mix(16, self._salt, self._stage, layer, slot) for slot in range(num_slots)]
            for layer in self._layers
        }
        self._held.clear()

    def join(self, epoch: Epoch, *, keep_kv: bool) -> None:
        if not keep_kv:
            self.forget_pages()
        self._epoch = epoch
        self._next_step = 0

    def execute(
        self, step: Step, hidden: list[list[int | None]]
    ) -> tuple[list[list[int | None]], tuple[RowResult, ...]]:
        """Hidden states in, per row; hidden states and, on the last stage, results out."""
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
        outs = [
            self._execute_row(row, states) for row, states in zip(step.rows, hidden, strict=True)
        ]
        results = tuple(
            self._result(row, out)
            for row, out in zip(step.rows, outs, strict=True)
            if self._is_last
        )
        return outs, results

    def _execute_row(self, row: Row, states: list[int | None]) -> list[int | None]:
        held = self._note(row)
        if self._layers.start == 0:
            rope = rope_length(held.state.total_length, self._dynamic_rope)
            positions = range(row.start, row.start + row.num_tokens)
            states = [embed(t, p, rope) for t, p in zip(row.token_ids, positions, strict=True)]
        states = list(states)
        poison = self._poison.get(held.state.sampling.seed)
        if poison is not None and row.start <= poison < row.start + row.num_tokens:
            states[poison - row.start] = None
        for layer in self._layers:
            states = self._layer(layer, held, row.start, states)
        return states

    def _layer(
        self, layer: int, held: _Held, start: int, states: Iterable[int | None]
    ) -> list[int | None]:
        size, pages, table = self._block_size, self._pages[layer], held.table
        cache = [pages[table[p // size] * size + p % size] for p in range(start)]
        outs = []
        for position, hidden in enumerate(states, start):
            value = key_value(layer, hidden, position)
            pages[table[position // size] * size + position % size] = value
            cache.append(value)
            outs.append(attend(layer, hidden, cache))
        return outs

    def _note(self, row: Row) -> _Held:
        """Takes over what the row says of its sequence."""
        assert self._epoch is not None
        name = f"sequence {row.sequence_id} run {row.run}"
        if row.state is not None:
            tokens = [*row.state.prompt_token_ids, *row.state.output_token_ids]
            held = _Held(row.run, self._epoch, row.state, tokens=tokens)
            self._held[row.sequence_id] = held
        elif row.sequence_id not in self._held:
            raise BrokenPlan(f"{name} is unknown")
        held = self._held[row.sequence_id]
        if held.run != row.run or held.epoch != self._epoch:
            raise BrokenPlan(f"{name}: its state did not come with the first row")
        end = row.start + row.num_tokens
        if row.num_tokens < 1 or len(row.token_ids) != row.num_tokens:
            raise BrokenPlan(f"{name}: {len(row.token_ids)} ids for {row.num_tokens} tokens")
        if held.end is not None and row.start > held.end:
            raise BrokenPlan(f"{name}: positions [{held.end}, {row.start}) are missing")
        self._update_table(name, held, row)
        if end > len(held.table) * self._block_size:
            raise BrokenPlan(f"{name}: {end} positions in {len(held.table)} blocks")
        held.tokens[row.start : end] = row.token_ids
        held.end = end
        return held

    def _update_table(self, name: str, held: _Held, row: Row) -> None:
        for update in row.block_updates:
            if update.first_index > len(held.table):
                raise BrokenPlan(f"{name}: a gap in the block table")
            if not all(0 <= block_id < self._num_blocks for block_id in update.block_ids):
                raise BrokenPlan(f"{name}: blocks that are not the pipeline's")
            last = update.first_index + len(update.block_ids)
            held.table[update.first_index : last] = update.block_ids

    def _result(self, row: Row, outs: list[int | None]) -> RowResult:
        held = self._held[row.sequence_id]
        if None in outs:
            return RowResult(row.sequence_id, row.run, error=NOT_FINITE)
        finite = [out for out in outs if out is not None]
        num_prompt = len(held.state.prompt_token_ids)
        sampled = tuple(
            SampledToken(
                position + 1,
                sample(
                    finite[position - row.start],
                    position,
                    held.tokens[num_prompt : position + 1],
                    num_prompt,
                    held.state.sampling,
                ),
            )
            for position in row.sample_positions
        )
        logprobs = tuple(
            prompt_logprob(finite[position - row.start], position, held.tokens[position + 1])
            for position in row.logprob_positions
        )
        return RowResult(row.sequence_id, row.run, sampled, logprobs)

"""What a stage keeps of each sequence beside its KV, and how rows of a plan change it.

Everything here can be recreated by a plan: a sequence's first row in a run and epoch brings it.
Rows that contradict it are a ProtocolError: plans are made by the scheduler alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage_worker.block_ranges import BlockRange
from stagemesh.errors import ProtocolError
from stagemesh.plan import Row, SequenceRun, SequenceState


@dataclass(slots=True)
class Sequence:
    """`blocks` are the worker's own, to which the pipeline's were mapped when a row named them.
    `slots` [len(blocks) * block size] are the slots of its positions, in order.

    What its pages hold is the plan's business: a stage is rebuilt in whatever order it says.
    `outputs` are the output tokens as far as they are known on this stage; what is valid of them
    depends on the row (see `history`).
    """

    run: int
    state: SequenceState
    outputs: list[int]
    frequencies: tuple[Tensor, ...]
    blocks: list[int] = field(default_factory=list)
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    _array: tuple[list[int], NDArray[np.int32]] | None = None

    def block_array(self) -> NDArray[np.int32]:
        """`blocks`, made once for each change of them."""
        if self._array is None or self._array[0] is not self.blocks:
            self._array = self.blocks, np.array(self.blocks, dtype=np.int32)
        return self._array[1]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.state.prompt_token_ids)

    def slots_of(self, row: Row) -> Tensor:
        """[num_tokens]: those of the row's own positions."""
        return self.slots[row.start : row.start + row.num_tokens]

    def learn(self, row: Row) -> None:
        """Takes over output tokens from a row's input: those after an epoch began, or drafts."""
        for position, token in enumerate(row.token_ids, row.start):
            index = position - self.num_prompt_tokens
            if 0 <= index < len(self.outputs):
                self.outputs[index] = token
            elif index == len(self.outputs):
                self.outputs.append(token)

    def history(self, position: int) -> list[int]:
        """Output tokens at positions up to and including `position`."""
        count = max(0, position + 1 - self.num_prompt_tokens)
        if count > len(self.outputs):
            raise ProtocolError(f"output tokens up to position {position} are not known here")
        return self.outputs[:count]

    def append(self, position: int, token: int) -> None:
        """Token sampled for `position`; whatever was held from there on is replaced."""
        if position == self.num_prompt_tokens + len(self.outputs):
            self.outputs.append(token)
        else:
            self.outputs = [*self.history(position - 1), token]

    def token_at(self, position: int) -> int:
        """The known token at `position`."""
        if position < self.num_prompt_tokens:
            return self.state.prompt_token_ids[position]
        return self.history(position)[-1]


class SequenceTable:
    """The sequences of one pipeline, whose blocks are `blocks` of this worker's."""

    def __init__(
        self, blocks: BlockRange, block_size_tokens: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size_tokens = block_size_tokens
        self._range = blocks
        self._vocab_size = vocab_size
        self._offsets = torch.arange(block_size_tokens, device=device)
        self._held: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._held)

    def resize(self, blocks: BlockRange) -> None:
        """The pipeline has more blocks or fewer, from the same end. The table of a sequence ends
        before the first one that is gone: such a block may be another pipeline's."""
        self._range = blocks
        for sequence in self._held.values():
            inside = itertools.takewhile(lambda b: blocks.start <= b < blocks.end, sequence.blocks)
            sequence.blocks = list(inside)
            sequence.slots = sequence.slots[: len(sequence.blocks) * self.block_size_tokens]

    def forget(self, gone: SequenceRun) -> None:
        """Forgets a sequence unless a later run of it is held; an unknown one is no error."""
        held = self._held.get(gone.sequence_id)
        if held is not None and held.run <= gone.run:
            del self._held[gone.sequence_id]

    def update(self, row: Row, frequencies: tuple[Tensor, ...] | None) -> Sequence:
        """The sequence as it stands for this row, which may concern this stage or pass it by.

        `frequencies` are its rotary ones where the row brings state. Raises ProtocolError.
        """
        sequence = self._sequence(row, frequencies)
        self._update_blocks(sequence, row)
        if row.num_tokens < 1 or row.start < 0:
            raise _refused(row, f"has {row.num_tokens} tokens from {row.start} on")
        end = row.start + row.num_tokens
        if end > len(sequence.slots):
            raise _refused(row, f"ends at {end}, its blocks hold {len(sequence.slots)} tokens")
        if not all(row.start <= p < end for p in row.sample_positions + row.logprob_positions):
            raise _refused(row, f"samples outside of its positions [{row.start}, {end})")
        self._check_tokens(row, row.token_ids)
        sequence.learn(row)
        return sequence

    def _sequence(self, row: Row, frequencies: tuple[Tensor, ...] | None) -> Sequence:
        held = self._held.get(row.sequence_id)
        if held is not None and row.run < held.run:
            raise _refused(row, f"is older than run {held.run}, which is held")
        if row.state is None or frequencies is None:
            if held is None or row.run != held.run:
                raise _refused(row, "is not known here and brings no state")
            return held
        self._check_tokens(row, row.state.prompt_token_ids + row.state.output_token_ids)
        fresh = Sequence(row.run, row.state, list(row.state.output_token_ids), frequencies)
        if held is not None and held.run == row.run:  # the same run in a new epoch keeps its blocks
            fresh.blocks, fresh.slots = held.blocks, held.slots
        self._held[row.sequence_id] = fresh
        return fresh

    def _update_blocks(self, sequence: Sequence, row: Row) -> None:
        num_blocks = self._range.num_blocks
        if len(row.block_updates) > 1:
            raise _refused(row, "has more than the one cache group that there is")
        for update in row.block_updates:
            if update.first_index > len(sequence.blocks):
                raise _refused(row, f"leaves blocks before index {update.first_index} out")
            if not all(0 <= block < num_blocks for block in update.block_ids):
                raise _refused(row, f"has a block outside of the pipeline's {num_blocks}")
            places = self._range.places(update.block_ids)
            sequence.blocks = sequence.blocks[: update.first_index] + places
            blocks = torch.tensor(sequence.blocks, dtype=torch.int64, device=self._offsets.device)
            sequence.slots = (blocks[:, None] * self.block_size_tokens + self._offsets).flatten()

    def _check_tokens(self, row: Row, token_ids: tuple[int, ...]) -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._vocab_size):
            raise _refused(row, f"has a token id outside of the vocabulary of {self._vocab_size}")


def _refused(row: Row, reason: str) -> ProtocolError:
    return ProtocolError(f"sequence {row.sequence_id} run {row.run} {reason}")

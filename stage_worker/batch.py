"""Turns the rows of a step into the metadata of one forward pass.

T tokens of all rows, one after another; W those of them whose KV is written; P dimensions of a head
    that are rotated
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_worker.attention import Attention, Query
from stage_worker.decoder import Batch, Turn
from stage_worker.kv_cache import KvCache
from stage_worker.lora import StageAdapters
from stage_worker.rope import angles, both_halves
from stage_worker.sequences import Sequence
from stagemesh.plan import Row
from stagemesh.rope_spec import RopeSpec


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row, its sequence, and which tokens of the pass are its: from `first` on."""

    row: Row
    sequence: Sequence
    first: int

    @property
    def slots(self) -> Tensor:
        """[num_tokens]: those of the row's own positions."""
        return self.sequence.slots_of(self.row)


class BatchBuilder:
    """`windows` are those of the stage's layers, `used` says which of the model's `ropes` they
    have; `dtype` is what it computes in. Rows choose from `adapters`."""

    def __init__(
        self,
        windows: Rows[int | None],
        ropes: Rows[RopeSpec],
        used: Rows[int | None],
        attention: Attention[Any],
        cache: KvCache,
        dtype: torch.dtype,
        adapters: StageAdapters,
    ) -> None:
        self._windows = list(dict.fromkeys(windows))
        self._ropes = {i: ropes[i] for i in dict.fromkeys(used) if i is not None}
        self._attention = attention
        self._cache = cache
        self._dtype = dtype
        self._adapters = adapters

    def build(self, placed: Rows[PlacedRow], stage: int) -> Batch:
        """The pass of `placed`, at least one row, on the stage of this number."""
        slots = torch.cat([entry.slots for entry in placed])
        rows = [_query(entry) for entry in placed]
        reading = {w: self._attention.plan(rows, w, self._cache) for w in self._windows}
        written = _written(placed, stage, slots.device)
        written_slots = slots if written is None else slots[written]
        token_ids = None
        if stage == 0:
            token_ids = torch.tensor([token for entry in placed for token in entry.row.token_ids])
        turns = self._turns(placed, slots.device)
        chosen = [(entry.sequence.state.adapter, entry.row.num_tokens) for entry in placed]
        adapters = self._adapters.for_step(chosen)
        return Batch(slots, written_slots, written, turns, reading, token_ids, adapters)

    def _turns(self, placed: Rows[PlacedRow], device: torch.device) -> dict[int, Turn]:
        positions = torch.cat([_positions(entry, device) for entry in placed])
        turns = {}
        for i, rope in self._ropes.items():
            cos, sin = angles(positions, self._frequencies(placed, i), rope.attention_factor)
            turns[i] = both_halves(cos.to(self._dtype), sin.to(self._dtype))
        return turns

    def _frequencies(self, placed: Rows[PlacedRow], i: int) -> Tensor:
        """Of rope i: [P / 2] where all sequences share them, else [T, P / 2]."""
        if not self._ropes[i].depends_on_length:
            return placed[0].sequence.frequencies[i]
        return torch.cat(
            [entry.sequence.frequencies[i].expand(entry.row.num_tokens, -1) for entry in placed]
        )


def _written(placed: Rows[PlacedRow], stage: int, device: torch.device) -> Tensor | None:
    """[W] index into the tokens; None where all are written."""
    writing = [entry.row.first_writing_stage <= stage for entry in placed]
    if all(writing):
        return None
    counts = torch.tensor([entry.row.num_tokens for entry in placed])
    return torch.tensor(writing).repeat_interleave(counts).nonzero().flatten().to(device)


def _query(entry: PlacedRow) -> Query:
    row, sequence = entry.row, entry.sequence
    slots = sequence.slots[: row.start + row.num_tokens]
    return Query(entry.first, row.num_tokens, row.start, slots, sequence.blocks)


def _positions(entry: PlacedRow, device: torch.device) -> Tensor:
    start = entry.row.start
    return torch.arange(start, start + entry.row.num_tokens, device=device)

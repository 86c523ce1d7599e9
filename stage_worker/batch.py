"""Turns the rows of a step into the metadata of one forward pass.

T tokens of all rows, one after another; W those of them whose KV is written; D head dim
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_worker.attention import Attention, Query
from stage_worker.decoder import Batch
from stage_worker.kv_cache import KvCache
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
    """`windows` are those of the stage's layers; `dtype` is what it computes in."""

    def __init__(
        self,
        windows: Rows[int | None],
        rope: RopeSpec,
        attention: Attention[Any],
        cache: KvCache,
        dtype: torch.dtype,
    ) -> None:
        self._windows = list(dict.fromkeys(windows))
        self._rope = rope
        self._attention = attention
        self._cache = cache
        self._dtype = dtype

    def build(self, placed: Rows[PlacedRow], stage: int) -> Batch:
        """The pass of `placed`, at least one row, on the stage of this number."""
        slots = torch.cat([entry.slots for entry in placed])
        cos, sin = angles(
            torch.cat([_positions(entry, slots.device) for entry in placed]),
            self._frequencies(placed),
            self._rope.attention_factor,
        )
        rows = [_query(entry) for entry in placed]
        reading = {w: self._attention.plan(rows, w, self._cache) for w in self._windows}
        written = _written(placed, stage, slots.device)
        written_slots = slots if written is None else slots[written]
        cos, sin = both_halves(cos.to(self._dtype), sin.to(self._dtype))
        token_ids = None
        if stage == 0:
            token_ids = torch.tensor([token for entry in placed for token in entry.row.token_ids])
        return Batch(slots, written_slots, written, cos, sin, reading, token_ids)

    def _frequencies(self, placed: Rows[PlacedRow]) -> Tensor:
        """[D / 2] where all sequences share them, else [T, D / 2]."""
        if self._rope.kind != "dynamic":
            return placed[0].sequence.frequencies
        return torch.cat(
            [entry.sequence.frequencies.expand(entry.row.num_tokens, -1) for entry in placed]
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

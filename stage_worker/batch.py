"""Turns the rows of a step into the metadata of one forward pass.

T tokens of all rows, one after another; D head dim
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_worker.attention import Query, plan_groups
from stage_worker.decoder import Batch
from stage_worker.rope import angles
from stage_worker.sequences import Sequence
from stagemesh.plan import Row
from stagemesh.rope_spec import RopeSpec


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row, its sequence, and which tokens of the step are its: from `first` on."""

    row: Row
    sequence: Sequence
    first: int


class BatchBuilder:
    """`windows` are those of the stage's layers; contexts are read in multiples of `tile`."""

    def __init__(
        self, windows: Rows[int | None], rope: RopeSpec, tile: int, dtype: torch.dtype
    ) -> None:
        self._windows = list(dict.fromkeys(windows))
        self._rope = rope
        self._tile = tile
        self._dtype = dtype

    def build(self, placed: Rows[PlacedRow]) -> Batch:
        slots = torch.cat([_slots(entry)[entry.row.start :] for entry in placed])
        cos, sin = angles(
            torch.cat([_positions(entry, slots.device) for entry in placed]),
            self._frequencies(placed),
            self._rope.attention_factor,
        )
        rows = [
            Query(entry.first, entry.row.num_tokens, entry.row.start, _slots(entry))
            for entry in placed
        ]
        groups = {window: plan_groups(rows, window, self._tile) for window in self._windows}
        return Batch(slots, cos.to(self._dtype), sin.to(self._dtype), groups)

    def _frequencies(self, placed: Rows[PlacedRow]) -> Tensor:
        """[D / 2] where all sequences share them, else [T, D / 2]."""
        if self._rope.kind != "dynamic":
            return placed[0].sequence.frequencies
        return torch.cat(
            [entry.sequence.frequencies.expand(entry.row.num_tokens, -1) for entry in placed]
        )


def _slots(entry: PlacedRow) -> Tensor:
    return entry.sequence.slots[: entry.row.start + entry.row.num_tokens]


def _positions(entry: PlacedRow, device: torch.device) -> Tensor:
    start = entry.row.start
    return torch.arange(start, start + entry.row.num_tokens, device=device)

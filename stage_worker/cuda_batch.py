"""Turns the rows of a step into the metadata of one forward pass on a CUDA device.

    T tokens of all rows, one after another; R rows; D head dim

All of it is planned on the host, in one array that takes one upload. Steps of lone tokens are
padded to the next size that there is a graph for; a padded token reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage_worker.batch import PlacedRow
from stage_worker.cuda_attention import CudaAttention, Ints, Span
from stage_worker.cuda_layout import Layout
from stage_worker.staging import host_tensor

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CudaBatch:
    """`slots` [T] are on the host, int64; `metadata` is on the host as `layout` says, for the
    graph of that size where there is one. `frequencies` [D / 2], or [T, D / 2] where sequences
    differ, are on the host as well.
    """

    slots: Tensor
    metadata: Tensor
    layout: Layout
    graph_size: int | None
    frequencies: Tensor


class CudaBatchBuilder:
    """`windows` are those of the stage's layers; `graph_sizes` rise, and are padded to."""

    def __init__(
        self,
        windows: Rows[int | None],
        attention: CudaAttention,
        block_size_tokens: int,
        graph_sizes: Rows[int],
        max_table_entries: int,
        *,
        shared_frequencies: bool,
        device: torch.device,
    ) -> None:
        self._windows = tuple(dict.fromkeys(windows))
        self._attention = attention
        self._block_size = block_size_tokens
        self._graph_sizes = graph_sizes
        self._max_table_entries = max_table_entries
        self._shared_frequencies = shared_frequencies
        self._device = device

    def build(self, placed: Rows[PlacedRow], stage: int) -> CudaBatch:
        """The pass of `placed`, at least one row, on the stage of this number."""
        rows = [Span(entry.first, entry.row.num_tokens, entry.row.start) for entry in placed]
        counts = np.array([row.num_tokens for row in rows])
        tables, offsets = self._tables(placed, rows)
        positions = _positions(rows, counts)
        slots = self._slots(tables, np.repeat(offsets, counts), positions)
        graph_size = self._graph_size(rows, len(tables))
        layout, metadata = self._plan(rows, graph_size or len(positions), len(tables), graph_size)
        views = layout.views(metadata)
        num_tokens = len(positions)
        views.tables.numpy()[: len(tables)] = tables
        views.offsets.numpy()[:num_tokens] = np.repeat(offsets, counts)
        views.positions.numpy()[:num_tokens] = positions
        written = np.repeat([entry.row.first_writing_stage <= stage for entry in placed], counts)
        views.slots.numpy()[:num_tokens] = np.where(written, slots, -1)
        if num_tokens < layout.num_tokens:
            views.slots.numpy()[num_tokens:] = -1
            views.positions.numpy()[num_tokens:] = 0
        frequencies = self._frequencies(placed)
        return CudaBatch(torch.from_numpy(slots), metadata, layout, graph_size, frequencies)

    def _plan(
        self, rows: Rows[Span], num_tokens: int, num_entries: int, graph_size: int | None
    ) -> tuple[Layout, Tensor]:
        """An array with items and tiles filled in."""
        lone = [row for row in rows if row.num_tokens == 1]
        tiles = self._attention.plan_tiles([row for row in rows if row.num_tokens > 1])
        planned = {w: self._attention.plan_items(lone, w) for w in self._windows} if lone else {}
        num_items = max((len(items) for items, _ in planned.values()), default=0)
        if graph_size is not None:
            num_items = self._attention.max_items(graph_size)
        layout = Layout(num_tokens, num_items, len(tiles), self._windows)
        size = layout.tables_at + num_entries
        metadata = host_tensor((size,), torch.int32, self._device)
        views = layout.views(metadata)
        views.tiles.numpy()[:] = tiles
        tokens = [row.first for row in lone]
        for window, (items, firsts) in planned.items():
            _fill(views.items[window].numpy(), items)
            views.firsts[window].numpy()[tokens] = firsts
        return layout, metadata

    def _graph_size(self, rows: Rows[Span], num_entries: int) -> int | None:
        if num_entries > self._max_table_entries or any(row.num_tokens > 1 for row in rows):
            return None
        return next((size for size in self._graph_sizes if size >= len(rows)), None)

    def _tables(self, placed: Rows[PlacedRow], rows: Rows[Span]) -> tuple[Ints, Longs]:
        """All rows' tables, as far as they are read, and where each begins."""
        size = self._block_size
        pieces = [
            entry.sequence.block_array()[: -(-(row.start + row.num_tokens) // size)]
            for entry, row in zip(placed, rows, strict=True)
        ]
        lengths = np.array([len(piece) for piece in pieces])
        return np.concatenate(pieces), np.cumsum(lengths) - lengths

    def _slots(self, tables: Ints, offsets: Longs, positions: Longs) -> Longs:
        blocks = tables[offsets + positions // self._block_size].astype(np.int64)
        slots: Longs = blocks * self._block_size + positions % self._block_size
        return slots

    def _frequencies(self, placed: Rows[PlacedRow]) -> Tensor:
        if self._shared_frequencies:
            return placed[0].sequence.frequencies
        return torch.cat(
            [entry.sequence.frequencies.expand(entry.row.num_tokens, -1) for entry in placed]
        )


def _positions(rows: Rows[Span], counts: Longs) -> Longs:
    starts = np.array([row.start for row in rows])
    firsts = np.array([row.first for row in rows])
    positions: Longs = np.arange(int(counts.sum())) + np.repeat(starts - firsts, counts)
    return positions


def _fill(section: Ints, items: Ints) -> None:
    """Row -1 is of no row."""
    section[: len(items)] = items
    section[len(items) :] = -1

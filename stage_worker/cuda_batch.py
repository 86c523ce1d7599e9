"""Turns the rows of a step into the metadata of one forward pass on a CUDA device.

    T tokens of all rows, one after another; R rows; D head dim

All of it is planned on the host, in one array that takes one upload. Steps of lone tokens are
padded to the next size that there is a graph for; a padded token reads and writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage_worker.batch import PlacedRow
from stage_worker.cuda_attention import CudaAttention, Span
from stage_worker.cuda_layout import Layout
from stage_worker.staging import host_tensor

Ints = NDArray[np.int32]
Numbers = list[int] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CudaBatch:
    """`metadata` is on the host as `layout` says, for the graph of that size where there is one.

    `row_slots` are those of the tokens, and `frequencies` [D / 2], or [T, D / 2] where sequences
    differ; both are on the host as well.
    """

    metadata: Tensor
    layout: Layout
    graph_size: int | None
    row_slots: Numbers
    frequencies: Tensor

    @property
    def slots(self) -> Tensor:
        """[T] int64"""
        return torch.as_tensor(self.row_slots, dtype=torch.int64)


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
        tables = self._tables(placed, rows)
        offsets = list(itertools.accumulate(map(len, tables), initial=0))
        num_entries = offsets.pop()
        place = self._place_lone if len(rows) == _num_tokens(rows) else self._place
        tokens = place(placed, rows, tables, offsets)
        graph_size = self._graph_size(rows, num_entries)
        layout, metadata = self._plan(rows, graph_size, num_entries)
        array = metadata.numpy()
        np.concatenate(tables, out=array[layout.tables_at :])
        _fill(array, layout.offsets_at, tokens.offsets, layout.num_tokens, 0)
        _fill(array, layout.positions_at, tokens.positions, layout.num_tokens, 0)
        _fill(array, layout.slots_at, _written(placed, tokens.slots, stage), layout.num_tokens, -1)
        if stage == 0:
            ids = [token for entry in placed for token in entry.row.token_ids]
            _fill(array, layout.token_ids_at, ids, layout.num_tokens, 0)
        return CudaBatch(metadata, layout, graph_size, tokens.slots, self._frequencies(placed))

    def _plan(
        self, rows: Rows[Span], graph_size: int | None, num_entries: int
    ) -> tuple[Layout, Tensor]:
        """An array with items and tiles filled in."""
        lone = [row for row in rows if row.num_tokens == 1]
        longer = [row for row in rows if row.num_tokens > 1]
        tiles = self._attention.plan_tiles(longer) if longer else []
        planned = [self._attention.plan_items(lone, w) for w in self._windows] if lone else []
        num_items = max((len(items) // 4 for items, _ in planned), default=0)
        if graph_size is not None:
            num_items = self._attention.max_items(graph_size)
        num_tokens = graph_size or _num_tokens(rows)
        layout = Layout(num_tokens, num_items, len(tiles) // 4, self._windows)
        size = layout.tables_at + num_entries
        metadata = host_tensor((size,), torch.int32, self._device)
        array = metadata.numpy()
        _fill(array, layout.tiles_at, tiles, len(tiles), 0)
        for i, (items, firsts) in enumerate(planned):
            _fill(array, layout.items_at(i), items, 4 * num_items, -1)
            at = layout.firsts_at(i)
            if longer:
                array[[at + row.first for row in lone]] = firsts
            else:
                _fill(array, at, firsts, len(firsts), 0)
        return layout, metadata

    def _graph_size(self, rows: Rows[Span], num_entries: int) -> int | None:
        if num_entries > self._max_table_entries or len(rows) < _num_tokens(rows):
            return None
        return next((size for size in self._graph_sizes if size >= len(rows)), None)

    def _tables(self, placed: Rows[PlacedRow], rows: Rows[Span]) -> list[Ints]:
        """Each row's table, as far as it is read."""
        size = self._block_size
        return [
            entry.sequence.block_array()[: -(-(row.start + row.num_tokens) // size)]
            for entry, row in zip(placed, rows, strict=True)
        ]

    def _place_lone(
        self, placed: Rows[PlacedRow], rows: Rows[Span], tables: list[Ints], offsets: list[int]
    ) -> _Tokens:
        """Of rows of one token each, without numpy: its calls would take longer than the work."""
        size, positions = self._block_size, [row.start for row in rows]
        slots = [
            entry.sequence.blocks[position // size] * size + position % size
            for entry, position in zip(placed, positions, strict=True)
        ]
        return _Tokens(positions, slots, offsets)

    def _place(
        self, placed: Rows[PlacedRow], rows: Rows[Span], tables: list[Ints], offsets: list[int]
    ) -> _Tokens:
        counts = np.array([row.num_tokens for row in rows])
        of_token = np.repeat(np.array(offsets), counts)
        distances = np.array([row.start - row.first for row in rows])
        positions = np.arange(len(of_token)) + np.repeat(distances, counts)
        size = self._block_size
        blocks = np.concatenate(tables)[of_token + positions // size].astype(np.int64)
        return _Tokens(positions, blocks * size + positions % size, of_token)

    def _frequencies(self, placed: Rows[PlacedRow]) -> Tensor:
        if self._shared_frequencies:
            return placed[0].sequence.frequencies[0]
        return torch.cat(
            [entry.sequence.frequencies[0].expand(entry.row.num_tokens, -1) for entry in placed]
        )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """[T] each; offsets are those of the row's block table."""

    positions: Numbers
    slots: Numbers
    offsets: Numbers


def _num_tokens(rows: Rows[Span]) -> int:
    return rows[-1].first + rows[-1].num_tokens


def _written(placed: Rows[PlacedRow], slots: Numbers, stage: int) -> Numbers:
    """-1 for tokens whose pages hold their KV already."""
    writing = [entry.row.first_writing_stage <= stage for entry in placed]
    if all(writing):
        return slots
    counts = [entry.row.num_tokens for entry in placed]
    return np.where(np.repeat(writing, counts), np.asarray(slots), -1)


def _fill(array: Ints, start: int, numbers: Numbers, count: int, padding: int) -> None:
    """A section of `count`."""
    end = start + len(numbers)
    array[start:end] = numbers
    array[end : start + count] = padding

"""How the attention of a step is shared out over a CUDA device's programs.

    T tokens, W items, P tiles; H query heads, K KV heads, D head dim

A row with one query is cut along its context into items, as many as fill the device: reading KV is
what such a row costs, and no single program reads fast enough. Rows with more queries are cut along
those, into tiles. Planned once per step; pages are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage_worker.kv_cache import PlainKvCache
from stage_worker.triton_decode import decode_attention, decode_scratch
from stage_worker.triton_prefill import prefill_attention, tokens_per_tile
from stagemesh.model_spec import ModelSpec

if TYPE_CHECKING:
    from stage_worker.cuda_layout import DeviceBatch

# An item has at least so many positions: putting many short ones together costs more than it saves.
_MIN_ITEM_TOKENS = 256
_PROGRAMS_PER_PROCESSOR = 2
# Where Triton's kernels are interpreted on a CPU, for tests.
_PRETEND_PROCESSORS = 8


@dataclass(frozen=True, slots=True)
class Span:
    """A row's tokens [first, first + num_tokens) of the step, at positions from `start` on."""

    first: int
    num_tokens: int
    start: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """output: [T, H, D]; partials as `decode_scratch` makes them."""

    output: Tensor
    partials: tuple[Tensor, Tensor, Tensor]


class CudaAttention:
    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._on_gpu = device.type == "cuda"
        processors = _PRETEND_PROCESSORS
        if self._on_gpu:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._num_filling = -(-_PROGRAMS_PER_PROCESSOR * processors // spec.num_kv_heads)
        self._tile_tokens = tokens_per_tile(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, dtype.itemsize
        )

    def max_items(self, num_rows: int) -> int:
        """How many items so many rows may be cut into."""
        return num_rows + self._num_filling

    def plan_items(self, rows: Sequence[Span], window: int | None) -> tuple[list[int], list[int]]:
        """Items [W * 4] of rows of one token each, and the first item of each [R].

        Plain lists: for the few rows of a step, numpy would take longer.
        """
        lengths = [row.start + 1 if window is None else min(row.start + 1, window) for row in rows]
        per_token = self._num_filling / sum(lengths)
        items: list[int] = []
        firsts: list[int] = []
        for row, length in zip(rows, lengths, strict=True):
            # The row's share, to the nearest: a piece that is left over would cost a merge.
            share = min(round(length * per_token), length // _MIN_ITEM_TOKENS)
            size = -(-length // max(share, 1))
            end = row.start + 1
            starts = range(end - length, end, size)
            firsts.append(len(items) // 4)
            for start in starts:
                items += (row.first, start, min(start + size, end), len(starts))
        return items, firsts

    def plan_tiles(self, rows: Sequence[Span]) -> list[int]:
        """Tiles [P * 4] of rows of several tokens; those that see most come first."""
        tiles = [
            (row.first, row.first + i, row.start + i, min(self._tile_tokens, row.num_tokens - i))
            for row in rows
            for i in range(0, row.num_tokens, self._tile_tokens)
        ]
        tiles.sort(key=lambda tile: -tile[2])
        return [number for tile in tiles for number in tile]

    def scratch(self, batch: DeviceBatch) -> Scratch:
        """What the layers of one pass use one after another."""
        num_items = max(len(items) for items in batch.items.values())
        spec, num_tokens = self._spec, len(batch.positions)
        # Zeros: nothing is written for tokens that fill a graph up.
        output = torch.zeros(
            num_tokens, spec.num_heads, spec.head_dim, dtype=self._dtype, device=self._device
        )
        partials = decode_scratch(
            num_items,
            num_tokens if num_items else 0,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            self._device,
        )
        return Scratch(output, partials)

    def attend(
        self,
        queries: Tensor,
        batch: DeviceBatch,
        window: int | None,
        cache: PlainKvCache,
        layer: int,
        scratch: Scratch,
    ) -> Tensor:
        """queries: [T, H, D], whose own keys and values are written already -> [T, H * D].

        The next layer's result takes its place.
        """
        keys, values, output = cache.keys[layer], cache.values[layer], scratch.output
        if len(batch.tiles):
            prefill_attention(
                queries, keys, values, batch.tables, batch.offsets, batch.tiles, window, output
            )
        items = batch.items[window]
        if len(items):
            decode_attention(
                queries, keys, values, batch.tables, batch.offsets, items, batch.firsts[window],
                scratch.partials, output,
            )  # fmt: skip
        return output.flatten(1)

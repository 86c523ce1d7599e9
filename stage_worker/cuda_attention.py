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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage_worker.kv_cache import KvCache
from stage_worker.triton_decode import decode_attention, decode_scratch
from stage_worker.triton_prefill import prefill_attention, tokens_per_tile
from stagemesh.model_spec import ModelSpec

if TYPE_CHECKING:
    from stage_worker.cuda_layout import DeviceBatch

Ints = NDArray[np.int32]

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

    def plan_items(self, rows: Sequence[Span], window: int | None) -> tuple[Ints, Ints]:
        """Items [W, 4] of rows of one token each, and the first item of each [R]."""
        tokens = np.array([row.first for row in rows], dtype=np.int32)
        ends = np.array([row.start + 1 for row in rows], dtype=np.int32)
        begins = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
        lengths = ends - begins
        # A row's share of the items, to the nearest: a piece that is left over would cost a merge.
        shares = np.rint(lengths * (self._num_filling / int(lengths.sum())))
        shares = np.clip(shares, 1, np.maximum(lengths // _MIN_ITEM_TOKENS, 1)).astype(np.int32)
        sizes = -(-lengths // shares)
        counts = -(-lengths // sizes)
        firsts = np.cumsum(counts, dtype=np.int32) - counts
        row_of = np.repeat(np.arange(len(rows)), counts)
        begin = begins[row_of] + sizes[row_of] * (np.arange(len(row_of)) - firsts[row_of])
        end = np.minimum(begin + sizes[row_of], ends[row_of])
        items = np.stack((tokens[row_of], begin, end, counts[row_of]), axis=1, dtype=np.int32)
        return items, firsts

    def plan_tiles(self, rows: Sequence[Span]) -> Ints:
        """Tiles [P, 4] of rows of several tokens; those that see most come first."""
        tiles = [
            (row.first, row.first + i, row.start + i, min(self._tile_tokens, row.num_tokens - i))
            for row in rows
            for i in range(0, row.num_tokens, self._tile_tokens)
        ]
        tiles.sort(key=lambda tile: -tile[2])
        return np.array(tiles, dtype=np.int32).reshape(-1, 4)

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
        cache: KvCache,
        layer: int,
        scratch: Scratch,
        *,
        early: bool,
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
                scratch.partials, output, early=early,
            )  # fmt: skip
        return output.flatten(1)

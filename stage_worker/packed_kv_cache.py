"""KV pages in another type than the one that is computed with, on the CPU.

    N blocks, O offset in a block, W words of 32 bits a token; n blocks of a batch, L layers

Per layer one tensor of records [N * O, W] (`stage_worker.kv_records`): a slot's keys and values lie
side by side, so that one copy moves them, and words are copied several times as fast as bytes.
What is read is made anew each time; whoever reads a long context does it in pieces that a
processor's cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker.kv_records import make_records
from stagemesh.model_spec import ModelSpec


class PackedKvCache:
    """A `KvCache`."""

    in_place = False
    device = torch.device("cpu")

    def __init__(
        self,
        spec: ModelSpec,
        num_layers: int,
        num_blocks: int,
        block_size_tokens: int,
        dtype: torch.dtype,
        kv_dtype: str,
    ) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self._records = make_records(kv_dtype, spec.num_kv_heads, spec.head_dim)
        self._num_numbers = 2 * spec.num_kv_heads * spec.head_dim
        shape = (num_blocks * block_size_tokens, self._records.num_words)
        self._pages = [torch.empty(shape, dtype=torch.int32) for _ in range(num_layers)]

    @property
    def slot_bytes(self) -> int:
        return self._num_numbers * self.dtype.itemsize

    @property
    def memory(self) -> Sequence[Tensor]:
        return [pages.view(self.num_blocks, self.block_size_tokens, -1) for pages in self._pages]

    def views(self, layer: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("pages are not in the type that is computed with")

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self._pages[layer].index_copy_(0, slots, self._records.encode(keys, values))

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        records = self._pages[layer].index_select(0, slots.flatten())
        numbers = self._records.decode(records, self.dtype)
        keys, values = numbers.view(*slots.shape, *numbers.shape[1:]).unbind(2)
        return keys, values

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.block_size_tokens * self._pages[0][:1].nbytes

    def read_blocks(self, places: Sequence[int]) -> Tensor:
        """As (layer, offset, record)."""
        index = torch.tensor(places)
        blocks = torch.stack([pages.index_select(0, index) for pages in self.memory], dim=1)
        return blocks.flatten(1).view(torch.uint8)

    def write_blocks(self, places: Sequence[int], pages: Tensor) -> None:
        index = torch.tensor(places)
        blocks = pages.view(torch.int32).view(len(places), self.num_layers, -1)
        for i, target in enumerate(self.memory):
            target.index_copy_(0, index, blocks[:, i].view(len(places), *target.shape[1:]))

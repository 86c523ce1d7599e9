"""The KV pages of a stage's layers, and how many of them there are.

    N blocks, O offset in a block, H KV heads, D head dim; n blocks of a batch, L layers

Pages in the type that is computed with are read where they lie (`PlainKvCache`). Those in another
one are turned into it when they are read (`stage_worker.packed_kv_cache`). Memory is not touched
before a token is written to it, so blocks that were never used cost nothing on the CPU; what unused
slots hold is arbitrary and nobody may read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stage_worker.checkpoint import DTYPE_NAMES
from stage_worker.kv_dtype import vector_bytes
from stage_worker.memory import available_bytes
from stagemesh.errors import OutOfMemory
from stagemesh.model_spec import ModelSpec

# Without a budget: this part of what is free, since other stages may live on the same host …
_CPU_FRACTION = 0.25
_CUDA_FRACTION = 0.85
# … and not more than this many sequences of full length could fill.
_MAX_FULL_SEQUENCES = 256
# Of what is read, keys and values each.
_MAX_SCRATCH_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class LogCost:
    """What the boundary log takes of the memory that KV is in: so much a block, up to a limit."""

    bytes_per_block: int
    max_bytes: int | None

    def share_of(self, budget: int, kv_bytes_per_block: int) -> int:
        """The log's part of a budget for both, where every block is logged or the limit reached."""
        even = budget * self.bytes_per_block // (self.bytes_per_block + kv_bytes_per_block)
        return even if self.max_bytes is None else min(even, self.max_bytes)


class KvCache(Protocol):
    """`dtype` is that of keys and values as they are written and read, `kv_dtype` that of the
    pages; `in_place`: they are one, and there are views."""

    num_layers: int
    num_blocks: int
    block_size_tokens: int
    dtype: torch.dtype
    kv_dtype: str
    device: torch.device
    in_place: bool

    @property
    def slot_bytes(self) -> int:
        """Of one token's keys and values in one layer, as they are read."""
        ...

    @property
    def memory(self) -> Sequence[Tensor]:
        """All that the pages are in, each [N, O, ...]."""
        ...

    def views(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, N * O, D], where they lie; only `in_place`."""
        ...

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """slots: [T], slot = block * block_size + offset; keys, values: [T, H, D]."""
        ...

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots: [R, C] -> keys, values: [R, C, H, D], until the next call."""
        ...

    @property
    def block_bytes(self) -> int:
        """Of a block over all layers, here and where it travels."""
        ...

    def read_blocks(self, places: Sequence[int]) -> Tensor:
        """[n, block_bytes] uint8 on the host, as plan.proto says of pages."""
        ...

    def write_blocks(self, places: Sequence[int], pages: Tensor) -> None:
        """What `read_blocks` gave, of a cache of the same layers and types."""
        ...


class PlainKvCache:
    """A `KvCache` of two tensors a layer, keys and values, each [N, O, H, D]."""

    in_place = True

    def __init__(
        self,
        spec: ModelSpec,
        num_layers: int,
        num_blocks: int,
        block_size_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self.dtype = dtype
        self.kv_dtype = DTYPE_NAMES[dtype]
        self.device = device
        shape = (num_blocks, block_size_tokens, spec.num_kv_heads, spec.head_dim)
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
            for _ in range(2)
        )
        self._scratch = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]
        self._views = [
            (
                keys.view(1, -1, *shape[2:]).transpose(1, 2),
                values.view(1, -1, *shape[2:]).transpose(1, 2),
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    @property
    def slot_bytes(self) -> int:
        return 2 * self.keys[0][0, 0].nbytes

    @property
    def memory(self) -> Sequence[Tensor]:
        return (*self.keys, *self.values)

    def views(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._views[layer]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        return self._gather(keys, slots, 0), self._gather(values, slots, 1)

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.block_size_tokens * self.slot_bytes

    def read_blocks(self, places: Sequence[int]) -> Tensor:
        """As (layer, K/V, head, offset, dim)."""
        index = torch.tensor(places, device=self.device)
        pages = torch.empty(self._travelling(len(places)), dtype=self.dtype)
        for i, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for j, source in enumerate(pair):
                pages[:, i, j] = source.index_select(0, index).transpose(1, 2)
        return pages.flatten(1).view(torch.uint8)

    def write_blocks(self, places: Sequence[int], pages: Tensor) -> None:
        index = torch.tensor(places, device=self.device)
        numbers = pages.view(self.dtype).view(self._travelling(len(places))).to(self.device)
        for i, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for j, target in enumerate(pair):
                target.index_copy_(0, index, numbers[:, i, j].transpose(1, 2))

    def _travelling(self, num_blocks: int) -> tuple[int, ...]:
        _, offsets, heads, dim = self.keys[0].shape
        return num_blocks, self.num_layers, 2, heads, offsets, dim

    def _gather(self, pages: Tensor, slots: Tensor, which: int) -> Tensor:
        # Copying whole rows is three times as fast as indexing [N * O, H, D].
        rows = pages.view(-1, pages.shape[2] * pages.shape[3])
        size = slots.numel() * rows.shape[1]
        if size * rows.itemsize > _MAX_SCRATCH_BYTES:
            copied = rows.index_select(0, slots.flatten())
        else:
            # Memory that is new takes longer to be had than to be filled.
            if size > self._scratch[which].numel():
                self._scratch[which] = rows.new_empty(size)
            copied = self._scratch[which][:size].view(-1, rows.shape[1])
            torch.index_select(rows, 0, slots.flatten(), out=copied)
        return copied.view(*slots.shape, *pages.shape[2:])


def block_bytes(spec: ModelSpec, num_layers: int, block_size_tokens: int, kv_dtype: str) -> int:
    """Bytes of one block over all layers of a stage."""
    num_vectors = 2 * num_layers * block_size_tokens * spec.num_kv_heads
    return num_vectors * vector_bytes(kv_dtype, spec.head_dim)


def choose_num_blocks(
    spec: ModelSpec,
    bytes_per_block: int,
    block_size_tokens: int,
    max_kv_memory_bytes: int | None,
    device: torch.device,
    log: LogCost,
) -> int:
    """How many blocks fit in the budget, or in a careful part of what is free without one.

    Raises OutOfMemory where not even one does.
    """
    budget = max_kv_memory_bytes
    if budget is None:
        fraction = _CUDA_FRACTION if device.type == "cuda" else _CPU_FRACTION
        useful = _MAX_FULL_SEQUENCES * -(-spec.context_length // block_size_tokens)
        budget = int(available_bytes(device) * fraction)
        budget = min(budget - log.share_of(budget, bytes_per_block), useful * bytes_per_block)
    if budget < bytes_per_block:
        raise OutOfMemory(
            f"{budget} bytes for KV hold no block of {block_size_tokens} tokens, which takes "
            f"{bytes_per_block} (max_kv_memory, block_size)"
        )
    return budget // bytes_per_block

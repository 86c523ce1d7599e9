"""KV pages of a stage whose heads are spread over ranks: whole to everybody outside.

    n blocks of a batch, K KV heads, k of them a rank's

Pages travel with all heads, so they may go to a worker with another number of ranks. A rank reads
and writes its own heads of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_worker.kv_cache import KvCache
from stage_worker.kv_dtype import INT8


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Where heads are in the bytes of a page: it consists of units, a unit of sections, and a
    section of groups that have some bytes for each head."""

    num_units: int
    sections: tuple[tuple[int, int], ...]
    """(groups, bytes of a head)"""

    @classmethod
    def of(cls, cache: KvCache, head_dim: int) -> HeadLayout:
        """As the `read_blocks` of both kinds of cache say."""
        num_layers, size = cache.num_layers, cache.block_size_tokens
        if cache.in_place:
            return cls(1, ((2 * num_layers, size * head_dim * cache.dtype.itemsize),))
        if cache.kv_dtype == INT8:
            return cls(num_layers * size, ((2, head_dim), (2, torch.float32.itemsize)))
        return cls(num_layers * size, ((2, head_dim * torch.float16.itemsize),))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Each [n, bytes] of some heads, in their order -> [n, bytes] of all."""
        split = [list(self._split(part)) for part in parts]
        joined = [torch.cat(same, dim=2).flatten(1) for same in zip(*split, strict=True)]
        return torch.cat(joined, dim=1).view(len(parts[0]), -1)

    def take(self, pages: Tensor, heads: range) -> Tensor:
        """[n, bytes] of all heads -> [n, bytes] of these."""
        taken = [part[:, :, heads.start : heads.stop].flatten(1) for part in self._split(pages)]
        return torch.cat(taken, dim=1).view(len(pages), -1)

    def _split(self, pages: Tensor) -> Sequence[Tensor]:
        """[n * units, groups, heads, bytes of a head] of each section."""
        units = pages.reshape(len(pages) * self.num_units, -1)
        per_head = sum(groups * num_bytes for groups, num_bytes in self.sections)
        num_heads = units.shape[1] // per_head
        sizes = [groups * num_heads * num_bytes for groups, num_bytes in self.sections]
        return [
            part.reshape(-1, groups, num_heads, num_bytes)
            for part, (groups, num_bytes) in zip(
                torch.split(units, sizes, dim=1), self.sections, strict=True
            )
        ]


def bytes_of_blocks(cache: KvCache, places: Sequence[int]) -> bytearray:
    return bytearray(cache.read_blocks(list(places)).contiguous().numpy().data.cast("B"))


def blocks_from_bytes(cache: KvCache, places: Sequence[int], content: bytearray) -> None:
    pages = torch.frombuffer(content, dtype=torch.uint8).view(len(places), -1)
    cache.write_blocks(list(places), pages)

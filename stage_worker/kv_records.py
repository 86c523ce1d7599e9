"""How a token's keys and values are written where pages are not in the type that is computed with.

    T tokens, H KV heads, D head dim, W words of 32 bits a token

A token's record is what its keys and values became, one beside the other, and then, for int8, their
scales. What is not finite is not finite when it is read, and makes nothing else so.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stage_worker.checkpoint import TORCH_DTYPES
from stage_worker.kv_dtype import INT8, vector_bytes
from stage_worker.quantise import round_vectors

_WORD_BYTES = 4


class Records(Protocol):
    @property
    def num_words(self) -> int: ...

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """keys, values: [T, H, D] -> [T, W] int32."""
        ...

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        """records: [T, W] -> keys and values, [T, 2, H, D], a tensor of its own."""
        ...


class FloatRecords:
    """Floats of another type, rounded to the nearest; what is too large for it is infinite."""

    def __init__(self, held: torch.dtype, num_heads: int, head_dim: int) -> None:
        self._held = held
        self._shape = (2, num_heads, head_dim)
        self.num_words = 2 * num_heads * head_dim * held.itemsize // _WORD_BYTES

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        return torch.stack((keys, values), dim=1).to(self._held).flatten(1).view(torch.int32)

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        return records.view(self._held).to(dtype).view(-1, *self._shape)


class Int8Records:
    def __init__(self, num_heads: int, head_dim: int) -> None:
        self._shape = (2, num_heads, head_dim)
        self.num_words = 2 * num_heads * vector_bytes(INT8, head_dim) // _WORD_BYTES
        self._num_code_words = 2 * num_heads * head_dim // _WORD_BYTES

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        codes, scales = round_vectors(torch.stack((keys, values), dim=1))
        return torch.cat(
            (codes.flatten(1).view(torch.int32), scales.flatten(1).view(torch.int32)), dim=1
        )

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        codes = records[:, : self._num_code_words].view(torch.int8)
        scales = records[:, self._num_code_words :].view(torch.float32)
        numbers = codes.to(torch.float32).view(-1, *self._shape)
        return numbers.mul_(scales.view(-1, *self._shape[:2], 1)).to(dtype)


def make_records(kv_dtype: str, num_heads: int, head_dim: int) -> Records:
    assert head_dim % 2 == 0, "rope turns pairs"
    if kv_dtype == INT8:
        return Int8Records(num_heads, head_dim)
    return FloatRecords(TORCH_DTYPES[kv_dtype], num_heads, head_dim)

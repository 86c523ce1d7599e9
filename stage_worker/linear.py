"""Linear layers: a plain matrix for any device and dtype, or oneDNN-packed float32 pieces.

    T tokens, I inputs, O outputs

A packed layer gives a row the same bits whatever number of rows it comes with, from 2 on; a lone
row is therefore computed beside a copy of itself. Measured, not promised by oneDNN: the
equivalence tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stage_worker.checkpoint import PIECE_BYTES, copy_in_pieces


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        ...


class PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight  # [O, I]
        self._bias = bias

    @property
    def bias(self) -> Tensor | None:
        """[O]"""
        return self._bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self._bias)


class PackedLinear:
    """Output columns in pieces of a bounded size, so that packing needs little memory beside."""

    def __init__(self, pieces: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self._pieces = list(zip(pieces, biases, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty(0, sum(piece.shape[0] for piece, _ in self._pieces))
        if num_rows == 1:
            x = x.expand(2, -1).contiguous()
        outputs = [_packed_product(x, piece, bias) for piece, bias in self._pieces]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return whole[:num_rows]


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def plain_linear(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None],
) -> PlainLinear:
    """One layer whose outputs are those of `weights` (views of files) side by side."""
    bias = _join(biases, dtype, device, on_bytes) if biases else None
    return PlainLinear(_join(weights, dtype, device, on_bytes), bias)


def packed_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor], on_bytes: Callable[[int], None]
) -> PackedLinear:
    """As `plain_linear`, float32 on the CPU, packed."""
    pieces: list[Tensor] = []
    piece_biases: list[Tensor | None] = []
    for i, weight in enumerate(weights):
        bias = biases[i].to(torch.float32, copy=True) if biases else None
        rows = _rows_per_piece(weight)
        for start in range(0, weight.shape[0], rows):
            source = weight[start : start + rows].to(torch.float32)
            pieces.append(torch.ops.mkldnn._reorder_linear_weight(source, None))
            piece_biases.append(None if bias is None else bias[start : start + rows])
            on_bytes(source.nbytes)
    return PackedLinear(pieces, piece_biases)


def _rows_per_piece(weight: Tensor) -> int:
    """At least 64 rows, in multiples of 64: what the packed layout groups outputs by."""
    return max(64, PIECE_BYTES // (4 * weight.shape[1]) // 64 * 64)


def _join(
    sources: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None],
) -> Tensor:
    num_rows = sum(source.shape[0] for source in sources)
    joined = torch.empty(num_rows, *sources[0].shape[1:], dtype=dtype, device=device)
    start = 0
    for source in sources:
        copy_in_pieces(joined[start : start + source.shape[0]], source, on_bytes)
        start += source.shape[0]
    return joined

"""Linear layers in float32 on a CPU, by oneDNN's kernel: weights as they are, or packed for it.

    T tokens, I inputs, O outputs

`OneDnnLinear` is as fast as torch's own at one row and faster from two on. With AVX2 packing gains
nothing more; with AVX-512 it does, and costs a lone row something: benchmarks/RESULTS.md.

oneDNN makes and keeps code for every number of rows that it meets, half a megabyte for a matrix,
and torch keeps a thousand of those: so numbers of rows are rounded up to few.

A packed layer's row has the same bits whatever number of rows it comes with, from 2 on; a lone row
is therefore computed beside a copy of itself. Measured, not promised by oneDNN: the equivalence
tests hold it to that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker.linear import LinearSource, PlainLinear

# Numbers of rows up to the first are rounded up to multiples of the second.
_ROW_STEPS = ((16, 4), (64, 16), (256, 32), (512, 64), (sys.maxsize, 128))


class OneDnnLinear(PlainLinear):
    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.weight.shape[0])
        return product(x, self.weight, self.bias)


class PackedLinear:
    """Outputs in pieces of a bounded size, so that packing needs little memory beside."""

    def __init__(self, pieces: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self._pieces = list(zip(pieces, biases, strict=True))

    @classmethod
    def make(cls, source: LinearSource) -> PackedLinear:
        bias = source.bias(torch.float32, torch.device("cpu"))
        pieces: list[Tensor] = []
        biases: list[Tensor | None] = []
        done = 0
        for piece in source.dense_pieces():
            pieces.append(torch.ops.mkldnn._reorder_linear_weight(piece, None))
            biases.append(None if bias is None else bias[done : done + len(piece)])
            source.on_bytes(piece.nbytes)
            done += len(piece)
        return cls(pieces, biases)

    @property
    def nbytes(self) -> int:
        tensors = [part for piece in self._pieces for part in piece if part is not None]
        return sum(4 * tensor.numel() for tensor in tensors)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty(0, sum(piece.shape[0] for piece, _ in self._pieces))
        if num_rows == 1:
            x = x.expand(2, -1).contiguous()
        x = _padded(x)
        outputs = [_product(x, piece, bias) for piece, bias in self._pieces]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return whole[:num_rows]


def is_available() -> bool:
    return bool(torch._C._has_mkldnn)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, I] x [O, I] -> [T, O], for T > 0; the weight may lie in memory as [I, O]."""
    return _product(_padded(x), weight, bias)[: x.shape[0]]


def num_kernel_rows(num_rows: int) -> int:
    """At least `num_rows`: one of some 20 numbers up to 512, and one of 8 for each 1024 beyond."""
    if num_rows <= 4:
        return num_rows
    step = next(step for limit, step in _ROW_STEPS if num_rows <= limit)
    return -(-num_rows // step) * step


def _padded(x: Tensor) -> Tensor:
    """[T, I] -> [T', I], zeros after the rows."""
    num_rows = x.shape[0]
    num_wanted = num_kernel_rows(num_rows)
    if num_wanted == num_rows:
        return x
    padded = x.new_zeros(num_wanted, x.shape[1])
    padded[:num_rows] = x
    return padded


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product

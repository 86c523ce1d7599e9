"""Linear layers with 4 bits a weight and 8 bits an activation, on a CPU: a scale and a zero point
for each group of inputs, and a scale for each group of a row of activations.

    T tokens, I inputs, O outputs, R outputs of a piece

A row's bits are the same whatever number of rows it comes with, from 2 on; where they must not
depend on it, a lone row is computed beside a copy of itself. Measured, not promised by the kernel:
the tests hold it to that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker import mlas
from stage_worker.linear import LinearSource, joined_codes
from stage_worker.mlas import Int4Product
from stage_worker.quantise import to_int4
from stage_worker.weight_source import Codes, WeightSource
from stagemesh.quantization import GROUP_SIZES

# At least so many weights at a time are multiplied: a call costs something of its own.
_PACKED_WEIGHTS = 2**22


class Int4Linear:
    def __init__(
        self, pieces: Sequence[Int4Product], bias: Tensor | None, *, invariant: bool
    ) -> None:
        self._pieces = pieces
        self._bias = bias
        self._min_rows = 2 if invariant else 1
        self._num_outputs = sum(piece.num_outputs for piece in pieces)

    @classmethod
    def make(cls, source: LinearSource, group_size: int, *, invariant: bool = False) -> Int4Linear:
        pieces = []
        codes_of = functools.partial(_codes, group_size=group_size)
        for codes in joined_codes(source, codes_of, _PACKED_WEIGHTS):
            pieces.append(Int4Product(codes, source.num_inputs))
            source.on_bytes(pieces[-1].nbytes)
        return cls(pieces, source.bias(torch.float32, torch.device("cpu")), invariant=invariant)

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self._bias is None else self._bias.nbytes
        return sum(piece.nbytes for piece in self._pieces) + bias_bytes

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty(0, self._num_outputs)
        wide = x.to(torch.float32)
        if num_rows < self._min_rows:
            wide = wide.expand(self._min_rows, -1)
        wide = wide.contiguous()
        outputs = []
        for piece in self._pieces:
            outputs.append(wide.new_empty(len(wide), piece.num_outputs))
            piece(wide, outputs[-1])
        output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))[:num_rows]
        if self._bias is not None:
            output += self._bias
        if not math.isfinite(wide.sum().item()):  # the kernel takes NaN for a number
            output[~x.isfinite().all(dim=1)] = math.nan
        return output.to(x.dtype)


def held_bytes(num_outputs: int, num_inputs: int, group_size: int) -> int:
    return mlas.held_bytes(num_outputs, -(-num_inputs // group_size), group_size)


def _codes(matrix: WeightSource, start: int, end: int, group_size: int) -> Codes:
    """As the files have them, where they have groups that are made of the layer's."""
    if matrix.bits == 4 and matrix.group_size is not None and not matrix.group_size % group_size:
        codes = matrix.codes(start, end)
        repeats = matrix.group_size // group_size
        return Codes(codes.values, _repeat(codes.scales, repeats), _repeat(codes.zeros, repeats))
    return to_int4(matrix.dense(start, end), group_size)


def stored_group_size(matrix: WeightSource) -> int | None:
    """The largest group of the kernel's that the matrix' own are made of."""
    if matrix.bits != 4 or matrix.group_size is None:
        return None
    fitting = [size for size in GROUP_SIZES if matrix.group_size % size == 0]
    return max(fitting, default=None)


def _repeat(groups: Tensor, times: int) -> Tensor:
    return groups.repeat_interleave(times, dim=1) if times > 1 else groups

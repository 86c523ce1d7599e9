"""Linear layers with 8 bits a weight and 8 bits an activation, on a CPU.

    T tokens, I inputs, O outputs

Every row of activations has a scale of its own, and sums of integers are exact on every CPU: a
row's result depends neither on its neighbours nor on the processor's vector unit. Weights are kept
within 64 steps, so that no kernel overflows; 8 bits of files are rounded once more for that, which
was measured to cost less than activations of 7 bits would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_worker import fbgemm
from stage_worker.linear import LinearSource, joined_codes
from stage_worker.quantise import INT8_MAX, to_int8
from stage_worker.weight_source import Codes, WeightSource

# Activations are rounded to [-_LEVELS, _LEVELS], and stored from 1 on.
_LEVELS = 127
assert (2 * _LEVELS + 1) * INT8_MAX <= fbgemm.MAX_CODE_PRODUCT
# At least so many weights at a time are multiplied: a call rounds the activations once more, and
# starts threads. With 2 threads a row took two thirds of the time that it took by a quarter of it.
_PACKED_WEIGHTS = 2**23
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some outputs."""

    packed: Any
    num_outputs: int


class Int8Linear:
    def __init__(self, pieces: Sequence[_Piece], bias: Tensor | None, num_inputs: int) -> None:
        self._pieces = pieces
        self._bias = bias
        self._num_inputs = num_inputs
        self._num_outputs = sum(piece.num_outputs for piece in pieces)

    @classmethod
    def make(cls, source: LinearSource) -> Int8Linear:
        pieces = []
        for codes in joined_codes(source, _codes, _PACKED_WEIGHTS):
            pieces.append(_pack(codes))
            source.on_bytes(held_bytes(pieces[-1].num_outputs, source.num_inputs))
        bias = source.bias(torch.float32, torch.device("cpu"))
        return cls(pieces, bias, source.num_inputs)

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self._bias is None else self._bias.nbytes
        return held_bytes(self._num_outputs, self._num_inputs) + bias_bytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self._num_outputs)
        wide = x.to(torch.float32)
        # NaN and infinity come through: whatever they are multiplied by is not finite.
        peaks = wide.abs().amax(dim=1, keepdim=True).clamp_(min=_SMALLEST)
        units = wide / peaks
        output = wide.new_empty(len(x), self._num_outputs)
        start = 0
        for piece in self._pieces:
            product = fbgemm.multiply_int8(units, piece.packed, 1 / _LEVELS, _LEVELS + 1)
            end = start + piece.num_outputs
            torch.mul(product, peaks, out=output[:, start:end])
            start = end
        if self._bias is not None:
            output += self._bias
        return output.to(x.dtype)


def held_bytes(num_outputs: int, num_inputs: int) -> int:
    """A code for each weight; a scale, a zero point and a sum for each output."""
    return num_outputs * (num_inputs + 12)


def _codes(matrix: WeightSource, start: int, end: int) -> Codes:
    """As the files have them, where they have small symmetric codes with one scale a row."""
    if matrix.bits == 8 and matrix.group_size == matrix.shape[1]:
        codes = matrix.codes(start, end)
        is_small = int(codes.values.to(torch.int16).abs().amax()) <= INT8_MAX
        if is_small and not codes.zeros.any():
            return codes
    return to_int8(matrix.dense(start, end))


def _pack(codes: Codes) -> _Piece:
    packed = fbgemm.pack_int8(codes.values, codes.scales[:, 0].contiguous())
    return _Piece(packed, len(codes.values))

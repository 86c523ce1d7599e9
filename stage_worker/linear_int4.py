"""Linear layers with 4 bits a weight, on a CPU: a scale and a zero point for each group of inputs.

    T tokens, I inputs, O outputs, R outputs of a piece, G groups

The arithmetic is float32 between activations and results of bfloat16, the one type that torch's
kernel is fast with. It is for models that would not fit otherwise: 8 bits are faster.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker.linear import LinearSource, joined_codes
from stage_worker.quantise import to_int4
from stage_worker.weight_source import Codes, WeightSource
from stagemesh.quantization import GROUP_SIZES

# What the kernel's weights are multiples of.
_OUTPUTS_MULTIPLE = 16
_MIDDLE = 8
# At least so many weights at a time are multiplied: a call costs something of its own.
_PACKED_WEIGHTS = 2**22


class _Piece:
    """Some outputs: weight = (code - 8) * scale + offset."""

    def __init__(self, codes: Codes, group_size: int) -> None:
        self.num_outputs = len(codes.values)
        self._group_size = group_size
        padding = -self.num_outputs % _OUTPUTS_MULTIPLE
        values = torch.nn.functional.pad(codes.values.to(torch.int32), (0, 0, 0, padding))
        offsets = (_MIDDLE - codes.zeros) * codes.scales
        pairs = torch.stack([codes.scales, offsets], dim=2).transpose(0, 1)  # [G, R, 2]
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, padding))
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        self._scales = pairs.to(torch.bfloat16).contiguous()

    @property
    def nbytes(self) -> int:
        return int(self._weight.nbytes + self._scales.nbytes)

    def product(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, R], bfloat16."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._weight, self._group_size, self._scales
        )
        return product[:, : self.num_outputs]


class Int4Linear:
    """`padding`: inputs that the last group lacks."""

    def __init__(self, pieces: Sequence[_Piece], bias: Tensor | None, padding: int) -> None:
        self._pieces = pieces
        self._bias = bias
        self._padding = padding
        self._num_outputs = sum(piece.num_outputs for piece in pieces)

    @classmethod
    def make(cls, source: LinearSource, group_size: int) -> Int4Linear:
        pieces = []
        codes_of = functools.partial(_codes, group_size=group_size)
        for codes in joined_codes(source, codes_of, _PACKED_WEIGHTS):
            pieces.append(_Piece(codes, group_size))
            source.on_bytes(pieces[-1].nbytes)
        bias = source.bias(torch.float32, torch.device("cpu"))
        return cls(pieces, bias, -source.num_inputs % group_size)

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self._bias is None else self._bias.nbytes
        return sum(piece.nbytes for piece in self._pieces) + bias_bytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self._num_outputs)
        narrow = x.to(torch.bfloat16)
        if self._padding:
            narrow = torch.nn.functional.pad(narrow, (0, self._padding))
        narrow = narrow.contiguous()
        outputs = [piece.product(narrow) for piece in self._pieces]
        whole = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).to(torch.float32)
        return (whole if self._bias is None else whole.add_(self._bias)).to(x.dtype)


def held_bytes(num_outputs: int, num_inputs: int, group_size: int) -> int:
    """Half a byte for each weight; a scale and an offset of 16 bits for each group."""
    num_groups = -(-num_inputs // group_size)
    num_outputs += -num_outputs % _OUTPUTS_MULTIPLE
    return num_outputs * num_groups * (group_size // 2 + 4)


def is_available() -> bool:
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return all(hasattr(torch.ops.aten, name) for name in names)


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

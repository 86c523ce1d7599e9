"""Linear layers with 4 bits a weight, on a CPU: a scale and a zero point for each group of inputs.

    T tokens, I inputs, O outputs, R outputs of a piece, G groups of inputs
    B outputs that are packed together

The arithmetic is float32 between activations and results of bfloat16, the one type that torch's
kernel is fast with. It is for models that would not fit otherwise: 8 bits are faster.

torch's kernel takes about as long for each row. Many rows are multiplied in float32, a piece of the
weights at a time, made from the packed ones; unless a row's bits must not depend on its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker import linear_onednn
from stage_worker.linear import LinearSource, joined_codes
from stage_worker.quantise import to_int4
from stage_worker.weight_source import Codes, WeightSource
from stagemesh.quantization import GROUP_SIZES

# Outputs are padded to a multiple of it, as many as are packed together with any vector unit.
_OUTPUTS_MULTIPLE = 64
# From so many rows on making float32 weights costs less than it saves: benchmarks/RESULTS.md.
MANY_ROWS = 256
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

    @property
    def num_weights(self) -> int:
        """With those that are padding."""
        return 2 * int(self._weight.numel())

    def product(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, R], bfloat16."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._weight, self._group_size, self._scales
        )
        return product[:, : self.num_outputs]

    def wide_product(self, x: Tensor, num_packed: int, room: Tensor) -> Tensor:
        """[T, I] -> [T, R], float32, by weights that are written to `room`, [num_weights]."""
        num_rows, num_inputs = self._weight.shape[0], x.shape[1]
        wide = room[: num_inputs * num_rows].view(num_inputs, num_rows)
        self._widen(wide, num_packed)
        return linear_onednn.product(x, wide.t())[:, : self.num_outputs]

    def _widen(self, wide: Tensor, num_packed: int) -> None:
        """wide: [I, R], group by group, so that one is in a core's cache while it is made."""
        num_inputs = len(wide)
        half = num_packed // 2
        pairs = self._weight.view(-1, num_inputs, half).transpose(0, 1)  # [I, R / B, B / 2]
        scales, offsets = self._scales.float().unbind(dim=2)
        offsets = offsets - _MIDDLE * scales
        for group, rows in enumerate(torch.split(wide, self._group_size)):
            start = group * self._group_size
            own = pairs[start : start + len(rows)]
            halves = rows.view(len(rows), -1, 2, half)
            halves[:, :, 0].copy_(own & 15)
            halves[:, :, 1].copy_(own >> 4)
            torch.addcmul(offsets[group], rows, scales[group], out=rows)


class Int4Linear:
    """`padding`: inputs that the last group lacks."""

    def __init__(
        self, pieces: Sequence[_Piece], bias: Tensor | None, padding: int, invariant: bool
    ) -> None:
        self._pieces = pieces
        self._bias = bias
        self._padding = padding
        self._num_packed = None if invariant else _packed_together()
        self._num_outputs = sum(piece.num_outputs for piece in pieces)

    @classmethod
    def make(cls, source: LinearSource, group_size: int, *, invariant: bool = False) -> Int4Linear:
        pieces = []
        codes_of = functools.partial(_codes, group_size=group_size)
        for codes in joined_codes(source, codes_of, _PACKED_WEIGHTS):
            pieces.append(_Piece(codes, group_size))
            source.on_bytes(pieces[-1].nbytes)
        bias = source.bias(torch.float32, torch.device("cpu"))
        return cls(pieces, bias, -source.num_inputs % group_size, invariant)

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self._bias is None else self._bias.nbytes
        return sum(piece.nbytes for piece in self._pieces) + bias_bytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self._num_outputs)
        num_packed = self._num_packed if x.shape[0] >= MANY_ROWS else None
        own = x.to(torch.bfloat16 if num_packed is None else torch.float32)
        if self._padding:
            own = torch.nn.functional.pad(own, (0, self._padding))
        own = own.contiguous()
        if num_packed is None:
            outputs = [piece.product(own) for piece in self._pieces]
        else:
            room = torch.empty(max(piece.num_weights for piece in self._pieces))
            outputs = [piece.wide_product(own, num_packed, room) for piece in self._pieces]
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


@functools.cache
def _packed_together() -> int | None:
    """B: half as many bytes for each input, output n beside n + B / 2. None where torch packs in
    another way, which is its own affair."""
    codes = torch.arange(2 * _OUTPUTS_MULTIPLE * 32, dtype=torch.int32).mul_(11) // 7 % 16
    codes = codes.view(2 * _OUTPUTS_MULTIPLE, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for num in (_OUTPUTS_MULTIPLE, _OUTPUTS_MULTIPLE // 2):
        pairs = packed.view(-1, 32, num // 2)
        found = torch.cat((pairs & 15, pairs >> 4), dim=2).transpose(1, 2)
        if linear_onednn.is_available() and torch.equal(found.reshape(codes.shape), codes.byte()):
            return num
    return None


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

"""Matrices that files hold quantised: compressed-tensors, GPTQ, AWQ, fp8; read in pieces.

    R rows (outputs) that are read, O outputs, I inputs, G groups of inputs, P codes in an int32

Codes of 4 bits come out as 0 to 15 with their zero points, codes of 8 bits as -128 to 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_worker.checkpoint import Checkpoint
from stage_worker.layout import Shape, stored_tensors
from stage_worker.weight_source import Codes, WeightSource
from stagemesh.errors import CheckpointError
from stagemesh.stored_format import StoredWeights

# Which of eight neighbours the i-th code of an int32 belongs to, as AWQ's kernel likes it.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def open_codes(files: Checkpoint, name: str, shape: Shape, way: StoredWeights) -> WeightSource:
    """The matrix `name`; errors as of `Checkpoint.view`."""
    tensors = {
        stored.rpartition(".")[2]: files.codes(stored, stored_shape)
        for stored, stored_shape in stored_tensors(name, shape, way).items()
    }
    if way.layout == "fp8":
        return Fp8Source(tensors, way)
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        raise CheckpointError(f"{name}: weight_shape is not the {list(shape)} of config.json")
    return _READERS[way.layout](tensors, shape, way)


class _CodeSource:
    """Reads `codes`, which its subclasses know how to find."""

    def __init__(self, tensors: dict[str, Tensor], shape: Shape, way: StoredWeights) -> None:
        self._tensors = tensors
        self._way = way
        self.shape = (shape[0], shape[1])
        self.bits = way.bits
        self.group_size: int | None = way.group_size or shape[1]

    def dense(self, start: int, end: int) -> Tensor:
        return self.codes(start, end).dense()[:, : self.shape[1]]

    def codes(self, start: int, end: int) -> Codes:
        raise NotImplementedError

    def _codes(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Codes:
        """Of unsigned values [R, I]; scales, zeros: [R, G]. Fills a last group that is not full."""
        assert self.group_size is not None
        if self.bits == 8:
            values, zeros = values - 128, zeros - 128
        padding = -values.shape[1] % self.group_size
        values = torch.nn.functional.pad(values, (0, padding))
        return Codes(
            values.to(torch.int8 if self.bits == 8 else torch.uint8), scales.float(), zeros.float()
        )


class IntSource(_CodeSource):
    """compressed-tensors' int-quantized: int8 [O, I], scales [O, G]."""

    def codes(self, start: int, end: int) -> Codes:
        scales = self._tensors["weight_scale"][start:end].float()
        return Codes(self._tensors["weight"][start:end], scales, torch.zeros_like(scales))


class PackedSource(_CodeSource):
    """compressed-tensors' pack-quantized: inputs packed, zero points packed along the outputs."""

    def codes(self, start: int, end: int) -> Codes:
        values = _unpack(self._tensors["weight_packed"][start:end], self.bits)
        scales = self._tensors["weight_scale"][start:end]
        if self._way.symmetric:
            zeros = torch.full(scales.shape, 2 ** (self.bits - 1), dtype=torch.int32)
        else:
            packed = self._tensors["weight_zero_point"]
            per_int = 32 // self.bits
            some = packed[start // per_int : -(-end // per_int)]
            first = start % per_int
            zeros = _unpack(some.t(), self.bits).t()[first : first + end - start]
        return self._codes(values[:, : self.shape[1]], scales, zeros)


class GptqSource(_CodeSource):
    """Inputs packed, zero points packed along the outputs, everything transposed."""

    def __init__(self, tensors: dict[str, Tensor], shape: Shape, way: StoredWeights) -> None:
        super().__init__(tensors, shape, way)
        size = way.group_size or shape[1]
        self._size = size
        ordered = torch.arange(shape[1], dtype=torch.int32) // size
        if not torch.equal(tensors["g_idx"].to(torch.int32), ordered):
            self.group_size = None  # a group is not a range of inputs

    def dense(self, start: int, end: int) -> Tensor:
        if self.group_size is not None:
            return super().dense(start, end)
        values, scales, zeros = self._read(start, end)
        group = self._tensors["g_idx"].long()
        return (values - zeros[:, group]) * scales.float()[:, group]

    def codes(self, start: int, end: int) -> Codes:
        values, scales, zeros = self._read(start, end)
        return self._codes(values, scales, zeros)

    def _read(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        values = _unpack(self._tensors["qweight"][:, start:end].t(), self.bits)
        zeros = _unpack(_ints_of(self._tensors["qzeros"], start, end, self.bits), self.bits)
        first = start % (32 // self.bits)
        zeros = zeros[:, first : first + end - start].t() + self._way.zero_offset
        # The offset wraps around within the bits of a zero point.
        return values, self._tensors["scales"][:, start:end].t(), zeros & (2**self.bits - 1)


class AwqSource(_CodeSource):
    """Outputs packed, eight neighbours in an order of their own."""

    def codes(self, start: int, end: int) -> Codes:
        first = start % 8
        values, zeros = (
            _awq_unpack(_ints_of(self._tensors[name], start, end, 4))[
                :, first : first + end - start
            ]
            for name in ("qweight", "qzeros")
        )
        return self._codes(values.t(), self._tensors["scales"][:, start:end].t(), zeros.t())


class Fp8Source:
    """float8 with a scale for each block, each output or the matrix: there is no kernel for it."""

    bits = 8
    group_size = None

    def __init__(self, tensors: dict[str, Tensor], way: StoredWeights) -> None:
        self._weight = tensors["weight"]
        self._scale = tensors[way.scale_name]
        self._block = way.block

    @property
    def shape(self) -> tuple[int, int]:
        return (self._weight.shape[0], self._weight.shape[1])

    def dense(self, start: int, end: int) -> Tensor:
        dense = self._weight[start:end].to(torch.float32)
        if self._block is None:
            scale = self._scale if len(self._scale) == 1 else self._scale[start:end]
            return dense.mul_(scale.float())
        num_outputs, num_inputs = self._block
        rows = torch.arange(start, end) // num_outputs
        columns = torch.arange(dense.shape[1]) // num_inputs
        return dense.mul_(self._scale.float()[rows][:, columns])

    def codes(self, start: int, end: int) -> Codes:
        raise AssertionError("floats are no codes")


_READERS: dict[str, type[_CodeSource]] = {
    "int": IntSource,
    "packed": PackedSource,
    "gptq": GptqSource,
    "awq": AwqSource,
}


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """[R, I / P] int32 -> [R, I], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)


def _awq_unpack(packed: Tensor) -> Tensor:
    """[I, R / 8] int32 -> [I, R]."""
    eights = _unpack(packed, 4).view(len(packed), -1, 8)
    return eights[:, :, torch.tensor(_AWQ_ORDER).argsort()].flatten(1)


def _ints_of(packed: Tensor, start: int, end: int, bits: int) -> Tensor:
    """Those columns that hold the codes of outputs [start, end)."""
    per_int = 32 // bits
    return packed[:, start // per_int : -(-end // per_int)]

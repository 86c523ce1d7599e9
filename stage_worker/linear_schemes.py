"""Which kind of linear layer a part of a model gets: one function of options, files and device.

A worker that replaces another one comes to the same choice, since options are compared when it
registers and files by their hashes. What is chosen, and why, is in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stage_worker import fbgemm, linear_int4, linear_int8, linear_onednn, mlas
from stage_worker.linear import Linear, LinearSource, PlainLinear
from stage_worker.linear_half import HalfLinear
from stage_worker.linear_int4 import Int4Linear
from stage_worker.linear_int8 import Int8Linear
from stage_worker.linear_onednn import OneDnnLinear, PackedLinear
from stage_worker.weight_source import WeightSource
from stagemesh.errors import ConfigError
from stagemesh.quantization import AS_STORED, AUTO, GROUP_SIZES, INT8, NONE, Quantization

# 16 bits a weight, float32 arithmetic: chosen for files of 16 bits, not by name.
_HALF = "half"
# Vector units with which packing float32 pays, and with which oneDNN pays without; others were not
# measured.
_PACKED = "AVX512"
_ONEDNN = "AVX2"


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a stage computes with. `invariant`: a row's bits must not depend on its batch."""

    dtype: torch.dtype
    device: torch.device
    quantization: Quantization = AS_STORED
    invariant: bool = False

    @property
    def is_cpu_float32(self) -> bool:
        return self.device.type == "cpu" and self.dtype == torch.float32


FLOAT32 = Numerics(torch.float32, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Scheme:
    """`held_bytes` is of a matrix (outputs, inputs), as far as it is known before it is read."""

    make: Callable[[LinearSource, Numerics], Linear]
    held_bytes: Callable[[int, int, Numerics], int]
    is_available: Callable[[], bool] = lambda: True


def choose_scheme(part: str, weights: Sequence[WeightSource], numerics: Numerics) -> Scheme:
    """For the layers of "layer.<i>" or "head" that are made of `weights`.

    Raises ConfigError where what was asked for cannot be had.
    """
    name = numerics.quantization.of_part(part)
    if name == AUTO:
        return _SCHEMES[_as_stored(weights, numerics)]
    if name != NONE and numerics.device.type != "cpu":
        raise ConfigError(f"quantization {name} needs device cpu")
    if not _SCHEMES[name].is_available():
        raise ConfigError(
            f"quantization {name}: nothing that is installed has a kernel for it on this processor"
        )
    return _SCHEMES[name]


def _as_stored(weights: Sequence[WeightSource], numerics: Numerics) -> str:
    if numerics.device.type != "cpu":
        return NONE
    if all(matrix.bits == 8 and matrix.group_size == matrix.shape[1] for matrix in weights):
        return _if_available(INT8)
    groups = {linear_int4.stored_group_size(matrix) for matrix in weights}
    if groups <= set(GROUP_SIZES):
        return _if_available(f"int4-g{min(size for size in groups if size)}")
    floats = all(matrix.bits == 16 and matrix.group_size is None for matrix in weights)
    if floats and numerics.is_cpu_float32 and not numerics.invariant:
        return _if_available(_HALF)
    return NONE


def _if_available(name: str) -> str:
    return name if _SCHEMES[name].is_available() else NONE


def make_float(source: LinearSource, numerics: Numerics) -> Linear:
    """As many bits a weight as are computed with."""
    kind: type[PlainLinear] = PlainLinear
    if numerics.is_cpu_float32 and linear_onednn.is_available():
        capability = torch.backends.cpu.get_cpu_capability()
        if numerics.invariant or capability.startswith(_PACKED):
            return PackedLinear.make(source)
        if capability == _ONEDNN:
            kind = OneDnnLinear
    return kind.make(source, numerics.dtype, numerics.device)


def _make_half(source: LinearSource, numerics: Numerics) -> Linear:
    return HalfLinear.make(source) or make_float(source, numerics)


def _int4(group_size: int) -> Scheme:
    return Scheme(
        lambda source, numerics: Int4Linear.make(source, group_size, invariant=numerics.invariant),
        lambda outputs, inputs, _: linear_int4.held_bytes(outputs, inputs, group_size),
        mlas.is_available,
    )


_SCHEMES: dict[str, Scheme] = {
    NONE: Scheme(
        make_float, lambda outputs, inputs, numerics: outputs * inputs * numerics.dtype.itemsize
    ),
    _HALF: Scheme(_make_half, lambda outputs, inputs, _: outputs * inputs * 2, fbgemm.is_available),
    INT8: Scheme(
        lambda source, _: Int8Linear.make(source),
        lambda outputs, inputs, _: linear_int8.held_bytes(outputs, inputs),
        fbgemm.is_available,
    ),
    **{f"int4-g{size}": _int4(size) for size in GROUP_SIZES},
}

"""Every kind of linear layer against a product in float64: all numbers of rows, and extremes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from stage_worker import fbgemm
from stage_worker.linear import Linear, LinearSource, PlainLinear
from stage_worker.linear_half import HalfLinear
from stage_worker.linear_int4 import Int4Linear
from stage_worker.linear_int4 import held_bytes as int4_bytes
from stage_worker.linear_int8 import Int8Linear
from stage_worker.linear_onednn import OneDnnLinear, PackedLinear, num_kernel_rows
from stage_worker.quantise import to_int4, to_int8
from stage_worker.weight_source import Codes, FloatSource

CPU = torch.device("cpu")
SHAPES = [((64,), 64), ((172, 100), 64), ((40, 24, 24), 172), ((7,), 100), ((300, 33), 96)]
ROWS = (0, 1, 2, 3, 6, 7, 14, 31, 64, 129)
needs_fbgemm = pytest.mark.skipif(not fbgemm.is_available(), reason="needs AVX2")


def ignore(num_bytes: int) -> None:
    pass


def half(source: LinearSource) -> Linear:
    made = HalfLinear.make(source)
    assert made is not None
    return made


# What makes a layer, what its weights are rounded to, and the error allowed against the largest
# result: that of the arithmetic alone, since it is compared with the same rounded weights.
KINDS: dict[str, tuple[Callable[[LinearSource], Linear], Callable[[Tensor], Tensor], float]] = {
    "plain": (lambda s: PlainLinear.make(s, torch.float32, CPU), lambda w: w, 1e-6),
    "onednn": (lambda s: OneDnnLinear.make(s, torch.float32, CPU), lambda w: w, 1e-6),
    "packed": (PackedLinear.make, lambda w: w, 1e-6),
    "half": (half, lambda w: w.half().float(), 3e-6),
    "int8": (Int8Linear.make, lambda w: to_int8(w).dense(), 0.02),
    "int4-g32": (
        lambda s: Int4Linear.make(s, 32),
        lambda w: to_int4(w, 32).dense()[:, : w.shape[1]],
        0.02,
    ),
    "int4-g128": (
        lambda s: Int4Linear.make(s, 128),
        lambda w: to_int4(w, 128).dense()[:, : w.shape[1]],
        0.02,
    ),
}


def source_of(
    outputs: tuple[int, ...],
    num_inputs: int,
    biased: bool,
    on_bytes: Callable[[int], None] = ignore,
) -> tuple[LinearSource, Tensor, Tensor]:
    """(source, its weight, its bias) with weights of bfloat16."""
    generator = torch.Generator().manual_seed(sum(outputs) + num_inputs)
    weights = [torch.randn(size, num_inputs, generator=generator).bfloat16() for size in outputs]
    biases = [torch.randn(size, generator=generator) for size in outputs]
    source = LinearSource([FloatSource(w) for w in weights], biases if biased else [], on_bytes)
    bias = torch.cat(biases) if biased else torch.zeros(sum(outputs))
    return source, torch.cat(weights).float(), bias


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str, outputs: tuple[int, ...], num_inputs: int, biased: bool) -> None:
    if kind in ("half", "int8") and not fbgemm.is_available():
        pytest.skip("needs AVX2")
    make, rounded, tolerance = KINDS[kind]
    told: list[int] = []
    source, weight, bias = source_of(outputs, num_inputs, biased, told.append)
    layer = make(source)
    assert sum(told) == layer.nbytes
    for num_rows in ROWS:
        x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(num_rows))
        expected = x.double() @ rounded(weight).double().t() + bias.double()
        got = layer(x)
        assert got.shape == expected.shape
        assert got.dtype == torch.float32
        if num_rows:
            error = (got.double() - expected).abs().max() / expected.abs().max()
            assert error < tolerance, f"{num_rows} rows"


@pytest.mark.parametrize("kind", ["packed", "int8", "int4-g32"])
def test_a_rows_bits_do_not_depend_on_its_batch(kind: str) -> None:
    if kind == "int8" and not fbgemm.is_available():
        pytest.skip("needs AVX2")
    source, _, _ = source_of((300, 33), 172, True)
    make = partial(Int4Linear.make, group_size=32, invariant=True)
    layer = make(source) if kind == "int4-g32" else KINDS[kind][0](source)
    x = torch.randn(256, 172) * torch.logspace(-3, 3, 256)[:, None]
    whole = layer(x)
    for size in (*range(1, 20), 33, 64, 100, 255):
        assert torch.equal(layer(x[-size:]), whole[-size:]), f"{size} rows"


@needs_fbgemm
@pytest.mark.parametrize("largest", [64, 127, -128])
def test_int8_sums_do_not_overflow(largest: int) -> None:
    """Extremes of both sides, which saturate 16 bits where a processor adds pairs in them."""
    codes = Codes(
        torch.full((64, 512), largest, dtype=torch.int8), torch.ones(64, 1), torch.zeros(64, 1)
    )
    layer = Int8Linear.make(LinearSource([StoredCodes(codes, 8, 512)], [], ignore))
    x = torch.stack([torch.ones(512), -torch.ones(512), torch.ones(512) * 1e-30])
    expected = x.double().sum(dim=1, keepdim=True) * largest
    assert torch.allclose(layer(x).double(), expected.expand(-1, 64), rtol=1e-6, atol=0)


class StoredCodes:
    """Codes of a file, for kernels that take them as they are."""

    def __init__(self, codes: Codes, bits: int, group_size: int) -> None:
        self._codes, self.bits, self.group_size = codes, bits, group_size

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self._codes.values), self._codes.values.shape[1])

    def codes(self, start: int, end: int) -> Codes:
        all_codes = self._codes
        return Codes(
            all_codes.values[start:end], all_codes.scales[start:end], all_codes.zeros[start:end]
        )

    def dense(self, start: int, end: int) -> Tensor:
        return self.codes(start, end).dense()


@needs_fbgemm
def test_int8_activations_have_a_scale_for_each_row() -> None:
    source, _, _ = source_of((64,), 64, False)
    layer = Int8Linear.make(source)
    x = torch.randn(2, 64)
    alone = layer(x[:1])
    x[1] *= 1e6
    assert torch.equal(layer(x)[:1], alone)
    zero = torch.zeros(1, 64)
    assert torch.equal(layer(zero), torch.zeros(1, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_spoils_itself_only(kind: str, value: float) -> None:
    if kind in ("half", "int8") and not fbgemm.is_available():
        pytest.skip("needs AVX2")
    source, _, _ = source_of((64, 30), 96, True)
    layer = KINDS[kind][0](source)
    x = torch.randn(9, 96)
    clean = layer(x)
    x[4, 7] = value
    spoilt = layer(x)
    assert not spoilt[4].isfinite().any()
    assert spoilt[:4].equal(clean[:4])
    assert spoilt[5:].equal(clean[5:])


@needs_fbgemm
def test_16_bits_hold_what_they_have() -> None:
    def fits(weight: Tensor) -> bool:
        return HalfLinear.make(LinearSource([FloatSource(weight)], [], ignore)) is not None

    trained = torch.randn(64, 512) * 0.02
    assert fits(trained.half())
    assert fits(trained.bfloat16())
    assert not fits(trained)
    assert not fits((trained * 1e-4).bfloat16())  # too small
    large = trained.bfloat16()
    large[3, 5] = 1e5
    assert not fits(large)
    zeros = trained.bfloat16()
    zeros[7] = 0
    assert fits(zeros)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_near_and_zero_stays_zero(group_size: int) -> None:
    weight = torch.randn(64, 256) * 0.1 + 0.03
    weight[3, 40:60] = 0
    weight[5] = 0
    codes = to_int4(weight, group_size)
    assert int(codes.values.max()) <= 15
    assert torch.equal(codes.zeros, codes.zeros.round())
    dense = codes.dense()
    assert torch.equal(dense[weight == 0], weight[weight == 0])
    steps = codes.scales.repeat_interleave(group_size, dim=1)
    assert bool(((dense - weight).abs() <= 0.7 * steps).all())
    layer = Int4Linear.make(LinearSource([FloatSource(weight)], [], ignore), group_size)
    assert layer.nbytes == int4_bytes(64, 256, group_size)


def test_layers_are_made_in_pieces() -> None:
    """Of more weights than are converted at a time."""
    source, weight, _ = source_of((2100, 200), 1024, False)
    assert len(list(source.pieces())) == 3
    x = torch.randn(3, 1024)
    got = PackedLinear.make(source)(x)
    assert torch.allclose(got, x @ weight.t(), atol=1e-3)


def test_onednn_meets_few_numbers_of_rows() -> None:
    """For each of them it keeps code, for as long as the process lives."""
    met = {num_rows: num_kernel_rows(num_rows) for num_rows in range(1, 2049)}
    assert all(num_rows <= padded for num_rows, padded in met.items())
    assert max(padded / num_rows for num_rows, padded in met.items() if num_rows > 16) < 2
    assert len(set(met.values())) <= 32

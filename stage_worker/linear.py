"""Linear layers: what all kinds of them have in common, and the plain one for any device and dtype.

    T tokens, I inputs, O outputs

A layer is made from one or more matrices, whose outputs lie side by side, a bounded number of
outputs at a time: making it never needs much more memory than it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from stage_worker.memory import trim_host
from stage_worker.weight_source import Codes, WeightSource

# Weights that are converted at a time: few against any stage worth splitting off, enough for a
# kernel to be called at its full speed.
PIECE_WEIGHTS = 2**21


class Linear(Protocol):
    @property
    def nbytes(self) -> int:
        """Memory that it keeps."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O], in the dtype of x."""
        ...


@dataclass(frozen=True, slots=True)
class LinearSource:
    """What a layer is made of. Either each of `weights` has a bias (a view of a file), or none.

    `on_bytes` is told of memory as it is filled.
    """

    weights: Sequence[WeightSource]
    biases: Sequence[Tensor]
    on_bytes: Callable[[int], None]

    @property
    def num_inputs(self) -> int:
        return self.weights[0].shape[1]

    @property
    def num_outputs(self) -> int:
        return sum(weight.shape[0] for weight in self.weights)

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """[O]"""
        if not self.biases:
            return None
        bias = torch.cat([part.to(dtype) for part in self.biases]).to(device)
        self.on_bytes(bias.nbytes)
        return bias

    def pieces(self) -> Iterator[tuple[WeightSource, int, int]]:
        """(matrix, start, end): its outputs in pieces of a bounded size, in order."""
        for weight in self.weights:
            num_outputs, num_inputs = weight.shape
            rows = rows_per_piece(num_inputs)
            for start in range(0, num_outputs, rows):
                yield weight, start, min(start + rows, num_outputs)

    def joined_pieces(self, room: int) -> Iterator[list[tuple[WeightSource, int, int]]]:
        """Pieces in order, as many together as have no more than `room` outputs."""
        joined: list[tuple[WeightSource, int, int]] = []
        filled = 0
        for matrix, start, end in self.pieces():
            if joined and filled + end - start > room:
                yield joined
                joined, filled = [], 0
            joined.append((matrix, start, end))
            filled += end - start
        yield joined

    def dense_pieces(self) -> Iterator[Tensor]:
        """The outputs in order, float32 [outputs, I], in pieces of a bounded size, small matrices
        together; each in memory that the next one overwrites: freed pieces between packed ones
        would leave holes."""
        room = min(rows_per_piece(self.num_inputs), self.num_outputs)
        wide = torch.empty(room, self.num_inputs)
        for joined in self.joined_pieces(room):
            filled = 0
            for matrix, start, end in joined:
                wide[filled : filled + end - start].copy_(matrix.dense(start, end))
                filled += end - start
            yield wide[:filled]
        del wide
        trim_host()


def joined_codes(
    source: LinearSource, codes_of: Callable[[WeightSource, int, int], Codes], num_weights: int
) -> Iterator[Codes]:
    """The source's outputs as `codes_of` gives them, of up to `num_weights` weights at a time and
    across its matrices; values in int8, in memory that the next ones overwrite.

    One place for all, and what conversion took is given back: what is kept between pieces that are
    freed would leave holes in memory, as much as a model of few layers holds.
    """
    num_inputs = source.num_inputs
    room = min(source.num_outputs, max(rows_per_piece(num_inputs), num_weights // num_inputs))
    values = torch.empty(0, dtype=torch.int8)
    for joined in source.joined_pieces(room):
        trim_host()
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        filled = 0
        for matrix, start, end in joined:
            codes = codes_of(matrix, start, end)
            if not len(values):  # as wide as codes are: the last group may have been filled up
                values = torch.empty(room, codes.values.shape[1], dtype=torch.int8)
            values[filled : filled + end - start].copy_(codes.values)
            scales.append(codes.scales)
            zeros.append(codes.zeros)
            filled += end - start
        trim_host()
        yield Codes(values[:filled], torch.cat(scales), torch.cat(zeros))


def rows_per_piece(num_inputs: int) -> int:
    """At least 64, in multiples of 64: what packed layouts group outputs by."""
    return max(64, PIECE_WEIGHTS // num_inputs // 64 * 64)


class PlainLinear:
    """One matrix, as torch multiplies by it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight  # [O, I]
        self.bias = bias

    @classmethod
    def make(cls, source: LinearSource, dtype: torch.dtype, device: torch.device) -> Self:
        shape = (source.num_outputs, source.num_inputs)
        weight = torch.empty(shape, dtype=dtype, device=device)
        filled = 0
        for matrix, start, end in source.pieces():
            piece = weight[filled : filled + end - start]
            piece.copy_(matrix.dense(start, end))
            source.on_bytes(piece.nbytes)
            filled += end - start
        return cls(weight, source.bias(dtype, device))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

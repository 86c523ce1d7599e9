"""A matrix of weights as its files have it, read some outputs (rows) at a time.

    R rows that are read, I inputs, G groups of inputs that share a scale and a zero point

Sources are backed by mapped files: what is read takes memory, what is not takes none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stage_worker.sharding import EVERYTHING, Part
from stagemesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Codes:
    """Quantised rows: weight = (value - zero) * scale, with the scale and the zero of its group.

    `values` [R, I] are integers; `scales` and `zeros` [R, G] float32, I a multiple of G.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor

    def dense(self) -> Tensor:
        """[R, I] float32."""
        num_rows, num_groups = self.scales.shape
        grouped = self.values.to(torch.float32).view(num_rows, num_groups, -1)
        grouped.sub_(self.zeros[..., None]).mul_(self.scales[..., None])
        return grouped.view(num_rows, -1)


class WeightSource(Protocol):
    """`bits` of its weights; `group_size` inputs share a scale, None where they are no codes."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        ...

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int | None: ...

    def dense(self, start: int, end: int) -> Tensor:
        """Rows [start, end) as floats: [R, I], not to be written to."""
        ...

    def codes(self, start: int, end: int) -> Codes:
        """Rows [start, end) as they are quantised; only where `group_size` is not None."""
        ...


class FloatSource:
    """A matrix of floats: a view of a file."""

    group_size = None

    def __init__(self, view: Tensor) -> None:
        self._view = view

    @property
    def shape(self) -> tuple[int, int]:
        return (self._view.shape[0], self._view.shape[1])

    @property
    def bits(self) -> int:
        return 8 * self._view.itemsize

    def dense(self, start: int, end: int) -> Tensor:
        rows = self._view[start:end]
        # Kernels take rows; some files have columns.
        return rows if rows.stride(1) == 1 else rows.contiguous()

    def codes(self, start: int, end: int) -> Codes:
        raise AssertionError("floats are no codes")


class _PartOfSource:
    """Some outputs and inputs of a matrix. Rows of codes are read whole and cut."""

    def __init__(self, whole: WeightSource, part: Part, name: str) -> None:
        num_outputs, num_inputs = whole.shape
        self._whole = whole
        self._first, end, _ = part.rows.indices(num_outputs)
        self._inputs = range(num_inputs)[part.columns]
        self.shape = (end - self._first, len(self._inputs))
        self.bits = whole.bits
        self.group_size = whole.group_size
        if whole.group_size == num_inputs:  # a scale for each output is one for any of its inputs
            self.group_size = len(self._inputs)
        elif whole.group_size is not None and self._inputs.start % whole.group_size:
            raise ConfigError(
                f"{name} has a scale for every {whole.group_size} inputs, which cannot be cut at "
                f"{self._inputs.start}: another --tensor-parallel, or none"
            )

    def dense(self, start: int, end: int) -> Tensor:
        rows = self._whole.dense(self._first + start, self._first + end)
        return rows[:, self._inputs.start : self._inputs.stop]

    def codes(self, start: int, end: int) -> Codes:
        codes = self._whole.codes(self._first + start, self._first + end)
        whole_size, size = self._whole.group_size, self.group_size
        assert whole_size is not None
        assert size is not None
        groups = slice(self._inputs.start // whole_size, -(-self._inputs.stop // whole_size))
        num_values = size * (groups.stop - groups.start)
        values = codes.values[:, self._inputs.start : self._inputs.start + num_values]
        return Codes(values, codes.scales[:, groups], codes.zeros[:, groups])


def part_of(whole: WeightSource, part: Part, name: str) -> WeightSource:
    """Raises ConfigError where its groups of inputs would be cut apart."""
    return whole if part == EVERYTHING else _PartOfSource(whole, part, name)

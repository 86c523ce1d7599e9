"""A matrix of weights as its files have it, read some outputs (rows) at a time.

    R rows that are read, I inputs, G groups of inputs that share a scale and a zero point

Sources are backed by mapped files: what is read takes memory, what is not takes none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
        return self._view[start:end]

    def codes(self, start: int, end: int) -> Codes:
        raise AssertionError("floats are no codes")

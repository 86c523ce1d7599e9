"""What the ranks of a worker do together: sums and exchanges of tensors, called where a layer needs
them.

Every rank calls the same operations in the same order, with tensors of the same shape and type. A
group of one costs nothing. An operation cannot be interrupted: whoever waits for a rank that does
not come is ended from outside (`stage_worker.watchdog`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """`rank` is this process's place among `size`."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """x becomes the sum of all ranks' x, of the same bits on each; returned for convenience."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' x, by rank."""
        ...

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """All ranks' x, by rank, on rank 0; None on the others."""
        ...


class Alone:
    """The group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x]

    def gather(self, x: Tensor) -> list[Tensor] | None:
        return [x]


ALONE = Alone()

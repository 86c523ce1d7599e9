"""Where a step's metadata lies in one array of 32-bit numbers, so that it is uploaded at once.

    T tokens; W items of lone queries per sliding window; P tiles of longer rows
    M entries of all rows' block tables, one after another

A graph reads its metadata from fixed places: its layout has a padded T, and as many items as it may
ever need. Sections begin at multiples of 16 bytes, whatever the sizes: Triton compiles kernels
anew for pointers of another alignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """What a forward pass reads on the device; the kernels say what each holds.

    positions, slots (-1: not written), offsets: [T]; tables: [M]; tiles: [P, 4];
    items: [W, 4] and firsts: [T] per window.
    """

    positions: Tensor
    slots: Tensor
    offsets: Tensor
    items: Mapping[int | None, Tensor]
    firsts: Mapping[int | None, Tensor]
    tiles: Tensor
    tables: Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    num_tokens: int
    num_items: int
    num_tiles: int
    windows: tuple[int | None, ...]

    @property
    def tables_at(self) -> int:
        """Entries before the block tables."""
        per_window = _aligned(self.num_tokens) + 4 * self.num_items
        tokens = 3 * _aligned(self.num_tokens)
        return tokens + len(self.windows) * per_window + 4 * self.num_tiles

    def views(self, array: Tensor) -> DeviceBatch:
        """The sections of [tables_at + M] numbers, on whatever device."""
        rest = array

        def take(count: int) -> Tensor:
            nonlocal rest
            taken, rest = rest[:count], rest[_aligned(count) :]
            return taken

        positions, slots, offsets = (take(self.num_tokens) for _ in range(3))
        items, firsts = {}, {}
        for window in self.windows:
            items[window] = take(4 * self.num_items).view(-1, 4)
            firsts[window] = take(self.num_tokens)
        tiles = take(4 * self.num_tiles).view(-1, 4)
        return DeviceBatch(positions, slots, offsets, items, firsts, tiles, rest)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT

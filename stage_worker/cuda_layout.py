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

    token_ids (used on the first stage), positions, slots (-1: not written), offsets: [T];
    tables: [M]; tiles: [P, 4]; items: [W, 4] and firsts: [T] per window.
    """

    token_ids: Tensor
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
    def token_ids_at(self) -> int:
        return 0

    @property
    def positions_at(self) -> int:
        return self._section

    @property
    def slots_at(self) -> int:
        return 2 * self._section

    @property
    def offsets_at(self) -> int:
        return 3 * self._section

    def items_at(self, index: int) -> int:
        """Of the window with that index; the first items of its rows come after them."""
        return 4 * self._section + index * (4 * self.num_items + self._section)

    def firsts_at(self, index: int) -> int:
        return self.items_at(index) + 4 * self.num_items

    @property
    def tiles_at(self) -> int:
        return self.items_at(len(self.windows))

    @property
    def tables_at(self) -> int:
        return self.tiles_at + 4 * self.num_tiles

    def views(self, array: Tensor) -> DeviceBatch:
        """The sections of [tables_at + M] numbers."""

        def section(start: int, count: int) -> Tensor:
            return array[start : start + count]

        items, firsts = {}, {}
        for i, window in enumerate(self.windows):
            items[window] = section(self.items_at(i), 4 * self.num_items).view(-1, 4)
            firsts[window] = section(self.firsts_at(i), self.num_tokens)
        return DeviceBatch(
            token_ids=section(self.token_ids_at, self.num_tokens),
            positions=section(self.positions_at, self.num_tokens),
            slots=section(self.slots_at, self.num_tokens),
            offsets=section(self.offsets_at, self.num_tokens),
            items=items,
            firsts=firsts,
            tiles=section(self.tiles_at, 4 * self.num_tiles).view(-1, 4),
            tables=array[self.tables_at :],
        )

    @property
    def _section(self) -> int:
        """Numbers that a section of T takes."""
        return -(-self.num_tokens // _ALIGNMENT) * _ALIGNMENT

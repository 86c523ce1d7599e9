"""What a pretend worker keeps: KV pages and the log of what it sent, and whose part is whose.

All of it begins as rubbish, and is rubbish again after a loss: who reads a page that was never
written, or never rebuilt, or is another pipeline's, computes wrong tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from simulation.pretend_model import mix

Value = int | None
# A layer's pages, or the log: a list of values per block.
Pages = list[list[Value]]
# Who wrote a slot, and which position: sequence, run, position.
Writer = tuple[int, int, int]
Slot = tuple[int, int]


class StageMemory:
    """One store for all pipelines. `settled`: slots whose writing was acknowledged, by (block,
    offset); nobody has reason to write the same there again."""

    def __init__(
        self, layers: range, *, num_blocks: int, num_log_blocks: int, block_size: int, salt: int
    ) -> None:
        self.layers = layers
        self.num_blocks = num_blocks
        self.num_log_blocks = num_log_blocks
        self.block_size = block_size
        self._salt = salt
        self.pages: dict[int, Pages] = {layer: [[]] * num_blocks for layer in layers}
        self.log: Pages = [[]] * num_log_blocks
        self.settled: dict[Slot, Writer] = {}
        self.spoil(range(num_blocks), range(num_log_blocks))

    def spoil(self, blocks: Iterable[int], log_blocks: Iterable[int]) -> None:
        """Nothing of what is there is worth anything."""
        self._salt = mix(17, self._salt)
        for block in blocks:
            for layer in self.layers:
                self.pages[layer][block] = self._rubbish(layer, block)
            for offset in range(self.block_size):
                self.settled.pop((block, offset), None)
        for block in log_blocks:
            self.log[block] = self._rubbish(-1, block)

    def _rubbish(self, layer: int, block: int) -> list[Value]:
        base = mix(16, self._salt, layer + 2)
        return [base ^ (block * self.block_size + i) for i in range(self.block_size)]


@dataclass(frozen=True, slots=True)
class MovedPages:
    """Copies, by the pipeline's block ids."""

    kv: dict[int, dict[int, list[Value]]]
    log: dict[int, list[Value]]
    settled: dict[Slot, Writer]


class MemoryPart:
    """A pipeline's blocks [0, num_blocks) in a store, from its start or from its end; those below
    `num_log_blocks` are logged, from the same end of the log."""

    def __init__(
        self, memory: StageMemory, num_blocks: int, num_log_blocks: int, *, from_end: bool
    ) -> None:
        self.num_blocks = num_blocks
        self.num_log_blocks = num_log_blocks
        self.settled = memory.settled
        self._memory = memory
        # Block i is block first + step * i of the store.
        self._step = -1 if from_end else 1
        self._first = memory.num_blocks - 1 if from_end else 0
        self._first_log = memory.num_log_blocks - 1 if from_end else 0

    @classmethod
    def whole(cls, memory: StageMemory) -> MemoryPart:
        return cls(memory, memory.num_blocks, memory.num_log_blocks, from_end=False)

    def slot(self, block_id: int, offset: int) -> Slot:
        """In the store."""
        return self._first + self._step * block_id, offset

    def write(self, layer: int, block_id: int, offset: int, value: Value) -> None:
        self._memory.pages[layer][self._first + self._step * block_id][offset] = value

    def read(self, layer: int, table: list[int], start: int, end: int) -> list[Value]:
        """Positions [start, end) of a sequence with this block table."""
        return self._read(self._memory.pages[layer], self._first, table, start, end)

    def write_log(self, block_id: int, offset: int, value: Value) -> None:
        if block_id < self.num_log_blocks:
            self._memory.log[self._first_log + self._step * block_id][offset] = value

    def read_log(self, table: list[int], start: int, end: int) -> list[Value]:
        return self._read(self._memory.log, self._first_log, table, start, end)

    def spoil(self) -> None:
        step = self._step
        self._memory.spoil(
            (self._first + step * block_id for block_id in range(self.num_blocks)),
            (self._first_log + step * block_id for block_id in range(self.num_log_blocks)),
        )

    def copy(self, block_ids: Iterable[int]) -> MovedPages:
        """As many of these blocks as there are."""
        size, pages = self._memory.block_size, self._memory.pages
        here = [block_id for block_id in block_ids if block_id < self.num_blocks]
        slots = {(b, offset): self.slot(b, offset) for b in here for offset in range(size)}
        return MovedPages(
            {b: {layer: list(pages[layer][self.slot(b, 0)[0]]) for layer in pages} for b in here},
            {b: self.read_log([b], 0, size) for b in here if b < self.num_log_blocks},
            {slot: self.settled[at] for slot, at in slots.items() if at in self.settled},
        )

    def take(self, moved: MovedPages, block_ids: Iterable[int]) -> bool:
        """Whether all of these blocks came, with their log where one is kept of them here."""
        for block_id, by_layer in moved.kv.items():
            for layer, values in by_layer.items():
                self._memory.pages[layer][self.slot(block_id, 0)[0]] = list(values)
        for block_id, values in moved.log.items():
            for offset, value in enumerate(values):
                self.write_log(block_id, offset, value)
        self.settled.update({self.slot(*slot): who for slot, who in moved.settled.items()})
        wanted = set(block_ids)
        logged = {block_id for block_id in wanted if block_id < self.num_log_blocks}
        return wanted <= moved.kv.keys() and logged <= moved.log.keys()

    def _read(self, pages: Pages, base: int, table: list[int], start: int, end: int) -> list[Value]:
        size, step = self._memory.block_size, self._step
        first = start // size
        values: list[Value] = []
        for block_id in table[first : -(-end // size)]:
            values += pages[base + step * block_id]
        return values[start - first * size : end - first * size]

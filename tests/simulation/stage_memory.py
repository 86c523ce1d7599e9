"""What a pretend stage keeps: KV pages and the log of what it sent, both by block id.

All of it begins as rubbish, and is rubbish again after a loss: who reads a page that was never
written, or never rebuilt, computes wrong tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from simulation.pretend_model import mix

Value = int | None
# A layer's pages, or the log: a list of values per block.
Pages = list[list[Value]]
# Who wrote a slot, and which position: sequence, run, position.
Writer = tuple[int, int, int]


class StageMemory:
    """`num_blocks` is what fits, which may be more than a pipeline uses. `settled`: slots whose
    writing was acknowledged, by (block, offset); nobody has reason to write the same there again.
    """

    def __init__(
        self, layers: range, *, num_blocks: int, num_log_blocks: int, block_size: int, salt: int
    ) -> None:
        self.layers = layers
        self.num_blocks = num_blocks
        self.num_log_blocks = num_log_blocks
        self.block_size = block_size
        self._salt = salt
        self.forget()

    def forget(self) -> None:
        self._salt = mix(17, self._salt)
        self.pages: dict[int, Pages] = {
            layer: self._rubbish(layer, self.num_blocks) for layer in self.layers
        }
        self.log: Pages = self._rubbish(-1, self.num_log_blocks)
        self.settled: dict[tuple[int, int], Writer] = {}

    def read(self, pages: Pages, table: list[int], start: int, end: int) -> list[Value]:
        """Positions [start, end) of a sequence with this block table."""
        size = self.block_size
        first = start // size
        values: list[Value] = []
        for block_id in table[first : -(-end // size)]:
            values += pages[block_id]
        return values[start - first * size : end - first * size]

    def fetch(self, source: StageMemory, block_ids: Iterable[int]) -> bool:
        """Takes these blocks over from another worker's memory. Returns whether all of them were
        there, and in its log where this one keeps a log of them."""
        wanted = set(block_ids)
        fetched = {block_id for block_id in wanted if block_id < source.num_blocks}
        for block_id in fetched:
            for layer in self.layers:
                self.pages[layer][block_id] = list(source.pages[layer][block_id])
            if block_id < min(self.num_log_blocks, source.num_log_blocks):
                self.log[block_id] = list(source.log[block_id])
        self.settled |= {slot: who for slot, who in source.settled.items() if slot[0] in fetched}
        lacking = {b for b in wanted if source.num_log_blocks <= b < self.num_log_blocks}
        return fetched == wanted and not lacking

    def _rubbish(self, layer: int, num_blocks: int) -> Pages:
        size = self.block_size
        base = mix(16, self._salt, layer + 2)
        return [[base ^ (block * size + i) for i in range(size)] for block in range(num_blocks)]

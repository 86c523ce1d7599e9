"""The log of what a stage sent to the next: hidden states in host memory, paged like the KV.

    N blocks, O offset in a block, E hidden size

A token's hidden states lie in the block of its KV (slot = block * block size + offset), so what is
true of a block's KV is true of its log: rows that come again overwrite it, and nothing is ever
freed. From it the stage after this one is rebuilt without computing this one again. Where the log
is shorter than the KV, some blocks are not logged. Memory is not touched before something is
written to it; what unused slots hold is arbitrary. Knows nothing of sequences, nor whose blocks
these are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_worker.memory import available_bytes

NOT_LOGGED = -1
"""In place of the slot of a token whose block is not logged."""

# Without a budget: this part of what the host has left, and never more than there are KV blocks.
_HOST_FRACTION = 0.25


class BoundaryLog:
    def __init__(
        self, num_blocks: int, block_size_tokens: int, hidden_size: int, dtype: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.pages = torch.empty(num_blocks, block_size_tokens, hidden_size, dtype=dtype)

    @property
    def block_bytes(self) -> int:
        return self.pages[:1].nbytes if self.num_blocks else 0

    def holds(self, slots: Tensor) -> bool:
        """Whether all of these slots are of blocks that are logged."""
        return not len(slots) or int(slots.min()) > NOT_LOGGED

    def write(self, slots: Tensor, hidden: Tensor) -> None:
        """slots: [T] on the CPU, hidden: [T, E]. What is not logged is left out."""
        if not self.num_blocks:
            return
        if not self.holds(slots):
            logged = (slots > NOT_LOGGED).nonzero().flatten()
            slots, hidden = slots[logged], hidden[logged]
        self.pages.flatten(0, 1).index_copy_(0, slots, hidden)

    def read(self, slots: Tensor) -> Tensor:
        """slots: [T], all of them logged -> [T, E]."""
        return self.pages.flatten(0, 1).index_select(0, slots)


def log_block_bytes(hidden_size: int, block_size_tokens: int, item_bytes: int) -> int:
    """Bytes of one block of the log."""
    return hidden_size * block_size_tokens * item_bytes


def choose_num_log_blocks(
    num_kv_blocks: int, bytes_per_block: int, max_log_memory_bytes: int | None
) -> int:
    """As many as the KV has, or as many as fit in the budget (0: none)."""
    budget = max_log_memory_bytes
    if budget is None:
        budget = int(available_bytes(torch.device("cpu")) * _HOST_FRACTION)
    return min(num_kv_blocks, budget // bytes_per_block)

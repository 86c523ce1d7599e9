"""What a rank of a worker must know to meet the others: its place, and what it shares with them."""

from __future__ import annotations

import json
import mmap
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stagemesh.errors import ConfigError

if TYPE_CHECKING:
    from stage_worker.collectives import Group
    from stage_worker.fetch_reports import FetchReports
    from stage_worker.load_watch import LoadProgress

TRANSPORTS = ("auto", "memory", "gloo")
SLOT_BYTES = 2**20
"""Of shared memory, for each rank, twice: larger tensors go in pieces."""
FLAG_BYTES = 64  # a cache line for each, whose first word is its flag; see also `rank_words`
FLAGS_BYTES = mmap.PAGESIZE
_WORD_BYTES = 8


def memory_bytes(size: int) -> int:
    """What `size` ranks share; pages that no message is large enough for are never touched."""
    assert size * FLAG_BYTES <= FLAGS_BYTES
    return FLAGS_BYTES + 2 * size * SLOT_BYTES


def rank_words(memory: mmap.mmap | None, size: int, index: int) -> memoryview[int]:
    """A word for each rank, of 64 bits: that of its line in the page which ranks share. None: of
    memory that nobody shares."""
    lines = memoryview(bytearray(FLAGS_BYTES) if memory is None else memory)[:FLAGS_BYTES]
    return lines.cast("q")[index :: FLAG_BYTES // _WORD_BYTES][:size]


@dataclass(frozen=True, slots=True)
class RankOptions:
    """`memory_fd`: of the file that is shared memory; `meeting_place`: gloo's. `link_fd` leads to
    rank 0, and `life_fd` says that it lives; `parent_pid` is its process."""

    rank: int
    size: int
    transport: str
    memory_fd: int
    meeting_place: str
    link_fd: int = -1
    life_fd: int = -1
    parent_pid: int = 0

    def of_rank(self, rank: int, link_fd: int, life_fd: int) -> RankOptions:
        return replace(self, rank=rank, link_fd=link_fd, life_fd=life_fd, parent_pid=os.getpid())

    @property
    def fds(self) -> tuple[int, ...]:
        return self.memory_fd, self.link_fd, self.life_fd

    def as_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> RankOptions:
        return cls(**json.loads(text))

    def open_group(self) -> Group:
        """On the thread that will compute; with gloo it waits for the other ranks to do it too."""
        if self.transport == "gloo":
            from stage_worker.gloo_group import GlooGroup

            return GlooGroup(Path(self.meeting_place), self.rank, self.size)
        from stage_worker.shared_memory_group import SharedMemoryGroup

        memory = mmap.mmap(self.memory_fd, memory_bytes(self.size))
        return SharedMemoryGroup(memory, self.rank, self.size)

    def open_load_progress(self) -> LoadProgress:
        """Of all ranks, whatever carries their sums."""
        from stage_worker.load_watch import LoadProgress

        return LoadProgress(self.size, mmap.mmap(self.memory_fd, FLAGS_BYTES))

    def open_fetch_reports(self) -> FetchReports:
        """As `open_load_progress`."""
        from stage_worker.fetch_reports import FetchReports

        return FetchReports(self.size, mmap.mmap(self.memory_fd, FLAGS_BYTES))


def shares_memory(transport: str) -> bool:
    """Whether ranks meet in shared memory; "auto": where the processor keeps the order of stores
    and loads that takes. Raises ConfigError."""
    if transport not in TRANSPORTS:
        raise ConfigError(f"--rank-transport must be one of {', '.join(TRANSPORTS)}")
    keeps_order = platform.machine().lower() in ("x86_64", "amd64")
    if transport == "memory" and not keeps_order:
        raise ConfigError(
            f"--rank-transport memory needs an x86 processor, not {platform.machine()}"
        )
    return transport != "gloo" and keeps_order and sys.platform != "win32"

"""The other ranks of a worker, as its process has them: started, watched, ended together.

They are children of the main thread, and the kernel ends them with it, whatever ended it. None
lives without the others: a collective cannot be interrupted, so whoever is left waits in it.
Without torch; what they are told is the business of `stage_worker.ranked_stage`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from stage_worker.forked_rank import ForkedRank
from stage_worker.rank_options import RankOptions, memory_bytes, shares_memory
from stagemesh.errors import PeerLost
from stagemesh.fork_server import was_forked

_END_TIMEOUT_S = 5.0
_MEMORY_DIR = "/dev/shm"


class RankProcesses:
    """Ranks 1 to `size` - 1, each a run of `module`, or forked where that is None. `links`: a
    socket to each. To be made on the main thread."""

    def __init__(
        self, size: int, transport: str = "auto", module: str | None = "stage_worker.rank"
    ) -> None:
        self.size = size
        self.links: list[socket.socket] = []
        self._lives: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes] | ForkedRank] = []
        # A file without a name, whose pages are memory; it goes with the last process that has it.
        in_memory = _MEMORY_DIR if os.path.isdir(_MEMORY_DIR) else None
        self._memory = tempfile.TemporaryFile(dir=in_memory)  # noqa: SIM115
        self._memory.truncate(memory_bytes(size))
        by_memory = shares_memory(transport)
        self._scratch = None if by_memory else tempfile.TemporaryDirectory(prefix="stagemesh-")
        self.own = RankOptions(
            rank=0,
            size=size,
            transport="memory" if by_memory else "gloo",
            memory_fd=self._memory.fileno(),
            meeting_place=str(Path(self._scratch.name, "gloo")) if self._scratch else "",
        )
        self.load_progress = self.own.open_load_progress()
        self.fetch_reports = self.own.open_fetch_reports()
        for rank in range(1, size):
            self._start(rank, module)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    async def lost(self) -> PeerLost:
        """Returns once a rank has ended."""
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[int] = loop.create_future()
        for rank, life in enumerate(self._lives, start=1):
            loop.add_reader(life, _resolve, gone, rank)
        try:
            rank = await gone
        finally:
            for life in self._lives:
                loop.remove_reader(life)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank - 1].wait(_END_TIMEOUT_S)
        code = self._processes[rank - 1].returncode
        return PeerLost(f"rank {rank} of {self.size} has ended, with {code}")

    def kill(self) -> None:
        """Ends all of them at once. They hold nothing that anybody would miss."""
        self.kill_processes()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)
        for link in (*self.links, *self._lives):
            link.close()
        self._memory.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def kill_processes(self) -> None:
        """From any thread; `lost` returns then."""
        for process in self._processes:
            process.kill()

    def _start(self, rank: int, module: str | None) -> None:
        link, their_link = socket.socketpair()
        life, their_life = socket.socketpair()
        options = self.own.of_rank(rank, their_link.fileno(), their_life.fileno())
        with their_link, their_life:
            self._processes.append(_executed(options, module) if module else ForkedRank(options))
        self.links.append(link)
        self._lives.append(life)


def start_ranks(size: int, transport: str) -> RankProcesses | None:
    """None for a worker of one rank. To be called before anything else is begun. Raises
    ConfigError."""
    if size == 1:
        return None
    return RankProcesses(size, transport, None if was_forked() else "stage_worker.rank")


def _executed(options: RankOptions, module: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, options.as_argument()],
        stdin=subprocess.DEVNULL,
        pass_fds=options.fds,
    )


def _resolve(gone: asyncio.Future[int], rank: int) -> None:
    if not gone.done():
        gone.set_result(rank)

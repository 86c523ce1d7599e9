"""Collectives by gloo, for hosts whose ranks cannot share memory as `shared_memory_group` wants it.

Waits are longer than any step may take: whoever is late is ended by the watchdog long before.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = datetime.timedelta(minutes=30)


class GlooGroup:
    """A `Group`. All ranks name the same `meeting_place`, a file that is not there yet."""

    def __init__(self, meeting_place: Path, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        # Ranks are of one host; what its name stands for may not be reachable.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        store = dist.FileStore(str(meeting_place), size)  # type: ignore[attr-defined]
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, _TIMEOUT)

    def all_reduce(self, x: Tensor) -> Tensor:
        whole = x.contiguous()
        self._group.allreduce([whole]).wait()
        return whole if whole is x else x.copy_(whole)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty(x.shape, dtype=x.dtype) for _ in range(self.size)]
        self._group.allgather([found], [x.contiguous()]).wait()
        return found

    def gather(self, x: Tensor) -> list[Tensor] | None:
        found = []
        if self.rank == 0:
            found = [torch.empty(x.shape, dtype=x.dtype) for _ in range(self.size)]
        options = dist.GatherOptions()
        options.rootRank = 0
        self._group.gather([found] if found else [], [x.contiguous()], options).wait()
        return found or None

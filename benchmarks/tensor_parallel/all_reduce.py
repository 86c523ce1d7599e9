"""Latency of an all-reduce, by transport, ranks and size. Ranks are processes of this host.

Run as a program it is one of the other ranks: they do what rank 0 does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from stage_worker.collectives import Group
from stage_worker.rank_options import RankOptions
from stage_worker.rank_processes import RankProcesses

SIZES_BYTES = (8 * 2**10, 32 * 2**10, 64 * 2**10, 256 * 2**10, 2**20)
_NUM_CALLS = 300
_NUM_WARM_UP = 30


@dataclass(frozen=True, slots=True)
class Latency:
    transport: str
    ranks: int
    size_bytes: int
    median_us: float
    p99_us: float


def measure(transports: Iterable[str], ranks: Iterable[int]) -> Iterator[Latency]:
    for transport in transports:
        for size in ranks:
            processes = RankProcesses(size, transport, __name__)
            try:
                group = processes.own.open_group()
                for size_bytes, times_s in timed(group):
                    yield Latency(
                        transport=transport,
                        ranks=size,
                        size_bytes=size_bytes,
                        median_us=1e6 * median(times_s),
                        p99_us=1e6 * quantiles(times_s, n=100)[-1],
                    )
            finally:
                processes.kill()


def timed(group: Group) -> Iterator[tuple[int, list[float]]]:
    for size_bytes in SIZES_BYTES:
        x = torch.zeros(size_bytes // 4)
        times_s = []
        for _ in range(_NUM_WARM_UP + _NUM_CALLS):
            started_s = time.perf_counter()
            group.all_reduce(x)
            times_s.append(time.perf_counter() - started_s)
        yield size_bytes, times_s[_NUM_WARM_UP:]


def main() -> None:
    torch.set_num_threads(1)
    for _ in timed(RankOptions.from_argument(sys.argv[1]).open_group()):
        pass


if __name__ == "__main__":
    main()

"""Collectives of ranks on one host through memory that they share.

    N ranks; two slots for each, in turn

An operation has a number. A rank puts its piece into its slot of that number's turn, and then the
number into its flag; what the others put there is whole once their flags say so. A rank may
overwrite a slot of operation n - 2 as soon as every flag has reached n - 1: nobody begins n - 1
before it has read all of n - 2. That takes processors which let no store be seen before an earlier
one, and no load before an earlier load: x86 is one. Sums are made by every rank for itself, in the
order of the ranks, so that all have the same bits.
"""

from __future__ import annotations

import mmap
import os
import time

import torch
from torch import Tensor

from stage_worker.rank_options import FLAG_BYTES, FLAGS_BYTES, SLOT_BYTES
from stagemesh.cores import num_cores

# Whoever waits looks again at once, then lets others run in between, then sleeps longer and longer:
# a rank that never comes must cost no processor time, by which the watchdog knows a hanging thread.
_SPINS = 400
_YIELDING_S = 0.005
_SLEEP_SHARE = 0.125  # of the time waited so far
_MIN_SLEEP_S = 0.00005
_MAX_SLEEP_S = 0.1
_MAX_VIEWS = 256


class SharedMemoryGroup:
    """A `Group`. `memory`: `memory_bytes(size)` of it, zero before any rank begins. `is_hasty`:
    whoever waits may use a core meanwhile."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, *, is_hasty: bool = True) -> None:
        self.rank = rank
        self.size = size
        self._memory = memory
        self._flags = memoryview(memory)[:FLAGS_BYTES].cast("q")
        self._flag_of = [other * FLAG_BYTES // 8 for other in range(size)]
        self._number = 0
        self._slots: dict[tuple[torch.dtype, int], list[list[Tensor]]] = {}
        self._num_spins = _SPINS if is_hasty and size <= num_cores() else 1
        self._yielding_s = _YIELDING_S if is_hasty else 0.0

    def all_reduce(self, x: Tensor) -> Tensor:
        whole = x.contiguous()
        for piece in _pieces(whole):
            put = self._exchange(piece)
            torch.add(put[0], put[1], out=piece)
            for other in put[2:]:
                piece += other
        return whole if whole is x else x.copy_(whole)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in self._flag_of]
        for piece, *targets in zip(
            _pieces(x.contiguous()), *(_pieces(one) for one in found), strict=True
        ):
            for target, put in zip(targets, self._exchange(piece), strict=True):
                target.copy_(put)
        return found

    def gather(self, x: Tensor) -> list[Tensor] | None:
        if self.rank == 0:
            return self.all_gather(x)
        for piece in _pieces(x.contiguous()):
            self._put(piece)
        return None

    def _exchange(self, piece: Tensor) -> list[Tensor]:
        """What all ranks put, by rank; it stays until this rank's next operation."""
        put = self._put(piece)
        self._await(self._number)
        return put

    def _put(self, piece: Tensor) -> list[Tensor]:
        self._await(self._number)
        self._number += 1
        slots = self._views(piece.dtype, piece.numel())[self._number % 2]
        slots[self.rank].copy_(piece)
        self._flags[self._flag_of[self.rank]] = self._number
        return slots

    def _await(self, number: int) -> None:
        """Until every rank has put as much."""
        flags = self._flags
        for flag in self._flag_of:
            if flags[flag] < number:
                self._wait(flag, number)

    def _wait(self, flag: int, number: int) -> None:
        flags = self._flags
        for _ in range(self._num_spins):
            if flags[flag] >= number:
                return
        started_s = time.perf_counter()
        while flags[flag] < number:
            waited_s = time.perf_counter() - started_s
            if waited_s < self._yielding_s:
                # Lets the other threads of this process have the interpreter, too.
                time.sleep(0)
                os.sched_yield()
            else:
                time.sleep(min(max(waited_s * _SLEEP_SHARE, _MIN_SLEEP_S), _MAX_SLEEP_S))

    def _views(self, dtype: torch.dtype, count: int) -> list[list[Tensor]]:
        """[turn][rank] of so many numbers; kept, since making them takes as long as a small sum."""
        found = self._slots.get((dtype, count))
        if found is None:
            slots = [
                torch.frombuffer(
                    self._memory,
                    dtype=dtype,
                    count=count,
                    offset=FLAGS_BYTES + index * SLOT_BYTES,
                )
                for index in range(2 * self.size)
            ]
            found = [slots[: self.size], slots[self.size :]]
            if len(self._slots) >= _MAX_VIEWS:
                self._slots.clear()
            self._slots[dtype, count] = found
        return found


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of a contiguous tensor that fit a slot, in order."""
    flat = x.view(-1)
    if flat.nbytes <= SLOT_BYTES:
        return (flat,) if len(flat) else ()
    return torch.split(flat, SLOT_BYTES // x.itemsize)

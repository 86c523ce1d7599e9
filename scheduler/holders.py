"""Whose KV the core counts on, stage by stage of one pipeline, and how much of it is left.

A holder is one load of one process. Its KV stays valid from epoch to epoch, also while it holds no
place, until it loads again, or another pipeline's epoch needs the memory. Knows nothing of epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.messages import LoadedSpan
from scheduler.stages import Room
from scheduler.workers import Worker


@dataclass(slots=True)
class _Holder:
    worker_id: str
    incarnation: int
    loaded: LoadedSpan | None
    from_end: bool
    # The pipeline's blocks below these were written by nobody else.
    num_blocks: int
    num_log_blocks: int

    def is_of(self, worker: Worker) -> bool:
        return self.is_process_of(worker) and self.loaded == worker.loaded

    def is_process_of(self, worker: Worker) -> bool:
        process = (worker.worker_id, worker.registration.incarnation)
        return (self.worker_id, self.incarnation) == process


class KvHolders:
    """`end_of` tells at which end of a worker's memory the pipeline's blocks are to lie.

    `is_counted_on` is false while the core does not know the pipeline: no KV counts.
    """

    def __init__(self, num_stages: int, end_of: Callable[[Worker], bool | None]) -> None:
        self.is_counted_on = False
        self._end_of = end_of
        self._room = Room()  # of the epoch that the core knows
        self._holders: list[_Holder | None] = [None] * num_stages

    def holds(self, stage: int, worker: Worker) -> bool:
        holder = self._holders[stage]
        if not self.is_counted_on or holder is None or not holder.is_of(worker):
            return False
        return self._end_of(worker) in (None, holder.from_end)

    def end_of_kv(self, stage: int, worker: Worker) -> bool | None:
        """At which end what the worker holds lies; None where it holds nothing."""
        holder = self._holders[stage]
        return holder.from_end if holder is not None and holder.is_of(worker) else None

    @property
    def are_gone(self) -> bool:
        """Whether nobody has anything left of what the core counts on."""
        return self.is_counted_on and not any(self._holders)

    def left_of(self, room: Room, workers: Sequence[Worker]) -> Room:
        """The part of `room` below which all is there yet of the KV that `workers` hold: members
        that keep it, or those from whom it is fetched.

        Where another pipeline's blocks were meanwhile the core may still count on its own: it gives
        those up in an epoch without them, before they are written anew in a later one.
        """
        num_blocks, logs = room.num_blocks, list(room.num_log_blocks)
        for stage, worker in enumerate(workers):
            holder = self._holders[stage]
            if holder is None or not self.holds(stage, worker):
                continue
            if holder.num_blocks < self._room.num_blocks:
                num_blocks = min(num_blocks, holder.num_blocks)
            if holder.num_log_blocks < self._room.num_log_blocks[stage]:
                logs[stage] = min(logs[stage], holder.num_log_blocks)
        return Room(num_blocks, tuple(min(num_blocks, num) for num in logs))

    def settle(self, workers: Sequence[Worker], room: Room) -> None:
        """All have joined: from now on the core counts on theirs."""
        self.is_counted_on = True
        self._room = room
        self._holders = [
            _Holder(
                worker.worker_id,
                worker.registration.incarnation,
                worker.loaded,
                bool(self._end_of(worker)),
                room.num_blocks,
                num_log_blocks,
            )
            for worker, num_log_blocks in zip(workers, room.num_log_blocks, strict=True)
        ]

    def overwritten(
        self, worker: Worker, from_end: bool, num_left: int, num_log_left: int, least_blocks: int
    ) -> None:
        """Another pipeline has the worker's memory from this end on, and so much is left of the
        other one. Less than `least_blocks` is worth nothing."""
        for stage, holder in enumerate(self._holders):
            if holder is None or not holder.is_process_of(worker):
                continue
            holder.num_blocks = min(holder.num_blocks, num_left)
            holder.num_log_blocks = min(holder.num_log_blocks, num_log_left)
            if holder.from_end == from_end or holder.num_blocks < least_blocks:
                self._holders[stage] = None

    def forget(self, worker: Worker) -> None:
        """The worker's process gives its KV up."""
        for stage, holder in enumerate(self._holders):
            if holder is not None and holder.is_process_of(worker):
                self._holders[stage] = None

    def forget_all(self) -> None:
        self.is_counted_on = False
        self._holders = [None] * len(self._holders)

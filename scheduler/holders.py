"""Whose KV the core counts on, stage by stage of one pipeline.

A holder is one load of one process. Its KV stays valid from epoch to epoch, also while it holds no
place, until it loads again or joins elsewhere. Knows nothing of epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.messages import LoadedSpan
from scheduler.workers import Worker


@dataclass(frozen=True, slots=True)
class _Holder:
    worker_id: str
    incarnation: int
    loaded: LoadedSpan | None

    @classmethod
    def of(cls, worker: Worker) -> _Holder:
        return cls(worker.worker_id, worker.registration.incarnation, worker.loaded)


class KvHolders:
    """`is_counted_on` is false while the core does not know the pipeline: no KV counts."""

    def __init__(self, num_stages: int) -> None:
        self.is_counted_on = False
        self._holders: list[_Holder | None] = [None] * num_stages

    def holds(self, stage: int, worker: Worker) -> bool:
        return self.is_counted_on and self._holders[stage] == _Holder.of(worker)

    @property
    def are_gone(self) -> bool:
        """Whether nobody has anything left of what the core counts on."""
        return self.is_counted_on and not any(self._holders)

    def settle(self, workers: Sequence[Worker]) -> None:
        """All have joined: from now on the core counts on theirs."""
        self.is_counted_on = True
        self._holders = [_Holder.of(worker) for worker in workers]

    def forget(self, worker: Worker) -> None:
        """The worker's process gives its KV up."""
        process = (worker.worker_id, worker.registration.incarnation)
        for stage, holder in enumerate(self._holders):
            if holder is not None and (holder.worker_id, holder.incarnation) == process:
                self._holders[stage] = None

    def forget_all(self) -> None:
        self.is_counted_on = False
        self._holders = [None] * len(self._holders)

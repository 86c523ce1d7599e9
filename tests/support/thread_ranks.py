"""A stage whose layers are split over ranks that are threads of this process."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from support.stages import Chain

from stage_worker.collectives import ALONE, Group
from stage_worker.executor import ExecutorConfig, StageExecutor, StageOutput
from stage_worker.executor_config import ExecutorFacts
from stage_worker.rank_options import memory_bytes
from stage_worker.shared_memory_group import SharedMemoryGroup
from stage_worker.tenancy import Joining
from stagemesh.plan import Step

T = TypeVar("T")


class ThreadRanks:
    """As much of a StageExecutor as a Chain needs."""

    def __init__(self, config: ExecutorConfig, size: int) -> None:
        memory = mmap.mmap(-1, memory_bytes(size))
        groups: list[Group] = [ALONE]
        if size > 1:
            groups = [SharedMemoryGroup(memory, rank, size, is_hasty=False) for rank in range(size)]
        self._threads = [ThreadPoolExecutor(1) for _ in groups]
        self.ranks = self._all(
            [
                lambda group=group: StageExecutor.load(config, lambda *_: None, group)
                for group in groups
            ]
        )

    @property
    def facts(self) -> ExecutorFacts:
        return self.ranks[0].facts

    @property
    def num_sequences(self) -> int:
        counts = {rank.num_sequences for rank in self.ranks}
        assert len(counts) == 1
        return counts.pop()

    def join(self, joining: Joining) -> None:
        for rank in self.ranks:
            rank.join(joining)

    def execute(self, step: Step, payload: Any, dtype: str) -> StageOutput:
        return self._all(
            [lambda rank=rank: rank.execute(step, payload, dtype) for rank in self.ranks]
        )[0]

    def end(self) -> None:
        for thread in self._threads:
            thread.shutdown()

    def _all(self, works: list[Callable[[], T]]) -> list[T]:
        done = [thread.submit(work) for thread, work in zip(self._threads, works, strict=True)]
        return [future.result(60) for future in done]


@contextmanager
def ranked_chain(model_dir: Path, sizes: Sequence[int], **options: Any) -> Iterator[Chain]:
    """A chain with so many ranks in each of its stages."""
    sizes_left = iter(sizes)
    made: list[ThreadRanks] = []

    def load(config: ExecutorConfig) -> Any:
        made.append(ThreadRanks(config, next(sizes_left)))
        return made[-1]

    try:
        yield Chain(model_dir, len(sizes), load=load, **options)
    finally:
        for ranks in made:
            ranks.end()

"""An epoch on its way: which stages have joined, with or without their KV, and how long to wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.stages import Room
from scheduler.workers import Worker


@dataclass(slots=True)
class Joining:
    num_stages: int
    deadline_ns: int = 0
    room: Room = field(default_factory=Room)
    # The scheduler's own stream to the first stage.
    is_stream_open: bool = False
    # Stages that joined, and whether they have their KV.
    stages: dict[int, bool] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return len(self.stages) == self.num_stages and self.is_stream_open

    @property
    def lost_stages(self) -> frozenset[int]:
        return frozenset(stage for stage, has_kv in self.stages.items() if not has_kv)


class Handovers:
    """Stages that move to other workers, and who has their KV until it is fetched.

    `release` is told of workers from which nothing is to be fetched any more.
    """

    def __init__(self, release: Callable[[Worker], None]) -> None:
        self._release = release
        self._sources: dict[int, Worker] = {}
        # Worth fetching, of one stage.
        self.num_blocks = 0

    def __bool__(self) -> bool:
        return bool(self._sources)

    @property
    def sources(self) -> dict[int, Worker]:
        return dict(self._sources)

    def begin(self, stage: int, source: Worker) -> None:
        self._sources[stage] = source

    def give_up(self, stage: int) -> None:
        if source := self._sources.pop(stage, None):
            self._release(source)

    def done(self) -> None:
        for stage in list(self._sources):
            self.give_up(stage)

    def address(self, stage: int) -> str:
        """Where the KV of the stage is to be fetched; empty for nowhere."""
        source = self._sources.get(stage)
        return source.registration.address if source and source.session is not None else ""

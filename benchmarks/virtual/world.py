"""Runs the core before fake stages in virtual time, and tells what came of a scenario."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from benchmarks.virtual.load import Arrival, Load, request_of
from benchmarks.virtual.stages import Cost, FakeStages
from scheduler.core import Finished, PipelineFacts, SchedulerCore, SchedulerLimits, Tokens
from stagemesh.plan import Epoch


@dataclass(frozen=True, slots=True)
class Scenario:
    """Shares and latencies are of the time from `warm_up_s` on."""

    name: str
    costs: tuple[Cost, ...]
    load: Load
    limits: SchedulerLimits
    hop_ns: int = 400_000
    num_blocks: int = 8192
    duration_s: float = 60.0
    warm_up_s: float = 10.0
    seed: int = 1


@dataclass(slots=True)
class Stream:
    arrived_ns: int
    tokens_ns: list[int] = field(default_factory=list)
    is_done: bool = False

    @property
    def gaps_ns(self) -> list[int]:
        return [b - a for a, b in zip(self.tokens_ns, self.tokens_ns[1:], strict=False)]


class World:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.stages = FakeStages(scenario.costs, scenario.hop_ns)
        self.streams: list[Stream] = []
        self.steps: list[tuple[int, int, int]] = []  # (sent, tokens, rows)
        self._core = SchedulerCore(scenario.limits)
        self._chance = random.Random(scenario.seed)
        self._coming: list[tuple[int, int, Arrival]] = []
        self._num_coming = 0

    def run(self) -> World:
        scenario, core = self.scenario, self._core
        core.add_pipeline(_facts(scenario), 0)
        for arrival in scenario.load.open_arrivals(scenario.duration_s, self._chance):
            self._come(arrival)
        end_ns = round(scenario.duration_s * 1e9)
        while (now_ns := self._next_ns()) is not None and now_ns < end_ns:
            while self._coming and self._coming[0][0] <= now_ns:
                self._submit(heapq.heappop(self._coming)[2], now_ns)
            while (at_ns := self.stages.next_result_ns) is not None and at_ns <= now_ns:
                core.on_result(self.stages.take_result(), now_ns)
            for step in core.schedule(now_ns):
                self.stages.send(step, now_ns)
                self.steps.append((now_ns, step.num_tokens, len(step.rows)))
            self._take_events(now_ns)
        return self

    def _next_ns(self) -> int | None:
        coming_ns = self._coming[0][0] if self._coming else None
        times = (coming_ns, self.stages.next_result_ns)
        return min((at for at in times if at is not None), default=None)

    def _come(self, arrival: Arrival) -> None:
        self._num_coming += 1
        heapq.heappush(self._coming, (arrival.at_ns, self._num_coming, arrival))

    def _submit(self, arrival: Arrival, now_ns: int) -> None:
        self._core.submit(request_of(len(self.streams), arrival), now_ns)
        self.streams.append(Stream(now_ns))

    def _take_events(self, now_ns: int) -> None:
        for event in self._core.take_events():
            stream = self.streams[event.key.request]
            if isinstance(event, Tokens):
                stream.tokens_ns += [now_ns] * len(event.tokens)
            elif isinstance(event, Finished):
                stream.is_done = True
                if self.scenario.load.closed:
                    self._come(self.scenario.load.draw(now_ns, self._chance))


def _facts(scenario: Scenario) -> PipelineFacts:
    return PipelineFacts(
        pipeline_id="p",
        epoch=Epoch(1, 1),
        num_stages=len(scenario.costs),
        num_blocks=scenario.num_blocks,
        block_size_tokens=16,
        max_model_len=16384,
        model_identity="model",
    )

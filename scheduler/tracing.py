"""Steps and rounds as somebody watches them: gathered for as long as that takes, and bounded.

What is not read in time is dropped and counted. While nobody watches, next to nothing is done. How
a trace is drawn is the business of whoever asked for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from protos import mesh_pb2
from stagemesh import wire, wire_steps
from stagemesh.plan import Epoch, Step, StepResult

MAX_WATCHERS = 4
MAX_UNREAD_EVENTS = 4096
_MAX_STEPS_SENT = 4096

_Key = tuple[str, Epoch, int]
Event = mesh_pb2.TraceStepsResponse


@dataclass(frozen=True, slots=True)
class _Sent:
    """`sent_ns` is of the scheduler's clock."""

    sent_ns: int
    num_rows: int
    num_tokens: int


class Watcher:
    """One who watches. `began_ns` is the zero of its times."""

    def __init__(self, began_ns: int) -> None:
        self.began_ns = began_ns
        self._events: deque[Event] = deque()
        self._num_dropped = 0
        self._wake = asyncio.Event()

    def tell(self, event: Event) -> None:
        """Never waits."""
        if len(self._events) >= MAX_UNREAD_EVENTS:
            self._num_dropped += 1
            return
        self._events.append(event)
        self._wake.set()

    async def events(self, duration_s: float) -> AsyncIterator[Event]:
        """What is told within this time, and at the end how much of it is missing."""
        until_s = time.monotonic() + duration_s
        while True:
            while self._events:
                yield self._events.popleft()
            if time.monotonic() >= until_s:
                break
            self._wake.clear()
            try:
                async with asyncio.timeout(until_s - time.monotonic()):
                    await self._wake.wait()
            except TimeoutError:
                pass
        if self._num_dropped:
            yield Event(num_dropped=self._num_dropped)


class Tracer:
    """The driver tells it of everything; times are of time.monotonic_ns."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        # Steps under way; those whose epoch ended are never answered and go for lack of room.
        self._sent: OrderedDict[_Key, _Sent] = OrderedDict()

    @property
    def is_watched(self) -> bool:
        return bool(self._watchers)

    @property
    def is_full(self) -> bool:
        """Whether no more may watch."""
        return len(self._watchers) >= MAX_WATCHERS

    def begin(self, now_ns: int) -> Watcher:
        watcher = Watcher(now_ns)
        self._watchers.add(watcher)
        return watcher

    def end(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def step_sent(self, step: Step, now_ns: int) -> None:
        """Always kept: a step that is under way when a trace begins is part of it."""
        key = step.pipeline_id, step.epoch, step.step
        self._sent[key] = _Sent(now_ns, len(step.rows), step.num_tokens)
        if len(self._sent) > _MAX_STEPS_SENT:
            self._sent.popitem(last=False)

    def step_done(self, result: StepResult, now_ns: int) -> None:
        sent = self._sent.pop((result.pipeline_id, result.epoch, result.step), None)
        if sent is None:
            return
        for watcher in self._watchers:
            step = mesh_pb2.TracedStep(
                pipeline_id=result.pipeline_id,
                epoch=wire.epoch_to_proto(result.epoch),
                step=result.step,
                sent_ns=sent.sent_ns - watcher.began_ns,
                done_ns=now_ns - watcher.began_ns,
                num_rows=sent.num_rows,
                num_tokens=sent.num_tokens,
                timings=[wire_steps.hop_timing_to_proto(timing) for timing in result.timings],
            )
            watcher.tell(Event(step=step))

    def round_done(
        self, start_ns: int, end_ns: int, num_steps: int, num_waiting: int, num_running: int
    ) -> None:
        for watcher in self._watchers:
            traced = mesh_pb2.TracedRound(
                start_ns=start_ns - watcher.began_ns,
                duration_ns=end_ns - start_ns,
                num_steps=num_steps,
                num_waiting=num_waiting,
                num_running=num_running,
            )
            watcher.tell(Event(round=traced))

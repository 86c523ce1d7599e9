"""Puts a load on a client: closed loops, and open ones that keep to their schedule.

Knows no protocol. Every request ends as a sample, failed ones too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from stagemesh.bench.client import Client, Delivery
from stagemesh.bench.samples import Sample
from stagemesh.bench.workload import Ask
from stagemesh.errors import StageMeshError


class Watch(Protocol):
    """Who is told what happens, as it happens."""

    def on_sent(self) -> None: ...
    def on_tokens(self, num: float) -> None: ...
    def on_ended(self, sample: Sample) -> None: ...


class Unwatched:
    def on_sent(self) -> None: ...
    def on_tokens(self, num: float) -> None: ...
    def on_ended(self, sample: Sample) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """`client_cpu_s`: processor time of this process while the load was on."""

    samples: list[Sample]
    client_cpu_s: float


async def closed_loop(
    client: Client, asks: Sequence[Ask], concurrency: int, watch: Watch
) -> Outcome:
    """`concurrency` requests under way until all were made. One is due when its place is free."""
    run = _Run(client, watch)
    waiting = iter([(ask, client.prepare(ask)) for ask in asks])

    async def place() -> None:
        for ask, prepared in waiting:
            await run.request(ask, prepared, run.now_s())

    run.begin()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(asks))):
            group.create_task(place())
    return run.outcome()


async def open_loop(
    client: Client, asks: Sequence[Ask], arrivals_s: Sequence[float], watch: Watch
) -> Outcome:
    """Each request at its time, whatever has become of those before."""
    run = _Run(client, watch)
    due: Iterator[tuple[float, Ask, Any]] = iter(
        [
            (arrival_s, ask, client.prepare(ask))
            for arrival_s, ask in zip(arrivals_s, asks, strict=True)
        ]
    )
    run.begin()
    async with asyncio.TaskGroup() as group:
        for arrival_s, ask, prepared in due:
            await asyncio.sleep(arrival_s - run.now_s())
            group.create_task(run.request(ask, prepared, arrival_s))
    return run.outcome()


class _Run:
    """The samples of one load, on one clock."""

    def __init__(self, client: Client, watch: Watch) -> None:
        self.samples: list[Sample] = []
        self._client = client
        self._watch = watch
        self._start_s = self._start_cpu_s = 0.0

    def begin(self) -> None:
        self._start_s, self._start_cpu_s = time.perf_counter(), time.process_time()

    def outcome(self) -> Outcome:
        return Outcome(self.samples, time.process_time() - self._start_cpu_s)

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def request(self, ask: Ask, prepared: Any, due_s: float) -> None:
        sample = Sample(ask, due_s, sent_s=self.now_s())
        self.samples.append(sample)
        self._watch.on_sent()
        try:
            await self._read(prepared, sample)
        except StageMeshError as error:
            sample.error = f"{error.code}: {error.message}"
        sample.ended_s = self.now_s()
        self._watch.on_ended(sample)

    async def _read(self, prepared: Any, sample: Sample) -> None:
        """Fills the sample; leaves early where it is to be cancelled."""
        leave_after = sample.ask.cancel_after_tokens
        async with aclosing(self._client.stream(prepared)) as stream:
            async for news in stream:
                if not isinstance(news, Delivery):
                    sample.take_usage(
                        news.prompt_tokens, news.output_tokens, news.cached_prompt_tokens
                    )
                    continue
                num_tokens = 1 if news.num_tokens is None else news.num_tokens
                sample.deliveries.append((self.now_s(), num_tokens))
                sample.output_tokens += num_tokens
                self._watch.on_tokens(num_tokens)
                if leave_after is not None and sample.output_tokens >= leave_after:
                    sample.cancelled = True
                    return
        if sample.output_tokens == 0:
            sample.error = "empty: no token came"

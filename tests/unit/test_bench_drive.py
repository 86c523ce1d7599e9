"""Loads on a client that does what it is told: how many are under way, when each is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from stagemesh.bench.client import Delivery, News, Served, Usage
from stagemesh.bench.drive import Unwatched, closed_loop, open_loop
from stagemesh.bench.samples import Sample
from stagemesh.bench.workload import Ask
from stagemesh.errors import PeerLost


class PretendClient:
    """Gives as many tokens as were asked for, one a turn of the loop; `before` runs first."""

    def __init__(self, before: Callable[[Ask], Any] = lambda ask: asyncio.sleep(0)) -> None:
        self.served = Served("pretend", 0)
        self.under_way = 0
        self.most_under_way = 0
        self.num_closed = 0
        self._before = before

    def prepare(self, ask: Ask) -> Ask:
        return ask

    async def stream(self, prepared: Ask) -> AsyncGenerator[News, None]:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self._before(prepared)
            for _ in range(prepared.output_tokens):
                await asyncio.sleep(0)
                yield Delivery(1)
            yield Usage(prepared.prompt_tokens, prepared.output_tokens, 0)
        finally:
            self.under_way -= 1
            self.num_closed += 1


class Counting:
    def __init__(self) -> None:
        self.sent = 0
        self.tokens = 0.0
        self.ended: list[Sample] = []

    def on_sent(self) -> None:
        self.sent += 1

    def on_tokens(self, num: float) -> None:
        self.tokens += num

    def on_ended(self, sample: Sample) -> None:
        self.ended.append(sample)


def asks(num: int, **fields: Any) -> list[Ask]:
    return [Ask(4, 3, seed, **fields) for seed in range(num)]


async def test_a_closed_loop_keeps_its_places_busy_and_never_more() -> None:
    client, watch = PretendClient(), Counting()
    outcome = await closed_loop(client, asks(20), 4, watch)
    assert client.most_under_way == 4
    assert sorted(sample.ask.seed for sample in outcome.samples) == list(range(20))
    assert all(sample.output_tokens == 3 and sample.is_whole for sample in outcome.samples)
    assert all(sample.sent_s >= sample.due_s for sample in outcome.samples)
    assert (watch.sent, watch.tokens, len(watch.ended)) == (20, 60, 20)
    assert outcome.client_cpu_s > 0


async def test_a_closed_loop_of_fewer_requests_than_places() -> None:
    client = PretendClient()
    assert len((await closed_loop(client, asks(2), 8, Unwatched())).samples) == 2
    assert client.most_under_way == 2


async def test_an_open_loop_sends_while_earlier_requests_hang() -> None:
    all_sent = asyncio.Event()

    class Watch(Counting):
        def on_sent(self) -> None:
            super().on_sent()
            if self.sent == 5:
                all_sent.set()

    client = PretendClient(before=lambda ask: all_sent.wait())
    outcome = await open_loop(client, asks(5), [0.0, 0.001, 0.002, 0.003, 0.004], Watch())
    assert client.most_under_way == 5
    assert [sample.due_s for sample in outcome.samples] == [0.0, 0.001, 0.002, 0.003, 0.004]
    # What a request waited for the others is in its latency.
    last_sent_s = max(sample.sent_s for sample in outcome.samples)
    assert all((sample.ttft_s or 0) >= last_sent_s - sample.due_s for sample in outcome.samples)


async def test_a_request_that_fails_is_a_sample_and_the_load_goes_on() -> None:
    async def fail_some(ask: Ask) -> None:
        if ask.seed % 2:
            raise PeerLost("gone")

    outcome = await closed_loop(PretendClient(fail_some), asks(6), 2, Unwatched())
    errors = {sample.ask.seed: sample.error for sample in outcome.samples}
    assert errors == {seed: "peer_lost: gone" if seed % 2 else None for seed in range(6)}


async def test_an_answer_without_tokens_has_failed() -> None:
    outcome = await closed_loop(PretendClient(), [Ask(4, 0, 1)], 1, Unwatched())
    assert (outcome.samples[0].error or "").startswith("empty")


async def test_who_is_to_leave_early_leaves_and_closes_the_stream() -> None:
    client = PretendClient()
    outcome = await closed_loop(client, asks(3, cancel_after_tokens=2), 3, Unwatched())
    assert all(sample.cancelled and sample.output_tokens == 2 for sample in outcome.samples)
    assert all(sample.e2e_s is None and not sample.is_whole for sample in outcome.samples)
    assert client.num_closed == 3


async def test_a_bug_in_a_client_is_not_taken_for_a_failed_request() -> None:
    def broken(ask: Ask) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await closed_loop(PretendClient(broken), asks(1), 1, Unwatched())

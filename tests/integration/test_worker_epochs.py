"""Two real workers under a scripted scheduler: steps in order, epochs that end and begin."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.paths import DEMO_MODEL
from support.stages import Chain, Live, Wish
from support.worker_links import (
    LinkScheduler,
    WorkerLink,
    link_scheduler,
    push_to,
    worker_process,
)

from protos import mesh_pb2
from stagemesh.errors import ProtocolError, StaleEpoch, StepOutOfOrder
from stagemesh.frames import StepFrame
from stagemesh.plan import Epoch, Row, SequenceRun, Step, StepResult
from stagemesh.rpc import make_channel
from stagemesh.transport import SERVICE_NAME, Hello, PushStream, open_push_stream
from stagemesh.wire import epoch_to_proto

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_BLOCKS = 32
SPANS = ((0, 3), (3, 6))
PROMPTS = ([0, 31, 57, 200], [0, 999, 5, 77, 1500, 42, 8])


@dataclass
class Pair:
    """Two workers that hold the whole model."""

    scheduler: LinkScheduler
    links: list[WorkerLink]
    epochs: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def begin(self, *, keep_kv: bool = False) -> tuple[Epoch, PushStream]:
        epoch = Epoch(1, next(self.epochs))
        await self.scheduler.form(self.links, epoch, keep_kv=keep_kv)
        return epoch, await push_to(self.links[0], epoch)

    async def end(self, epoch: Epoch, stream: PushStream) -> None:
        for link in self.links:
            link.leave(epoch)
        await stream.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair() -> AsyncIterator[Pair]:
    flags = ("--block-size", "8")
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address, "--worker-id", "w0", *flags),
        worker_process(DEMO_MODEL, scheduler.address, "--worker-id", "w1", *flags),
    ):
        links = sorted(
            [await scheduler.worker() for _ in SPANS], key=lambda link: link.registration.worker_id
        )
        for link, span in zip(links, SPANS, strict=True):
            loaded = await link.load(*span)
            assert loaded.num_blocks == NUM_BLOCKS
        yield Pair(scheduler, links)


def lives() -> list[Live]:
    wishes = [Wish(prompt=prompt, max_tokens=6) for prompt in PROMPTS]
    return [
        Live(1 + i, wish, tuple(range(4 * i, 4 * i + 4)), list(wish.prompt))
        for i, wish in enumerate(wishes)
    ]


def reference() -> list[list[int]]:
    wishes = [Wish(prompt=prompt, max_tokens=6) for prompt in PROMPTS]
    return [live.tokens for live in Chain(DEMO_MODEL, 1, num_blocks=NUM_BLOCKS).run(wishes)]


def step_of(epoch: Epoch, number: int, rows: list[Row]) -> StepFrame:
    return StepFrame(Step("p", epoch, number, tuple(rows)))


async def run_step(
    pair: Pair, epoch: Epoch, stream: PushStream, number: int, alive: list[Live]
) -> StepResult:
    rows = [live.row(2, None) for live in alive]
    await stream.send(step_of(epoch, number, rows))
    result = await pair.scheduler.result()
    assert (result.epoch, result.step) == (epoch, number)
    for live, row, row_result in zip(alive, rows, result.rows, strict=True):
        live.take(row, row_result)
    return result


async def run_steps(
    pair: Pair, epoch: Epoch, stream: PushStream, alive: list[Live], num_steps: int, first: int = 0
) -> list[StepResult]:
    return [
        await run_step(pair, epoch, stream, number, alive)
        for number in range(first, first + num_steps)
    ]


async def test_two_workers_give_the_tokens_of_one_process(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    alive = lives()
    results = await run_steps(pair, epoch, stream, alive, 6)
    assert [live.tokens for live in alive] == reference()
    for result in results:
        assert [timing.stage for timing in result.timings] == [0, 1]
        assert all(timing.compute_ns > 0 for timing in result.timings)
        assert all(timing.serialise_ns > 0 for timing in result.timings)
        assert result.timings[0].received_bytes == 0
        assert result.timings[1].received_bytes == 4 * 256 * (11 if result.step == 0 else 2)
    await pair.end(epoch, stream)


async def test_each_stage_sends_one_message_a_step(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    before = [await link.next_stats() for link in pair.links]
    await run_steps(pair, epoch, stream, lives(), 5)
    after = [await link.next_stats() for link in pair.links]
    for old, new in zip(before, after, strict=True):
        assert new.messages_sent - old.messages_sent == 5
        assert new.steps_executed - old.steps_executed == 5
        assert new.rows_executed - old.rows_executed == 10
        assert new.sequences_held == 2
        assert new.rss_anon_bytes > 0
    await pair.end(epoch, stream)


async def test_steps_in_flight_are_executed_in_order(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    alive = lives()
    await run_step(pair, epoch, stream, 0, alive)
    for number in range(1, 9):
        await stream.send(step_of(epoch, number, []))
    results = [await pair.scheduler.result() for _ in range(1, 9)]
    assert [result.step for result in results] == list(range(1, 9))
    await run_step(pair, epoch, stream, 9, alive)
    assert [live.tokens for live in alive] == [tokens[:-4] for tokens in reference()]
    await pair.end(epoch, stream)


@pytest.mark.parametrize("number", [0, 2], ids=["duplicate", "gap"])
async def test_a_step_out_of_order_ends_the_epoch(pair: Pair, number: int) -> None:
    epoch, stream = await pair.begin()
    await run_step(pair, epoch, stream, 0, lives())
    await stream.send(step_of(epoch, number, []))
    broken = await pair.links[0].expect("epoch_broken")
    assert broken.error.code == "step_out_of_order"
    assert isinstance(await stream.wait_broken(), StepOutOfOrder)
    neighbour = await pair.links[1].expect("epoch_broken")
    assert neighbour.peer_address == pair.links[0].address
    await pair.end(epoch, stream)


async def test_a_step_that_cannot_be_executed_ends_the_epoch_not_the_worker(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    row = lives()[0].row(2, None)
    await stream.send(step_of(epoch, 0, []))
    await pair.scheduler.result()
    bad = Live(9, Wish(prompt=[1, 2, 3]), (NUM_BLOCKS + 7,), [1, 2, 3]).row(2, None)
    await stream.send(step_of(epoch, 1, [bad]))
    await stream.send(step_of(epoch, 2, [row]))
    broken = await pair.links[0].expect("epoch_broken")
    assert broken.error.code == "protocol"
    assert "step 1" in broken.error.message
    assert (await pair.links[1].expect("epoch_broken")).peer_address == pair.links[0].address
    await pair.end(epoch, stream)
    epoch, stream = await pair.begin()
    alive = lives()
    await run_steps(pair, epoch, stream, alive, 6)
    assert [live.tokens for live in alive] == reference()
    assert pair.scheduler.results.empty()
    await pair.end(epoch, stream)


async def test_the_next_epoch_goes_on_with_the_kv_of_the_one_before(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    alive = lives()
    await run_steps(pair, epoch, stream, alive, 3)
    await pair.end(epoch, stream)
    epoch, stream = await pair.begin(keep_kv=True)
    for live in alive:
        live.first = True  # a sequence's first row in an epoch carries its state
    await run_steps(pair, epoch, stream, alive, 3)
    assert [live.tokens for live in alive] == reference()
    await pair.end(epoch, stream)


async def test_kv_that_is_not_claimed_is_forgotten(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    alive = lives()
    await run_steps(pair, epoch, stream, alive, 2)
    await pair.end(epoch, stream)
    epoch, stream = await pair.begin(keep_kv=False)
    await stream.send(step_of(epoch, 0, [live.row(2, None) for live in alive]))
    broken = await pair.links[0].expect("epoch_broken")
    assert broken.error.code == "protocol"
    await pair.links[1].expect("epoch_broken")
    await pair.end(epoch, stream)


async def test_kv_that_is_not_held_cannot_be_kept(pair: Pair) -> None:
    """Of a pipeline that was never joined, or of layers that were loaded since."""
    epoch, stream = await pair.begin()
    await run_steps(pair, epoch, stream, lives(), 1)
    await pair.end(epoch, stream)
    other = mesh_pb2.JoinEpoch(pipeline_id="q", epoch=epoch_to_proto(Epoch(1, 9999)), keep_kv=True)
    pair.links[0].command(join_epoch=other)
    broken = await pair.links[0].expect("epoch_broken")
    assert (broken.pipeline_id, broken.error.code) == ("q", "protocol")
    await pair.links[1].load(*SPANS[1])
    pair.links[1].join(Epoch(1, next(pair.epochs)), 1, 2, pair.scheduler.address, keep_kv=True)
    broken = await pair.links[1].expect("epoch_broken")
    assert "no KV of p" in broken.error.message


async def test_streams_of_epochs_that_are_over_are_refused(pair: Pair) -> None:
    old, stream = await pair.begin()
    await pair.end(old, stream)
    new, stream = await pair.begin()
    for epoch in (old, Epoch(0, 99)):
        with pytest.raises(StaleEpoch):
            await push_to(pair.links[0], epoch)
    with pytest.raises(ProtocolError, match="already"):
        await push_to(pair.links[0], new)
    await run_steps(pair, new, stream, lives(), 1)
    await pair.end(new, stream)


async def test_steps_of_an_epoch_that_was_left_are_refused(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    for link in pair.links:
        link.leave(epoch)
    with pytest.raises(StaleEpoch):
        await send_for_ever(stream, epoch)
    await stream.close()
    while not pair.scheduler.results.empty():
        pair.scheduler.results.get_nowait()


async def send_for_ever(stream: PushStream, epoch: Epoch) -> None:
    for number in itertools.count():
        await stream.send(step_of(epoch, number, []))


async def test_joining_an_epoch_that_is_not_newer_is_refused(pair: Pair) -> None:
    skipped = next(pair.epochs)
    epoch, stream = await pair.begin()
    pair.links[0].join(Epoch(1, skipped), 0, 2, pair.links[1].address)
    broken = await pair.links[0].expect("epoch_broken")
    assert broken.error.code == "stale_epoch"
    assert broken.epoch.n == skipped
    await run_steps(pair, epoch, stream, lives(), 2)
    await pair.end(epoch, stream)


async def test_a_neighbour_that_joins_late_is_waited_for(pair: Pair) -> None:
    epoch = Epoch(1, next(pair.epochs))
    pair.links[0].join(epoch, 0, 2, pair.links[1].address)
    early = asyncio.create_task(push_to(pair.links[0], epoch))
    stream = await early
    assert pair.links[0].messages.empty()
    pair.links[1].join(epoch, 1, 2, pair.scheduler.address)
    for link in pair.links:
        await link.expect("epoch_joined")
    await run_steps(pair, epoch, stream, lives(), 1)
    await pair.end(epoch, stream)


async def test_a_hello_to_another_stage_is_refused(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    with pytest.raises(ProtocolError, match="stage 1 came to stage 0"):
        await open_push_stream(pair.links[0].address, Hello("p", epoch, 1, "x"), timeout_s=10)
    await pair.end(epoch, stream)


async def test_a_next_stage_that_cannot_be_reached_is_named(pair: Pair) -> None:
    epoch = Epoch(1, next(pair.epochs))
    pair.links[0].join(epoch, 0, 2, "127.0.0.1:1")
    broken = await pair.links[0].expect("epoch_broken")
    assert broken.error.code == "peer_lost"
    assert broken.peer_address == "127.0.0.1:1"


async def test_forgetting_frees_what_a_worker_keeps_of_a_sequence(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    await run_steps(pair, epoch, stream, lives(), 1)
    step = Step("p", epoch, 1, (), (SequenceRun(1, 0), SequenceRun(2, 0)))
    await stream.send(StepFrame(step))
    await pair.scheduler.result()
    assert (await pair.links[1].next_stats()).sequences_held == 0
    await pair.end(epoch, stream)


async def test_health_tells_of_the_epoch(pair: Pair) -> None:
    epoch, stream = await pair.begin()
    async with make_channel(pair.links[1].address) as channel:
        assert await is_serving(channel, "")
        assert await is_serving(channel, SERVICE_NAME)
        await pair.end(epoch, stream)
        async with asyncio.timeout(60):
            while await is_serving(channel, SERVICE_NAME):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await is_serving(channel, "")


async def is_serving(channel: grpc.aio.Channel, service: str) -> bool:
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

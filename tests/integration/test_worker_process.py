"""A worker process from its start to its end: registering, loading, losing others, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.paths import DEMO_MODEL
from support.stages import Chain, Live, Wish
from support.worker_links import (
    LinkScheduler,
    WorkerLink,
    link_scheduler,
    local_worker,
    push_to,
    worker_process,
)

from protos import mesh_pb2
from stagemesh.errors import MeshUnavailable
from stagemesh.frames import StepFrame
from stagemesh.plan import Epoch, Row, Span, Step, StepResult
from stagemesh.rpc import make_channel
from stagemesh.transport import PushStream
from stagemesh.wire import span_from_proto

NUM_LAYERS = 6
NUM_BLOCKS = 32
WISH = Wish(prompt=[0, 31, 57, 200], max_tokens=6)


async def step(
    scheduler: LinkScheduler, stream: PushStream, epoch: Epoch, number: int, rows: list[Row]
) -> StepResult:
    await stream.send(StepFrame(Step("p", epoch, number, tuple(rows))))
    return await scheduler.result()


async def generate(
    scheduler: LinkScheduler, stream: PushStream, epoch: Epoch, live: Live, num_tokens: int
) -> None:
    for number in range(num_tokens):
        row = live.row(1, None)
        result = await step(scheduler, stream, epoch, number, [row])
        live.take(row, result.rows[0])


def new_live() -> Live:
    return Live(1, WISH, (3, 1), list(WISH.prompt))


def reference() -> list[int]:
    return Chain(DEMO_MODEL, 1, num_blocks=NUM_BLOCKS).run([WISH])[0].tokens


async def test_a_worker_says_what_it_is_and_loads_what_it_is_told() -> None:
    async with (
        link_scheduler() as scheduler,
        local_worker(DEMO_MODEL, scheduler.address, worker_id="w7", layers=Span(2, 5)),
    ):
        link = await scheduler.worker()
        said = link.registration
        assert said.worker_id == "w7"
        assert said.pid == os.getpid()
        assert span_from_proto(said.fixed_span) == Span(2, 5)
        assert said.model.num_layers == NUM_LAYERS
        assert set(said.model.part_hashes) >= {"embedding", "layer.0", "norm", "head"}
        assert not said.HasField("loaded")
        loaded = await link.load(2, 5)
        assert loaded.num_blocks == NUM_BLOCKS
        assert link.progress[-1].loaded_bytes == link.progress[-1].total_bytes > 0
        assert await link.load(2, 5) == loaded
        smaller = await link.load(2, 3)
        assert smaller.weight_bytes < loaded.weight_bytes


async def test_a_worker_outlives_its_scheduler_and_keeps_what_it_holds() -> None:
    live = new_live()
    async with contextlib.AsyncExitStack() as worker:
        async with link_scheduler(term=1) as scheduler:
            address = scheduler.address
            await worker.enter_async_context(local_worker(DEMO_MODEL, address))
            link = await scheduler.worker()
            loaded = await link.load(0, NUM_LAYERS)
            await scheduler.form([link], Epoch(1, 1))
            stream = await push_to(link, Epoch(1, 1))
            await generate(scheduler, stream, Epoch(1, 1), live, 2)
            await stream.close()
        async with link_scheduler(address, term=2) as scheduler:
            again = await scheduler.worker()
            assert again.registration.incarnation == link.registration.incarnation
            assert again.registration.loaded == loaded
            await scheduler.form([again], Epoch(2, 1), keep_kv=True)
            stream = await push_to(again, Epoch(2, 1))
            live.first = True
            await generate(scheduler, stream, Epoch(2, 1), live, 4)
            await stream.close()
            assert live.tokens == reference()
        async with link_scheduler(address, term=1) as scheduler:
            stale = await scheduler.worker()
            async with asyncio.timeout(60):
                await stale.ended.wait()  # the worker has met a scheduler that replaced this one
            assert (await scheduler.worker()).registration.HasField("loaded")


async def test_a_worker_without_a_scheduler_waits_for_one() -> None:
    async with link_scheduler() as scheduler:
        address = scheduler.address
    async with local_worker(DEMO_MODEL, address) as worker:
        done, _ = await asyncio.wait([worker], timeout=0.5)
        assert not done
        async with link_scheduler(address) as scheduler:
            scheduler.refusal = MeshUnavailable("not yet")
            await scheduler.worker()
            scheduler.refusal = None
            await (await scheduler.worker()).load(0, 1)


@pytest.mark.parametrize(
    ("number", "limit_s"), [(signal.SIGKILL, 0.5), (signal.SIGSTOP, 1.0)], ids=["killed", "frozen"]
)
async def test_a_neighbour_that_is_gone_is_noticed(number: signal.Signals, limit_s: float) -> None:
    """A killed one at once, a frozen one within the lease: by whom it sent to, and who sent to it.

    Twice that is allowed, for a machine with much else to do."""
    async with (
        link_scheduler(lease_ms=1000) as scheduler,
        local_worker(DEMO_MODEL, scheduler.address, worker_id="0"),
        worker_process(DEMO_MODEL, scheduler.address, "--worker-id", "1") as second,
        local_worker(DEMO_MODEL, scheduler.address, worker_id="2"),
    ):
        links = [await scheduler.worker() for _ in range(3)]
        links.sort(key=lambda link: link.registration.worker_id)
        for i, link in enumerate(links):
            await link.load(2 * i, 2 * i + 2)
        await scheduler.form(links, Epoch(1, 1))
        stream = await push_to(links[0], Epoch(1, 1))
        row = Live(1, WISH, (3, 1), list(WISH.prompt)).row(3, None)
        await step(scheduler, stream, Epoch(1, 1), 0, [row])

        start = time.monotonic()
        second.signal(number)
        for neighbour in (links[0], links[2]):
            broken = await neighbour.expect("epoch_broken")
            assert broken.error.code == "peer_lost"
            assert broken.peer_address == links[1].address
            print(f"noticed after {time.monotonic() - start:.3f} s")
        assert time.monotonic() - start < 2 * limit_s
        await stream.abandon()


async def test_health_answers_while_the_device_computes() -> None:
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address),
    ):
        link, stream, epoch = await lone_pipeline(scheduler)
        latencies = []
        computing = asyncio.create_task(step(scheduler, stream, epoch, 0, long_rows()))
        async with make_channel(link.address) as channel:
            while not computing.done():
                start = time.monotonic()
                response = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=10
                )
                assert response.status == health_pb2.HealthCheckResponse.SERVING
                latencies.append(time.monotonic() - start)
                await asyncio.sleep(0.01)
        compute_s = (await computing).timings[0].compute_ns / 1e9
        assert compute_s > 0.3, "the computation was too short to show anything"
        assert len(latencies) > 10
        assert max(latencies) < compute_s / 2
        await stream.close()


async def lone_pipeline(scheduler: LinkScheduler) -> tuple[WorkerLink, PushStream, Epoch]:
    link = await scheduler.worker()
    await link.load(0, NUM_LAYERS)
    await scheduler.form([link], Epoch(1, 1))
    return link, await push_to(link, Epoch(1, 1)), Epoch(1, 1)


def long_rows(num_rows: int = 25) -> list[Row]:
    """Seconds of work. All rows use the same pages, since nobody wants their tokens."""
    wish = Wish(prompt=[0] * 500, max_tokens=1)
    blocks = tuple(range(NUM_BLOCKS))
    return [Live(i, wish, blocks, wish.prompt).row(1, None) for i in range(num_rows)]


async def test_told_to_stop_a_worker_without_kv_goes_at_once() -> None:
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address) as worker,
    ):
        link = await scheduler.worker()
        await link.load(0, 1)
        worker.signal(signal.SIGTERM)
        assert (await link.expect("goodbye")).reason
        assert await worker.wait() == 0


async def test_told_to_stop_a_worker_serves_until_it_is_released() -> None:
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address, "--drain-timeout", "60s") as worker,
    ):
        link, stream, epoch = await lone_pipeline(scheduler)
        worker.signal(signal.SIGTERM)
        draining = await link.expect("draining")
        assert 50e9 < draining.remaining_ns <= 60e9
        live = new_live()
        await generate(scheduler, stream, epoch, live, 6)
        assert live.tokens == reference()
        link.command(shutdown=mesh_pb2.ShutdownWorker(reason="handed over"))
        assert await worker.wait() == 0
        await stream.close()


@pytest.mark.parametrize("impatient", [False, True], ids=["time is over", "told twice"])
async def test_told_to_stop_a_worker_that_computes_says_goodbye_in_the_end(impatient: bool) -> None:
    patience = "60s" if impatient else "300ms"
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address, "--drain-timeout", patience) as worker,
    ):
        link, stream, epoch = await lone_pipeline(scheduler)
        await stream.send(StepFrame(Step("p", epoch, 0, tuple(long_rows(600)))))
        while not (await link.next_stats()).steps_queued:
            pass
        worker.signal(signal.SIGTERM)
        await link.expect("draining")
        if impatient:
            worker.signal(signal.SIGINT)
        assert (await link.expect("goodbye")).reason
        assert await worker.wait() == 0
        async with asyncio.timeout(60):
            await link.ended.wait()
        await stream.close()


async def test_a_stream_that_breaks_is_dialled_again_at_once() -> None:
    """The scheduler gives a worker only a short grace before its place is another's."""
    async with (
        link_scheduler() as scheduler,
        local_worker(DEMO_MODEL, scheduler.address),
    ):
        link = await scheduler.worker()
        await link.next_stats()  # it has been up for a heartbeat
        start = time.monotonic()
        link.hang_up()
        again = await scheduler.worker()
        took_s = time.monotonic() - start
        print(f"back after {took_s * 1000:.1f} ms")
        assert again.registration.incarnation == link.registration.incarnation
        assert took_s < 0.25, "of which the dialling itself takes most"


async def test_a_worker_says_what_memory_is_left() -> None:
    async with (
        link_scheduler() as scheduler,
        local_worker(DEMO_MODEL, scheduler.address),
    ):
        link = await scheduler.worker()
        assert link.registration.available_memory_bytes > 2**20
        assert (await link.next_stats()).available_memory_bytes > 2**20


async def test_the_scheduler_can_shut_a_worker_down() -> None:
    async with (
        link_scheduler() as scheduler,
        local_worker(DEMO_MODEL, scheduler.address) as worker,
    ):
        link = await scheduler.worker()
        link.command(shutdown=mesh_pb2.ShutdownWorker(reason="enough"))
        async with asyncio.timeout(60):
            await worker

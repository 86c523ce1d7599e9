"""A worker that is told to go: it asks to be released, says goodbye, and does not come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from protos import mesh_pb2, mesh_pb2_grpc, plan_pb2
from stage_worker.control import MAX_QUEUED_MESSAGES, ControlStream
from stage_worker.leaving import Leaving
from stagemesh.rpc import RpcServer

TIMEOUT_S = 30.0


class Farewell(mesh_pb2_grpc.SchedulerServicer):
    """Welcomes whoever comes, notes what they say, and ends the stream after a goodbye."""

    def __init__(self) -> None:
        self.num_registered = 0
        self.heard: asyncio.Queue[mesh_pb2.WorkerMessage] = asyncio.Queue()
        self.hang_up = asyncio.Event()

    async def next_wish(self) -> mesh_pb2.WorkerDraining:
        while True:
            message = await asyncio.wait_for(self.heard.get(), TIMEOUT_S)
            if message.WhichOneof("message") == "draining":
                return message.draining

    async def AttachWorker(  # noqa: N802
        self,
        messages: AsyncIterator[mesh_pb2.WorkerMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[mesh_pb2.WorkerCommand]:
        async for message in messages:
            kind = message.WhichOneof("message")
            self.heard.put_nowait(message)
            if kind == "goodbye" or self.hang_up.is_set():
                self.hang_up.clear()
                return
            if kind == "register":
                self.num_registered += 1
                welcome = mesh_pb2.WelcomeWorker(term=1, heartbeat_interval_ms=50, lease_ms=1000)
                yield mesh_pb2.WorkerCommand(welcome=welcome)


class Member:
    """A ControlledWorker that notes that it was attached."""

    def __init__(self) -> None:
        self.is_attached = asyncio.Event()

    async def before_dialling(self) -> None:
        pass

    def registration(self) -> mesh_pb2.RegisterWorker:
        return mesh_pb2.RegisterWorker(worker_id="worker-0")

    def stats(self) -> mesh_pb2.WorkerStats:
        return mesh_pb2.WorkerStats()

    def attached(self, welcome: mesh_pb2.WelcomeWorker) -> None:
        self.is_attached.set()

    def command(self, command: mesh_pb2.WorkerCommand) -> None:
        raise AssertionError(command)

    def detached(self) -> None:
        pass


@asynccontextmanager
async def attached() -> AsyncIterator[tuple[Farewell, ControlStream, asyncio.Task[None]]]:
    scheduler, server = Farewell(), RpcServer("127.0.0.1:0")
    mesh_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server.server)  # type: ignore[no-untyped-call]
    member = Member()
    control = ControlStream(await server.start(), member)
    running = asyncio.create_task(control.run())
    try:
        await asyncio.wait_for(member.is_attached.wait(), TIMEOUT_S)
        yield scheduler, control, running
    finally:
        running.cancel()
        await asyncio.wait([running])
        await server.stop(0)


async def test_a_scheduler_that_does_not_read_is_dialled_again() -> None:
    """Messages are not kept without end, and none is dropped in silence."""
    async with attached() as (scheduler, control, running):
        failed = mesh_pb2.WorkerMessage(failed=plan_pb2.Error(message="x" * 2**10))
        for _ in range(MAX_QUEUED_MESSAGES + 1):  # the writer has no turn meanwhile
            control.send(failed)
        while scheduler.num_registered < 2:
            await asyncio.wait_for(scheduler.heard.get(), TIMEOUT_S)
        assert not running.done()


async def test_progress_is_not_queued_without_end() -> None:
    async with attached() as (scheduler, control, _):
        progress = mesh_pb2.WorkerMessage(load_progress=mesh_pb2.LoadProgress(total_bytes=7))
        for _ in range(2 * MAX_QUEUED_MESSAGES):
            control.send(progress)
        control.send(mesh_pb2.WorkerMessage(failed=plan_pb2.Error(code="span")))
        kinds = []
        while "failed" not in kinds:
            message = await asyncio.wait_for(scheduler.heard.get(), TIMEOUT_S)
            kinds.append(message.WhichOneof("message"))
        assert 0 < kinds.count("load_progress") < MAX_QUEUED_MESSAGES
        assert scheduler.num_registered == 1


async def test_goodbye_is_for_good() -> None:
    async with attached() as (scheduler, control, running):
        await control.leave("told to stop")
        await asyncio.wait_for(running, TIMEOUT_S)
        assert scheduler.num_registered == 1


async def test_the_wish_to_go_says_how_long_it_can_wait() -> None:
    async with attached() as (scheduler, control, _):
        leaving = Leaving(patience_s=60.0)
        leaving.worker_runs(control)
        assert leaving.ask()
        wish = await scheduler.next_wish()
        assert wish.reason == "told to stop"
        assert 50e9 < wish.remaining_ns <= 60e9


async def test_the_scheduler_after_this_one_is_asked_as_well() -> None:
    async with attached() as (scheduler, control, _):
        assert control.drain("told to stop", 60.0)
        first = await scheduler.next_wish()
        scheduler.hang_up.set()  # at the next heartbeat
        again = await scheduler.next_wish()
        assert scheduler.num_registered == 2
        assert again.remaining_ns < first.remaining_ns


async def test_nobody_waits_forever_to_be_released() -> None:
    async with attached() as (_, control, running):
        leaving = Leaving(patience_s=0.05)
        leaving.worker_runs(control)
        assert leaving.ask()
        await asyncio.wait_for(leaving.patience_ended(), TIMEOUT_S)
        assert not running.done()


async def test_without_a_scheduler_there_is_nobody_to_ask() -> None:
    leaving = Leaving()
    assert not leaving.ask()
    leaving.worker_runs(ControlStream("127.0.0.1:1", Member()))
    assert not leaving.ask()

"""A worker that says goodbye does not come back when the scheduler ends its stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from protos import mesh_pb2, mesh_pb2_grpc
from stage_worker.control import ControlStream
from stagemesh.rpc import RpcServer

TIMEOUT_S = 30.0


class Farewell(mesh_pb2_grpc.SchedulerServicer):
    """Welcomes whoever comes, and ends the stream after a goodbye."""

    def __init__(self) -> None:
        self.num_registered = 0

    async def AttachWorker(  # noqa: N802
        self,
        messages: AsyncIterator[mesh_pb2.WorkerMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[mesh_pb2.WorkerCommand]:
        async for message in messages:
            kind = message.WhichOneof("message")
            if kind == "goodbye":
                return
            if kind == "register":
                self.num_registered += 1
                welcome = mesh_pb2.WelcomeWorker(term=1, heartbeat_interval_ms=50, lease_ms=1000)
                yield mesh_pb2.WorkerCommand(welcome=welcome)


class Member:
    """A ControlledWorker that notes that it was attached."""

    def __init__(self) -> None:
        self.is_attached = asyncio.Event()

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


async def test_goodbye_is_for_good() -> None:
    scheduler, server = Farewell(), RpcServer("127.0.0.1:0")
    mesh_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server.server)  # type: ignore[no-untyped-call]
    address = await server.start()
    try:
        member = Member()
        control = ControlStream(address, member)
        running = asyncio.create_task(control.run())
        await asyncio.wait_for(member.is_attached.wait(), TIMEOUT_S)
        await control.leave("told to stop")
        await asyncio.wait_for(running, TIMEOUT_S)
        assert scheduler.num_registered == 1
    finally:
        await server.stop(0)

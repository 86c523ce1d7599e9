"""`stagemesh drain` against a scheduler that says what a test wants it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh.cli.drain import DrainOptions, drain
from stagemesh.errors import (
    InvalidRequest,
    PeerLost,
    RequestDeadlineExceeded,
    StageMeshError,
)
from stagemesh.rpc import RpcServer, abort_with

Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[[mesh_pb2.DrainWorkerRequest], Awaitable[mesh_pb2.DrainWorkerResponse]]


class DrainingScheduler(mesh_pb2_grpc.SchedulerServicer):
    def __init__(self, answer: Answer, detail: str) -> None:
        self._answer = answer
        self._detail = detail

    async def GetStatus(  # noqa: N802
        self, _: mesh_pb2.GetStatusRequest, __: Context
    ) -> mesh_pb2.GetStatusResponse:
        mesh = mesh_pb2.MeshState(serving=not self._detail, detail=self._detail)
        return mesh_pb2.GetStatusResponse(mesh=mesh)

    async def DrainWorker(  # noqa: N802
        self, request: mesh_pb2.DrainWorkerRequest, context: Context
    ) -> mesh_pb2.DrainWorkerResponse:
        try:
            return await self._answer(request)
        except StageMeshError as error:
            await abort_with(context, error)


@asynccontextmanager
async def scheduler(answer: Answer, detail: str = "") -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1:0")
    servicer = DrainingScheduler(answer, detail)
    mesh_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.server)  # type: ignore[no-untyped-call]
    try:
        yield await server.start()
    finally:
        await server.stop(0)


async def test_who_goes_on_is_told() -> None:
    asked: list[mesh_pb2.DrainWorkerRequest] = []

    async def answer(request: mesh_pb2.DrainWorkerRequest) -> mesh_pb2.DrainWorkerResponse:
        asked.append(request)
        return mesh_pb2.DrainWorkerResponse(successor_id="w2", num_blocks_moved=37)

    async with scheduler(answer) as address:
        said = await drain(DrainOptions(worker="w1", to="w2", stay=True, scheduler=address))
    assert asked == [mesh_pb2.DrainWorkerRequest(worker_id="w1", to_worker_id="w2", stay=True)]
    assert said == "w1 stays without layers: w2 goes on with its layers, 37 blocks of KV moved"


async def test_what_the_mesh_lacks_then_is_told() -> None:
    async def answer(_: mesh_pb2.DrainWorkerRequest) -> mesh_pb2.DrainWorkerResponse:
        return mesh_pb2.DrainWorkerResponse()

    async with scheduler(answer, "waiting for layers 3:6") as at:
        said = await drain(DrainOptions(worker="w1", scheduler=at))
    assert said.splitlines() == [
        "w1 has been told to end; nobody took its place",
        "the mesh does not serve: waiting for layers 3:6",
    ]


async def test_the_schedulers_objection_arrives() -> None:
    async def answer(_: mesh_pb2.DrainWorkerRequest) -> mesh_pb2.DrainWorkerResponse:
        raise InvalidRequest("no worker w9 is in the mesh")

    async with scheduler(answer) as address:
        with pytest.raises(InvalidRequest, match="no worker w9 is in the mesh"):
            await drain(DrainOptions(worker="w9", scheduler=address))


async def test_a_drain_that_takes_longer_than_one_waits_for() -> None:
    async def never(_: mesh_pb2.DrainWorkerRequest) -> mesh_pb2.DrainWorkerResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with scheduler(never) as address:
        with pytest.raises(RequestDeadlineExceeded, match=r"w1 still has work after 0\.2 s"):
            await drain(DrainOptions(worker="w1", scheduler=address, timeout_s=0.2))


async def test_nobody_there() -> None:
    server = RpcServer("127.0.0.1:0")
    address = await server.start()
    await server.stop(0)
    with pytest.raises(PeerLost, match=f"no scheduler answers at {address}"):
        await drain(DrainOptions(worker="w1", scheduler=address))

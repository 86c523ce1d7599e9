"""Channels and servers: bound addresses, health, reflection, limits, and errors that cross them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh.addresses import advertised_address, join_address, split_address
from stagemesh.backoff import Backoff
from stagemesh.errors import (
    OUTWARD,
    AddressInUse,
    ConfigError,
    InternalError,
    PeerLost,
    ProtocolError,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
    StageMeshError,
)
from stagemesh.rpc import RpcServer, abort_with, error_from_rpc, make_channel, peer_error

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Complaining(mesh_pb2_grpc.SchedulerServicer):
    """Ends every GetStatus with `error`."""

    def __init__(self) -> None:
        self.error: StageMeshError = InternalError("unset")

    async def GetStatus(  # noqa: N802
        self, request: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> mesh_pb2.GetStatusResponse:
        await abort_with(context, self.error)


@asynccontextmanager
async def serving(servicer: Complaining | None = None) -> AsyncIterator[tuple[RpcServer, str]]:
    server = RpcServer("127.0.0.1:0", max_message_bytes=2**20)
    if servicer is not None:
        mesh_pb2_grpc.add_SchedulerServicer_to_server(servicer, server.server)  # type: ignore[no-untyped-call]
        server.add_service_name("stagemesh.v1.Scheduler")
    address = await server.start()
    try:
        yield server, address
    finally:
        await server.stop(0)


async def call(address: str, request: mesh_pb2.GetStatusRequest) -> grpc.aio.AioRpcError:
    async with make_channel(address) as channel:
        stub = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetStatus(request, timeout=10)
    return caught.value


async def test_every_error_crosses_a_call_as_itself() -> None:
    servicer = Complaining()
    async with serving(servicer) as (_, address):
        for cls, outward in OUTWARD.items():
            servicer.error = cls(f"about {cls.__name__}: ünïcode, 100 %")
            status = await call(address, mesh_pb2.GetStatusRequest())
            assert status.code().name == outward.grpc
            error = error_from_rpc(status)
            assert type(error) is cls
            assert str(error) == str(servicer.error)
            assert error.retry_after_s is None


async def test_when_to_come_again_crosses_a_call() -> None:
    servicer = Complaining()
    servicer.error = QueueFull("later", retry_after_s=1.25)
    async with serving(servicer) as (_, address):
        error = error_from_rpc(await call(address, mesh_pb2.GetStatusRequest()))
    assert error.retry_after_s == 1.25


async def test_a_huge_message_of_an_error_is_cut() -> None:
    servicer = Complaining()
    servicer.error = ProtocolError("ä" * 100_000)
    async with serving(servicer) as (_, address):
        error = error_from_rpc(await call(address, mesh_pb2.GetStatusRequest()))
    assert isinstance(error, ProtocolError)
    assert str(error).startswith("äää")


async def test_a_message_over_the_limit_is_refused() -> None:
    async with serving(Complaining()) as (_, address), make_channel(address) as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/stagemesh.v1.Scheduler/GetStatus", None, None
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(bytes(2**20 + 1), timeout=10)
    assert isinstance(error_from_rpc(caught.value), RequestTooLarge)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, PeerLost),
        (grpc.StatusCode.CANCELLED, RequestCancelled),
        (grpc.StatusCode.UNKNOWN, InternalError),
    ],
)
@pytest.mark.parametrize("retry_after", ["x", "-5", "9" * 5000, ""])
def test_a_status_of_a_stranger_is_understood(
    status: grpc.StatusCode, expected: type[StageMeshError], retry_after: str
) -> None:
    trailers = grpc.aio.Metadata(("retry-after-ms", retry_after))
    error = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), trailers, details="what it says")
    assert type(error_from_rpc(error)) is expected
    assert isinstance(peer_error("host:1", error), PeerLost)


async def test_a_second_server_on_the_port_is_refused_by_name() -> None:
    async with serving() as (_, address):
        second = RpcServer(address)
        with pytest.raises(AddressInUse, match=address):
            await second.start()


@pytest.mark.parametrize("address", ["203.0.113.7:0", "no-such-host.invalid:0"])
async def test_an_address_of_somebody_else_cannot_be_listened_on(address: str) -> None:
    server = RpcServer(address)
    with pytest.raises(ConfigError, match=address):
        await server.start()


async def test_health_is_what_was_set_and_ends_with_the_server() -> None:
    async with serving() as (server, address), make_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return int((await stub.Check(request, timeout=10)).status)

        assert await check("") == NOT_SERVING
        server.set_serving(True)
        server.set_serving(False, "part")
        assert await check("") == SERVING
        assert await check("part") == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_of_health_sees_every_change() -> None:
    async with serving() as (server, address), make_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(10):
            assert (await watch.read()).status == NOT_SERVING
            server.set_serving(True)
            assert (await watch.read()).status == SERVING
            server.set_serving(True)
            stopping = asyncio.create_task(server.stop(5))
            assert (await watch.read()).status == NOT_SERVING
            watch.cancel()
            await stopping


async def test_reflection_names_the_services() -> None:
    async with serving(Complaining()) as (_, address), make_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asking = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        answer = await asking.read()
        names = {service.name for service in answer.list_services_response.service}
    assert names >= {"stagemesh.v1.Scheduler", "grpc.health.v1.Health"}


@given(host=st.sampled_from(["a.b", "10.0.0.1", "::1", "0.0.0.0"]), port=st.integers(0, 65535))
def test_addresses_are_split_and_joined(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000", "::1:5", "h:-1"])
def test_what_is_no_address_is_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        split_address(text)


@pytest.mark.parametrize(
    ("bound", "advertise", "expected"),
    [
        ("10.1.2.3:50", "", "10.1.2.3:50"),
        ("0.0.0.0:50", "", "127.0.0.1:50"),
        ("0.0.0.0:50", "gpu7", "gpu7:50"),
        ("0.0.0.0:50", "gpu7:99", "gpu7:99"),
        ("0.0.0.0:50", "gpu7:0", "gpu7:50"),
        ("0.0.0.0:50", "[fd00::1]", "[fd00::1]:50"),
        ("0.0.0.0:50", "[fd00::1]:7", "[fd00::1]:7"),
    ],
)
def test_what_others_are_told_to_dial(bound: str, advertise: str, expected: str) -> None:
    assert advertised_address(bound, advertise, towards="127.0.0.1:50050") == expected


def test_waits_between_attempts_grow_to_a_limit_and_start_anew() -> None:
    backoff = Backoff(first_s=0.1, max_s=1.0)
    waits = [backoff.next_s() for _ in range(10)]
    for wait, step in zip(waits, [0.1, 0.2, 0.4, 0.8, *[1.0] * 6], strict=True):
        assert step / 2 <= wait <= step
    backoff.reset()
    assert backoff.next_s() <= 0.1

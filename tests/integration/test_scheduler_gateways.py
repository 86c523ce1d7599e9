"""The real scheduler and its gateways: those that go, come back, fall silent or do not read."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import count

import grpc.aio
import pytest
from support.pretend_gateway import PretendGateway, pretend_mesh, prompt_of
from support.pretend_workers import until

from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh.sampling import SamplingSpec


async def test_a_gateway_that_goes_takes_its_requests_along() -> None:
    async with pretend_mesh() as mesh:
        gateway, other = await mesh.gateway(1), await mesh.gateway(2)
        await gateway.submit(1, prompt_of(1, 12), 200)
        await other.submit(1, prompt_of(2, 12), 100)
        await until(lambda: len(gateway.tokens[1]) > 3, "tokens")
        await gateway.close()
        await other.wait_finished(1)
        other.check(1)
        status = await mesh.wait_idle()
        assert (status.queue.num_aborted, status.num_gateways) == (1, 1)


async def test_a_gateway_that_comes_back_begins_anew() -> None:
    async with pretend_mesh() as mesh:
        gateway = await mesh.gateway(5)
        await gateway.submit(1, prompt_of(1, 12), 200)
        await until(lambda: len(gateway.tokens[1]) > 3, "tokens")
        again = await mesh.gateway(5)
        await again.submit(2, prompt_of(3, 12), 50)
        await again.wait_finished(2)
        again.check(2)
        status = await mesh.wait_idle()
        assert (status.queue.num_aborted, status.num_gateways) == (1, 1)


async def test_a_silent_gateway_loses_its_lease() -> None:
    async with pretend_mesh() as mesh:
        gateway = await mesh.gateway(beats=False)
        mesh.workers["w0"].gate.clear()
        await gateway.submit(1, prompt_of(1, 12), 200)
        status = await mesh.wait_idle()
        assert status.queue.num_accepted == 1
        assert status.num_gateways == 0


async def test_a_gateway_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.gateways._MAX_UNREAD_BYTES", 20_000)
    numbers = count()
    # A connection that holds little by itself before anybody notices.
    narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with (
        pretend_mesh() as mesh,
        grpc.aio.insecure_channel(mesh.address, options=narrow) as channel,
    ):
        deaf = await PretendGateway(channel).start(reads=False)
        other = await mesh.gateway(2)
        mesh.gateways.append(deaf)
        much = SamplingSpec(num_prompt_logprobs=0)
        async with asyncio.timeout(60):
            while (await mesh.status()).num_gateways == 2:
                for _ in range(5):
                    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                        await deaf.submit(next(numbers), prompt_of(1, 200), 1, spec=much)
        await other.submit(1, prompt_of(2, 12), 100)
        await other.wait_finished(1)
        other.check(1)
        assert (await mesh.wait_idle()).num_gateways == 1


async def test_a_peer_of_another_protocol_is_refused() -> None:
    async with pretend_mesh(0, num_stages=1) as mesh:
        stub = mesh_pb2_grpc.SchedulerStub(mesh.channel)  # type: ignore[no-untyped-call]
        call = stub.AttachGateway()
        register = mesh_pb2.RegisterGateway(protocol_version=99, incarnation=1)
        await call.write(mesh_pb2.GatewayMessage(register=register))
        assert "protocol 99" in (await call.read()).refused.message
        call = stub.AttachWorker()
        await call.write(mesh_pb2.WorkerMessage(heartbeat=mesh_pb2.WorkerHeartbeat()))
        assert "registers" in (await call.read()).refused.message

"""Packets that vanish and ports that close, by nftables between hosts that are namespaces."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from support.chaos import (
    DEMO_MODEL,
    MANY,
    NUM_LASTING,
    WAITING,
    is_member,
    lasting,
    loaded,
    watched,
)
from support.hosts import Host, hosts
from support.proxy import TcpProxy

from benchmarks.recovery.load import Truth
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh

pytestmark = pytest.mark.timeout(180)

LEASE_S = 2.0
PORT = 50052
FEW = MANY[:12]


@dataclass
class Net:
    """Scheduler and gateway on `front`, a worker on each of the others; this process reaches the
    front by proxies that dial from inside."""

    mesh: PartsMesh
    front: Host
    by_name: dict[str, Host]

    async def stages(self) -> list[Host]:
        status = await self.mesh.status()
        return [self.by_name[name] for name in status.pipelines[0].worker_ids]

    async def epoch(self) -> int:
        return (await self.mesh.status()).pipelines[0].epoch.n

    async def until_next_epoch(self, before: int) -> None:
        await self.mesh.until(
            lambda s: s.pipelines[0].epoch.n > before or not s.pipelines[0].serving,
            "the fault to be noticed",
            timeout_s=3 * LEASE_S,
        )

    def heal(self) -> None:
        for host in (self.front, *self.by_name.values()):
            host.open_all()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    for tool in ("nft", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs the {tool} command, for faults between namespaces")
    scratch = tmp_path_factory.mktemp("network")
    with contextlib.ExitStack() as stack:
        front, *others = stack.enter_context(hosts(4, scratch))
        shape = MeshShape(model=DEMO_MODEL, stages=2, spares=1, scheduler_options=WAITING)
        mesh = PartsMesh(shape, scratch)
        stack.callback(mesh.end)
        at = f"{front.address}:50050"
        place(mesh, front, others, at)
        dial = [f"{front.address}:50051", at]
        gateway, scheduler = (
            stack.enter_context(TcpProxy(target, namespace=front.namespace)) for target in dial
        )
        mesh.gateway_at, mesh.scheduler_at = gateway.address, scheduler.address
        yield Net(mesh, front, {f"worker-{n}": host for n, host in enumerate(others)})


def place(mesh: PartsMesh, front: Host, others: list[Host], scheduler: str) -> None:
    mesh.scheduler.prefix = front.inside()
    mesh.scheduler.arguments = (*mesh.scheduler.arguments, "--listen", scheduler)
    ports = ("--host", front.address, "--grpc-port", "50051", "--http-port", "8000")
    mesh.add_gateway("gateway-0", scheduler, *ports).prefix = front.inside()
    for n, host in enumerate(others):
        listen = ("--listen", f"{host.address}:{PORT}")
        mesh.add_worker(f"worker-{n}", scheduler, *listen).prefix = host.inside()


@pytest_asyncio.fixture
async def net(network: Net) -> AsyncIterator[Net]:
    async with watched(network.mesh):
        yield network


async def test_packets_between_two_stages_vanish(net: Net, truth: Truth) -> None:
    """Each of them still has the scheduler. Nobody is told by TCP."""
    async with loaded(net.mesh, truth, FEW) as load:
        first, second = await net.stages()
        before = await net.epoch()
        first.drop(second)
        await net.until_next_epoch(before)
        net.heal()
        await load.until_more_tokens(NUM_LASTING)


async def test_packets_to_a_workers_port_vanish_for_one_step_only(net: Net, truth: Truth) -> None:
    """Shorter than anybody's patience: TCP sends them again, and no epoch ends."""
    async with loaded(net.mesh, truth, FEW) as load:
        first, second = await net.stages()
        before = await net.epoch()
        first.drop(second, PORT)
        await lasting(LEASE_S / 10)
        net.heal()
        await load.until_more_tokens(NUM_LASTING)
        assert await net.epoch() == before


async def test_a_worker_that_the_scheduler_cannot_hear(net: Net, truth: Truth) -> None:
    """Both ways; its neighbours still hear it. A spare takes its place, then it comes back."""
    async with loaded(net.mesh, truth, FEW) as load:
        _, deaf = await net.stages()
        part = net.mesh.at(await net.mesh.status(), 1)
        deaf.drop(net.front)
        await net.mesh.until(lambda s: not is_member(s, part), "the silence to be noticed")
        await load.until_more_tokens(NUM_LASTING)
        net.heal()
        await net.mesh.until(lambda s: is_member(s, part), "it to come back")
        await load.until_more_tokens(NUM_LASTING)


async def test_a_port_that_closes(net: Net, truth: Truth) -> None:
    """As by a firewall that resets: the connection that was there breaks too."""
    async with loaded(net.mesh, truth, FEW) as load:
        _, second = await net.stages()
        before = await net.epoch()
        second.close_port(PORT)
        await net.until_next_epoch(before)
        net.heal()
        await load.until_more_tokens(NUM_LASTING)


async def test_a_thin_line(net: Net, truth: Truth) -> None:
    """Slow is no failure: no epoch ends."""
    first, _ = await net.stages()
    before = await net.epoch()
    first.limit_rate("8mbit")
    async with loaded(net.mesh, truth, FEW) as load:
        await load.until_more_tokens(NUM_LASTING)
    first.limit_rate(None)
    assert await net.epoch() == before

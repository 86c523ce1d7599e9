"""SIGSTOP: processes that say nothing any more, and wake up in a mesh that went on without them."""

from __future__ import annotations

import contextlib
import time
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
from support.proxy import TcpProxy
from support.template import fork_worker
from support.thorough import more

from benchmarks.recovery.load import Truth
from benchmarks.recovery.part import Part, free_address
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh

pytestmark = pytest.mark.timeout(180)

LEASE_S = 2.0
FEW = MANY[:12]


@pytest.mark.parametrize("stage", [*more(0), 1, *more(2)])
async def test_a_frozen_worker_is_replaced_and_comes_back_as_a_stranger(
    mesh: PartsMesh, truth: Truth, stage: int
) -> None:
    async with loaded(mesh, truth) as load:
        frozen = mesh.at(await mesh.status(), stage)
        frozen.freeze()
        frozen_s = time.monotonic()
        await mesh.until(lambda s: not is_member(s, frozen), "the silence to be noticed")
        print(f"noticed after {time.monotonic() - frozen_s:.2f} s")
        await load.until_more_tokens(NUM_LASTING)
        frozen.thaw()
        await mesh.until(lambda s: is_member(s, frozen), "it to come back")
        await load.until_more_tokens(NUM_LASTING)
        assert frozen.alive


async def test_a_worker_that_freezes_for_less_than_the_lease_stays(
    mesh: PartsMesh, truth: Truth
) -> None:
    async with loaded(mesh, truth, FEW) as load:
        before = await mesh.status()
        frozen = mesh.at(before, 1)
        frozen.freeze()
        await lasting(LEASE_S / 4)
        frozen.thaw()
        await load.until_more_tokens(NUM_LASTING)
        after = await mesh.status()
        assert after.pipelines[0].worker_ids == before.pipelines[0].worker_ids


async def test_a_frozen_scheduler_thaws(mesh: PartsMesh, truth: Truth) -> None:
    """Nobody takes its place meanwhile. It has missed everybody's heartbeats, and they its."""
    async with loaded(mesh, truth, FEW) as load:
        mesh.scheduler.freeze()
        await lasting(2 * LEASE_S)
        mesh.scheduler.thaw()
        await load.until_more_tokens(NUM_LASTING)


@dataclass
class TwoSchedulers:
    """All reach the scheduler by `road`, as by a name that is given to another host."""

    mesh: PartsMesh
    road: TcpProxy


@pytest.fixture(scope="module")
def two_schedulers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoSchedulers]:
    with contextlib.ExitStack() as stack:
        first = free_address()
        shape = MeshShape(
            model=DEMO_MODEL, stages=2, scheduler_options=("--listen", first, *WAITING)
        )
        mesh = PartsMesh(shape, tmp_path_factory.mktemp("schedulers"), fork_worker)
        stack.callback(mesh.end)
        road = stack.enter_context(TcpProxy(first))
        for n in range(2):
            mesh.add_worker(f"worker-{n}", road.address)
        mesh.add_gateway("gateway-0", road.address)
        yield TwoSchedulers(mesh, road)


@pytest_asyncio.fixture
async def succession(two_schedulers: TwoSchedulers) -> AsyncIterator[TwoSchedulers]:
    async with watched(two_schedulers.mesh):
        yield two_schedulers


async def test_nobody_follows_a_scheduler_that_thaws_after_its_successor_began(
    succession: TwoSchedulers, truth: Truth
) -> None:
    mesh, road = succession.mesh, succession.road
    old = mesh.scheduler
    async with loaded(mesh, truth, FEW) as load:
        old_term = (await mesh.status()).term
        old.freeze()
        new = successor_of(old)
        new.start()
        await new.wait_ready()
        mesh.scheduler = new
        road.target = new.facts["address"]
        road.reset()
        await mesh.until_whole()
        old.thaw()
        await load.until_more_tokens(12 * NUM_LASTING)
        status = await mesh.status()
        assert status.term > old_term
        assert status.pipelines[0].serving
    old.kill()


def successor_of(old: Part) -> Part:
    at = free_address()
    name, arguments = f"{old.name}-2", (*old.arguments, "--listen", at)
    return Part(old.role, name, arguments, old.scratch, lambda facts: ())

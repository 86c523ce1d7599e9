"""Containers are killed, cut off and restarted under 16 streams; every stream comes out right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from support.containers import TEST_TIMEOUT_S, Project, docker, inspect, kill_hard, wait_restarted
from support.thorough import more

from benchmarks.recovery.load import Load, Stream, Truth, asks

pytestmark = [pytest.mark.compose, pytest.mark.timeout(TEST_TIMEOUT_S)]

NUM_STAGES = 3
WANTED = tuple(asks(16, 20261121, max_tokens=64))


@pytest.fixture(scope="module")
def truth(mesh: Project) -> Truth:
    """What the streams say when nobody disturbs them."""
    mesh.wait_whole(num_stages=NUM_STAGES, num_spares=1)
    undisturbed = Truth()
    asyncio.run(undisturbed.learn(mesh.address("gateway", 50051), WANTED))
    return undisturbed


@asynccontextmanager
async def streaming(mesh: Project, truth: Truth, *, repeat: bool = False) -> AsyncIterator[Load]:
    """All are under way when the block begins, and have ended well after it."""
    target = mesh.address("gateway", 50051)
    async with Load(target, WANTED, repeat=repeat) as load:
        await load.until_tokens(4)
        assert sum(not stream.finished for stream in load.streams) > len(WANTED) // 2
        yield load
        await load.finish()
    assert len(load.done) >= len(WANTED)
    print(f"longest pause of {len(load.done)} streams: {longest_pause_s(load.done):.2f} s")
    assert truth.faults(load.done) == []


def longest_pause_s(streams: Sequence[Stream]) -> float:
    return max(stream.longest_gap_s() for stream in streams)


async def whole_again(mesh: Project) -> None:
    await asyncio.to_thread(mesh.wait_whole, num_stages=NUM_STAGES, num_spares=1)


async def meanwhile(*command: str) -> None:
    await asyncio.to_thread(docker, *command)


def at_stage(stage: int) -> Callable[[Project], str]:
    return lambda mesh: mesh.worker(mesh.status().pipelines[0].worker_ids[stage])


def spare(mesh: Project) -> str:
    status = mesh.status()
    (found,) = {w.worker_id for w in status.workers} - set(status.pipelines[0].worker_ids)
    return mesh.worker(found)


@pytest.mark.parametrize(
    "whom",
    [at_stage(0), *more(at_stage(1), at_stage(2)), spare],
    ids=["first", "middle", "last", "spare"],
)
async def test_a_worker_is_killed(
    mesh: Project, truth: Truth, whom: Callable[[Project], str]
) -> None:
    """By `docker kill`, so that it stays down until it is started."""
    victim = whom(mesh)
    async with streaming(mesh, truth):
        await meanwhile("kill", victim)
    assert not inspect(victim)["State"]["Running"]
    await meanwhile("start", victim)
    await whole_again(mesh)


async def test_the_scheduler_is_killed(mesh: Project, truth: Truth) -> None:
    (scheduler,) = mesh.containers("scheduler")
    async with streaming(mesh, truth):
        await meanwhile("kill", scheduler)
        await meanwhile("start", scheduler)
    await whole_again(mesh)


@pytest.mark.parametrize("service", ["stage_worker", "scheduler"])
async def test_a_process_that_dies_is_started_again_by_the_engine(
    mesh: Project, truth: Truth, service: str
) -> None:
    victim = mesh.containers(service)[0]
    pid = inspect(victim)["State"]["Pid"]
    async with streaming(mesh, truth):
        await asyncio.to_thread(kill_hard, victim)
    await asyncio.to_thread(wait_restarted, victim, pid)
    await whole_again(mesh)


async def test_a_worker_is_cut_off_and_comes_back(mesh: Project, truth: Truth) -> None:
    """To another address: somebody has taken its own meanwhile."""
    victim, network = at_stage(1)(mesh), mesh.network()
    async with streaming(mesh, truth):
        await meanwhile("network", "disconnect", network, victim)
    sleeper = ("--entrypoint", "sleep", "stagemesh-control", "600")
    other = docker("run", "-d", "--rm", "--network", network, *sleeper).strip()
    try:
        await meanwhile("network", "connect", network, victim)
        await whole_again(mesh)
    finally:
        await meanwhile("rm", "--force", other)
    (interface,) = inspect(victim)["NetworkSettings"]["Networks"].values()
    addresses = {mesh.worker(w.worker_id): w.address for w in mesh.status().workers}
    assert addresses[victim] == f"{interface['IPAddress']}:50052"


async def test_a_rolling_restart_of_all(mesh: Project, truth: Truth) -> None:
    """One after another, each when the one before it is back; the gateway is where streams end."""
    containers = [*mesh.containers("stage_worker"), *mesh.containers("scheduler")]
    async with streaming(mesh, truth, repeat=True):
        for container in containers:
            await meanwhile("restart", container)
            await whole_again(mesh)
    exit_codes = [inspect(container)["State"]["ExitCode"] for container in containers]
    assert exit_codes == [0] * len(containers)


async def test_a_stopped_worker_hands_over_and_ends_well(mesh: Project, truth: Truth) -> None:
    victim = at_stage(0)(mesh)
    async with streaming(mesh, truth):
        await meanwhile("stop", victim)
        assert inspect(victim)["State"]["ExitCode"] == 0
    await meanwhile("start", victim)
    await whole_again(mesh)

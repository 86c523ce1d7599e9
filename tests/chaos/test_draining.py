"""Workers that leave on purpose, under load: handed over live, replayed, replaced one by one."""

from __future__ import annotations

import pytest
from support.chaos import LONG, MANY, NUM_LASTING, loaded
from support.thorough import more, thorough

from benchmarks.recovery.faults import drain
from benchmarks.recovery.load import Truth
from benchmarks.recovery.parts_mesh import PartsMesh

pytestmark = pytest.mark.timeout(180)


@thorough
async def test_a_rolling_restart_with_a_spare(mesh: PartsMesh, truth: Truth) -> None:
    """SIGTERM to each in turn, the next when the last is back."""
    async with loaded(mesh, truth, MANY[:8]) as load:
        for worker in list(mesh.workers.values()):
            worker.terminate()
            assert await worker.wait_ended() == 0
            worker.start()
            await worker.wait_ready()
            await mesh.until_whole()
            await load.until_more_tokens(NUM_LASTING)


async def test_a_rolling_restart_without_a_spare(mesh: PartsMesh, truth: Truth) -> None:
    for spare in mesh.spares(await mesh.status()):
        spare.kill()
    await mesh.until_whole()
    async with loaded(mesh, truth, MANY[:8]) as load:
        for worker in [part for part in mesh.workers.values() if part.alive]:
            worker.terminate()
            assert await worker.wait_ended() == 0
            worker.start()
            await worker.wait_ready()
            await mesh.until_whole()
            await load.until_more_tokens(NUM_LASTING)


@pytest.mark.parametrize("stage", [0, *more(1, 2)])
async def test_a_span_moves_to_another_worker_with_its_pages(
    mesh: PartsMesh, truth: Truth, stage: int
) -> None:
    """Live migration: nothing is computed again where the pages came."""
    async with loaded(mesh, truth, LONG, each=20) as load:
        status = await mesh.status()
        (spare,) = mesh.spares(status)
        old = mesh.at(status, stage)
        moved = await drain(mesh, old.name, to=spare.name, stay=True)
        assert moved.successor_id == spare.name
        assert moved.num_blocks_moved > 0
        await load.until_more_tokens(NUM_LASTING)
        status = await mesh.status()
        assert mesh.at(status, stage) is spare
        assert old.alive
        assert status.pipelines[0].mending.num_tokens_rebuilt == 0


async def test_the_successor_dies_while_it_is_handed_the_span(
    mesh: PartsMesh, truth: Truth
) -> None:
    async with loaded(mesh, truth, MANY[:16]) as load:
        status = await mesh.status()
        (spare,) = mesh.spares(status)
        leaving = mesh.at(status, 1)
        leaving.terminate()
        spare.kill()
        assert await leaving.wait_ended() == 0
        leaving.start()
        await load.until_more_tokens(NUM_LASTING)


async def test_a_draining_worker_is_killed(mesh: PartsMesh, truth: Truth) -> None:
    async with loaded(mesh, truth, MANY[:16]) as load:
        leaving = mesh.at(await mesh.status(), 1)
        leaving.terminate()
        leaving.kill()
        await load.until_more_tokens(NUM_LASTING)

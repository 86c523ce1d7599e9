"""kill -9 of stage workers under load: every stream goes on, token for token."""

from __future__ import annotations

import pytest
from support.chaos import LONG, LONG_PROMPTS, MANY, NUM_LASTING, check, loaded
from support.thorough import more

from benchmarks.recovery.load import Load, Truth
from benchmarks.recovery.parts_mesh import PartsMesh

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("stage", [0, *more(1, 2)])
async def test_a_spare_takes_the_place(mesh: PartsMesh, truth: Truth, stage: int) -> None:
    async with loaded(mesh, truth):
        mesh.at(await mesh.status(), stage).kill()


@pytest.mark.parametrize("stage", [*more(0, 1), 2])
async def test_without_a_spare_streams_wait_for_the_restart(
    mesh: PartsMesh, truth: Truth, stage: int
) -> None:
    await without_spares(mesh)
    async with loaded(mesh, truth):
        victim = mesh.at(await mesh.status(), stage)
        victim.kill()
        await mesh.until(lambda s: len(s.workers) == 2, "the worker to be lost")
        victim.start()
        await victim.wait_ready()


@pytest.mark.parametrize("stage", [0, *more(2)])
async def test_in_the_middle_of_prefill(mesh: PartsMesh, truth: Truth, stage: int) -> None:
    await truth.learn(mesh.target, LONG_PROMPTS)
    before = (await mesh.status()).pipelines[0].steps_done
    async with Load(mesh.target, LONG_PROMPTS) as load:
        status = await mesh.until(lambda s: s.pipelines[0].steps_done > before, "a first step")
        assert any(not stream.token_ids for stream in load.streams)
        mesh.at(status, stage).kill()
        await load.finish()
    check(truth, load.streams)


async def test_twice_in_a_row(mesh: PartsMesh, truth: Truth) -> None:
    """The one that took the place dies too, as soon as it serves; the first is back by then."""
    async with loaded(mesh, truth, LONG) as load:
        first = mesh.at(await mesh.status(), 1)
        first.kill()
        await load.until_more_tokens(NUM_LASTING)
        first.start()
        await first.wait_ready()
        mesh.at(await mesh.status(), 1).kill()
        await load.until_more_tokens(NUM_LASTING)


async def test_while_the_mesh_recovers(mesh: PartsMesh, truth: Truth) -> None:
    """A second stage dies as soon as the place of the first is taken, or before."""
    async with loaded(mesh, truth, LONG):
        status = await mesh.status()
        epoch, lost = status.pipelines[0].epoch.n, mesh.at(status, 1)
        lost.kill()
        await mesh.until(lambda s: s.pipelines[0].epoch.n > epoch, "the next epoch to begin")
        second = mesh.at(status, 0)
        second.kill()
        lost.start()
        second.start()


async def test_two_stages_at_once(mesh: PartsMesh, truth: Truth) -> None:
    async with loaded(mesh, truth):
        status = await mesh.status()
        lost = [mesh.at(status, stage) for stage in (0, 1)]
        for part in lost:
            part.kill()
        for part in lost:
            part.start()


async def test_all_stages_at_once(mesh: PartsMesh, truth: Truth) -> None:
    async with loaded(mesh, truth, MANY[:8]):
        status = await mesh.status()
        lost = [mesh.at(status, stage) for stage in range(3)]
        for part in lost:
            part.kill()
        for part in lost:
            part.start()


async def without_spares(mesh: PartsMesh) -> None:
    for spare in mesh.spares(await mesh.status()):
        spare.kill()
    await mesh.until_whole()

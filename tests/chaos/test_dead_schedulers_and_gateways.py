"""kill -9 of the scheduler and of a gateway under load."""

from __future__ import annotations

import time

import pytest
from support.chaos import DEMO_MODEL, MANY, NUM_LASTING, WAITING, Meshes, check, loaded, watched

from benchmarks.recovery.load import Load, Truth, asks
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh

pytestmark = pytest.mark.timeout(180)

LEASE_S = 2.0
TWO_GATEWAYS = MeshShape(model=DEMO_MODEL, stages=2, gateways=2, scheduler_options=WAITING)
OTHERS = tuple(asks(8, 77, max_tokens=150))


async def test_the_scheduler_dies_under_load(mesh: PartsMesh, truth: Truth) -> None:
    """Twice, so that a resubmitted stream is resubmitted again."""
    async with loaded(mesh, truth, MANY[:16]) as load:
        for _ in range(2):
            term = (await mesh.status()).term
            mesh.scheduler.kill()
            mesh.scheduler.start()
            await mesh.until(lambda s, term=term: s.term > term, "the next scheduler")
            await load.until_more_tokens(NUM_LASTING)


async def test_the_scheduler_and_a_worker_die_together(mesh: PartsMesh, truth: Truth) -> None:
    async with loaded(mesh, truth, MANY[:12]) as load:
        victim = mesh.at(await mesh.status(), 1)
        mesh.scheduler.kill()
        victim.kill()
        mesh.scheduler.start()
        await load.until_more_tokens(NUM_LASTING)


async def test_a_gateways_requests_leave_the_mesh_with_it(meshes: Meshes, truth: Truth) -> None:
    """Its blocks are free within the lease; the streams of the other gateway notice nothing."""
    async with watched(meshes.get(TWO_GATEWAYS)) as mesh:
        doomed = mesh.gateways[1]
        async with loaded(mesh, truth, MANY[:6]) as load:
            async with Load(doomed.facts["grpc"], OTHERS) as lost:
                await lost.until_tokens(4)
                running = len(OTHERS) + len(MANY[:6])
                await mesh.until(lambda s: s.queue.num_running == running, "all to run")
                doomed.kill()
                killed_s = time.monotonic()
                await mesh.until(
                    lambda s: s.num_gateways == 1 and s.queue.num_running <= len(MANY[:6]),
                    "the gateway's requests to be cancelled",
                )
                print(f"cancelled after {time.monotonic() - killed_s:.2f} s")
                assert time.monotonic() - killed_s < 2 * LEASE_S
            await load.until_more_tokens(NUM_LASTING)
        await mesh.until_idle()


async def test_a_frozen_gateways_requests_leave_too_and_go_on_when_it_thaws(
    meshes: Meshes, truth: Truth
) -> None:
    async with watched(meshes.get(TWO_GATEWAYS)) as mesh:
        await truth.learn(mesh.target, OTHERS)
        frozen = mesh.gateways[1]
        async with Load(frozen.facts["grpc"], OTHERS) as lost:
            await lost.until_tokens(4)
            frozen.freeze()
            await mesh.until(lambda s: s.num_gateways == 1, "the gateway to be missed")
            await mesh.until_idle(timeout_s=LEASE_S)
            frozen.thaw()
            await lost.finish()
        check(truth, lost.streams)

"""Two pipelines: one breaks, its requests go on in the other, whose own streams do not stop."""

from __future__ import annotations

import itertools
import time

import pytest
from support.chaos import DEMO_MODEL, NUM_LASTING, WAITING, Meshes, loaded, watched

from benchmarks.recovery.load import Stream, Truth
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh, Status

pytestmark = pytest.mark.timeout(180)

TWO_PIPELINES = MeshShape(model=DEMO_MODEL, stages=2, replicas=2, scheduler_options=WAITING)


async def test_requests_of_a_broken_pipeline_go_on_in_the_other(
    meshes: Meshes, truth: Truth
) -> None:
    async with watched(meshes.get(TWO_PIPELINES)) as mesh, loaded(mesh, truth) as load:
        status = await mesh.status()
        assert all(pipeline.num_running > 0 for pipeline in status.pipelines)
        broken, other = status.pipelines
        lost = mesh.at(status, 1, pipeline=0)
        lost.kill()
        killed_s = time.monotonic()
        # Nobody takes the place: all streams have gone on, so those of the broken one have moved.
        await until_all_go_on(mesh, load.streams, killed_s)
        status = await mesh.status()
        assert not serving(status, broken.pipeline_id)
        assert serving(status, other.pipeline_id)
        pauses = sorted(longest_pause_since(stream.times_s, killed_s) for stream in load.streams)
        print(f"pauses from {pauses[0]:.2f} to {pauses[-1]:.2f} s")


async def test_the_other_pipeline_does_not_stop(meshes: Meshes, truth: Truth) -> None:
    """Its steps go on while the broken one is mended."""
    async with watched(meshes.get(TWO_PIPELINES)) as mesh, loaded(mesh, truth) as load:
        status = await mesh.status()
        broken, other = status.pipelines
        mesh.at(status, 0, pipeline=0).kill()
        await mesh.until(lambda s: not serving(s, broken.pipeline_id), "one to be broken")
        before = steps(await mesh.status(), other.pipeline_id)
        await mesh.until(
            lambda s: steps(s, other.pipeline_id) > before + 20, "steps of the other", timeout_s=10
        )
        assert (await mesh.status()).pipelines[1].epoch.n == other.epoch.n
        await load.until_more_tokens(NUM_LASTING)


async def until_all_go_on(mesh: PartsMesh, streams: list[Stream], since_s: float) -> None:
    await mesh.until(
        lambda _: all(s.finished or s.times_s[-1] > since_s for s in streams), "all to go on"
    )


def longest_pause_since(times_s: list[float], since_s: float) -> float:
    pairs = itertools.pairwise(times_s)
    return max((b - a for a, b in pairs if b > since_s), default=0.0)


def serving(status: Status, pipeline_id: str) -> bool:
    return any(p.serving for p in status.pipelines if p.pipeline_id == pipeline_id)


def steps(status: Status, pipeline_id: str) -> int:
    return next(p.steps_done for p in status.pipelines if p.pipeline_id == pipeline_id)

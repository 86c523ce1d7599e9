"""Two pipelines: one breaks, and its requests go on in the other, whose own streams do not stop; or
a worker of the other one serves both."""

from __future__ import annotations

import io
import itertools
import time
from dataclasses import replace

import pytest
from rich.console import Console
from support.chaos import DEMO_MODEL, NUM_LASTING, WAITING, Meshes, is_member, loaded, watched

from benchmarks.recovery.load import Stream, Truth
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh, Status
from stagemesh.cli.status_view import render

pytestmark = pytest.mark.timeout(180)

SHARING = MeshShape(model=DEMO_MODEL, stages=2, replicas=2, scheduler_options=WAITING)
TWO_PIPELINES = replace(SHARING, scheduler_options=(*WAITING, "--no-share-workers"))


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


async def test_a_worker_serves_both_until_the_lost_one_is_back(
    meshes: Meshes, truth: Truth
) -> None:
    async with watched(meshes.get(SHARING)) as mesh, loaded(mesh, truth) as load:
        whole = await mesh.until(lambda s: not shared(s), "each worker to serve one")
        lost, lent = mesh.at(whole, 1, pipeline=0), mesh.at(whole, 1, pipeline=1)
        lost.kill()
        killed_s = time.monotonic()
        status = await mesh.until(
            lambda s: shared(s) == [lent.name] and all(p.serving for p in s.pipelines),
            "a worker of the other one to serve both",
        )
        print(f"both serve {time.monotonic() - killed_s:.2f} s after the loss")
        assert blocks(status) == [num // 2 for num in blocks(whole)]
        rows = [line for line in shown(status) if line.split()[:1] == [lent.name]]
        assert ["p0 p1" in row for row in rows] == [True]
        await until_all_go_on(mesh, load.streams, time.monotonic())
        lost.start()
        await mesh.until(
            lambda s: blocks(s) == blocks(whole) and not shared(s) and is_member(s, lost),
            "the place to be given back, and all blocks to be used",
        )
        await load.until_more_tokens(NUM_LASTING)
        assert mesh.at(await mesh.status(), 1, pipeline=0) is lost


def shared(status: Status) -> list[str]:
    """Workers with a place in each of the pipelines."""
    places = [name for pipeline in status.pipelines for name in pipeline.worker_ids]
    return sorted({name for name in places if places.count(name) > 1})


def blocks(status: Status) -> list[int]:
    return [pipeline.num_blocks for pipeline in status.pipelines]


def shown(status: Status) -> list[str]:
    """What `stagemesh status` says."""
    console = Console(file=io.StringIO(), width=160)
    with console.capture() as capture:
        console.print(render(status))
    return capture.get().splitlines()


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

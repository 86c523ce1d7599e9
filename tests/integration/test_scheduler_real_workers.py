"""The real scheduler with real workers: a kill in mid-stream, and the reference's tokens."""

from __future__ import annotations

import contextlib
import json
import signal
from contextlib import AbstractAsyncContextManager

from support.paths import shared
from support.pretend_gateway import PretendGateway, PretendMesh, pretend_mesh
from support.pretend_workers import until
from support.worker_links import WorkerProcess, worker_process

from protos import mesh_pb2
from stagemesh.sampling import SamplingSpec

MODEL = shared("models/stories260K")
NUM_TOKENS = 64


def own_worker(mesh: PretendMesh, name: str) -> AbstractAsyncContextManager[WorkerProcess]:
    return worker_process(MODEL, mesh.address, "--worker-id", name, "--num-blocks", "512")


CASES = json.loads((MODEL / "reference.json").read_text())["cases"]
NUMBERS = range(len(CASES))


async def streams(mesh: PretendMesh) -> PretendGateway:
    """The reference's requests, in mid-stream."""
    gateway = await mesh.gateway()
    await mesh.wait_serving()
    for number, case in enumerate(CASES):
        spec = SamplingSpec(temperature=0.0)
        await gateway.submit(number, tuple(case["prompt_ids"]), NUM_TOKENS, spec=spec)
    await until(lambda: all(len(gateway.tokens[n]) > 4 for n in NUMBERS), "tokens of all")
    return gateway


async def check_the_end(mesh: PretendMesh, gateway: PretendGateway) -> mesh_pb2.GetStatusResponse:
    await gateway.wait_finished(*NUMBERS)
    for number, case in enumerate(CASES):
        assert gateway.tokens[number] == case["output_ids_ignore_eos"][:NUM_TOKENS]
    status = await mesh.wait_idle()
    assert status.queue.num_finished == len(CASES)
    assert status.queue.num_preempted == 0, "nothing was computed from the beginning"
    return status


async def test_a_worker_is_killed_and_started_again_and_every_stream_is_right() -> None:
    async with (
        pretend_mesh(0, num_stages=2, lease_s=5.0) as mesh,
        own_worker(mesh, "first"),
        own_worker(mesh, "second") as second,
    ):
        gateway = await streams(mesh)
        second.signal(signal.SIGKILL)
        await until(lambda: not gateway.mesh[-1].serving, "the mesh to notice")
        assert len(gateway.finished) < len(CASES)
        async with own_worker(mesh, "second"):
            status = await check_the_end(mesh, gateway)
    assert all(worker.state == mesh_pb2.WORKER_STATE_SERVING for worker in status.workers)


def has_spares(status: mesh_pb2.GetStatusResponse) -> bool:
    return [w.state for w in status.workers].count(mesh_pb2.WORKER_STATE_READY) == 2


async def test_a_worker_is_killed_and_the_one_that_took_over_is_drained() -> None:
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(
            pretend_mesh(0, num_stages=2, num_replicas=1, lease_s=5.0)
        )
        names = ("w0", "w1", "w2", "w3")
        processes = {
            name: await stack.enter_async_context(own_worker(mesh, name)) for name in names
        }
        before = await mesh.wait_status(has_spares, "two stages and two spares")
        gateway = await streams(mesh)
        processes[before.pipelines[0].worker_ids[0]].signal(signal.SIGKILL)
        status = await mesh.wait_status(
            lambda status: status.pipelines[0].mending.join_ns > 0, "the mesh to be whole"
        )
        assert status.pipelines[0].mending.fill_ns < 2.5e9, "noticed by the kill, not by the lease"
        name = status.pipelines[0].worker_ids[0]
        response = await mesh.drain(name)
        assert response.successor_id not in ("", name)
        assert response.num_blocks_moved > 0
        assert await processes[name].wait() == 0
        status = await check_the_end(mesh, gateway)
        assert len(status.workers) == 2

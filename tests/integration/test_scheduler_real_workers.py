"""The real scheduler with real workers: a kill in mid-stream, and the reference's tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator

from support.paths import shared
from support.pretend_gateway import PretendMesh, pretend_mesh
from support.pretend_workers import until

from protos import mesh_pb2
from stagemesh.sampling import SamplingSpec

MODEL = shared("models/stories260K")
NUM_TOKENS = 64


@contextlib.asynccontextmanager
async def worker_process(mesh: PretendMesh, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stage_worker", "--model", str(MODEL), "--worker-id", name),
        *("--scheduler", mesh.address, "--listen", "127.0.0.1:0", "--num-blocks", "512"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_worker_is_killed_and_started_again_and_every_stream_is_right() -> None:
    cases = json.loads((MODEL / "reference.json").read_text())["cases"]
    numbers = range(len(cases))
    async with (
        pretend_mesh(0, num_stages=2, lease_s=2.0) as mesh,
        worker_process(mesh, "first"),
        worker_process(mesh, "second") as second,
    ):
        gateway = await mesh.gateway()
        await mesh.wait_serving()
        for number, case in enumerate(cases):
            spec = SamplingSpec(temperature=0.0)
            await gateway.submit(number, tuple(case["prompt_ids"]), NUM_TOKENS, spec=spec)
        await until(lambda: all(len(gateway.tokens[n]) > 4 for n in numbers), "tokens of all")
        second.kill()
        await until(lambda: not gateway.mesh[-1].serving, "the mesh to notice")
        assert len(gateway.finished) < len(cases)
        async with worker_process(mesh, "second"):
            await gateway.wait_finished(*numbers)
            for number, case in enumerate(cases):
                assert gateway.tokens[number] == case["output_ids_ignore_eos"][:NUM_TOKENS]
            status = await mesh.wait_idle()
    assert status.queue.num_finished == len(cases)
    assert all(worker.state == mesh_pb2.WORKER_STATE_SERVING for worker in status.workers)

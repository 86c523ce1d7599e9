"""Hours of traffic in a minute: nothing leaks, nothing fails, a third is cancelled.

STAGEMESH_SOAK_LOOPS in the environment makes it longer, which shows smaller leaks.
"""

from __future__ import annotations

import asyncio
import os
import random

import psutil
import pytest
from support.mesh import Mesh, running_mesh
from support.paths import shared
from support.thorough import THOROUGH
from support.waiting import wait_until

from stagemesh.bench.drive import Unwatched, closed_loop
from stagemesh.bench.grpc_client import grpc_client
from stagemesh.bench.samples import Sample
from stagemesh.bench.traces import TraceEntry, read_trace
from stagemesh.bench.workload import trace_asks, with_cancels

STREAMS = 64
CANCEL_SHARE = 0.33
# The first two warm up what is compared with the last.
LOOPS = max(3, int(os.environ.get("STAGEMESH_SOAK_LOOPS", "6" if THOROUGH else "3")))
SEED = 20261121


def anonymous_bytes(mesh: Mesh) -> dict[str, int]:
    """Resident memory of every process of the mesh that no file stands behind, whether or not a
    worker still shares it with the template that it was forked from."""
    memory = {
        f"{p['role']} {p['id']}": psutil.Process(p["pid"]).memory_info()
        for p in mesh.ready["processes"]
    }
    return {name: info.rss - info.shared for name, info in memory.items()}


async def replayed(target: str, trace: list[TraceEntry], seed: str) -> list[Sample]:
    """One pass over the trace, in its order but not at its times."""
    asks, _, num_left_out = trace_asks(trace, seed)
    assert num_left_out == 0
    asks = with_cancels(asks, CANCEL_SHARE, f"{seed} cancels")
    async with grpc_client(target, temperature=1.0, timeout_s=600.0) as client:
        return (await closed_loop(client, asks, STREAMS, Unwatched())).samples


@pytest.mark.timeout(900)
def test_loops_of_the_trace_leak_nothing() -> None:
    model = shared("models/stories260K")
    trace = read_trace(shared("traces/derived_azure_conv_512ctx.jsonl"))
    random.Random(SEED).shuffle(trace)
    del trace[len(trace) // (3 if THOROUGH else 6) :]
    after: list[dict[str, int]] = []
    with running_mesh(model, "--num-blocks", "600") as mesh:
        for loop in range(LOOPS):
            samples = asyncio.run(replayed(mesh.ready["grpc"], trace, f"{SEED} {loop}"))
            assert [sample.error for sample in samples if sample.error is not None] == []
            whole = [sample for sample in samples if sample.is_whole]
            assert all(sample.output_tokens == sample.ask.output_tokens for sample in whole)
            assert len(samples) == len(trace)
            assert len(trace) - len(whole) > len(trace) // 5
            status = mesh.wait_idle()
            assert status.queue.num_failed == 0
            wait_until(
                lambda: all(w.stats.sequences_held == 0 for w in mesh.status().workers),
                10.0,
                "the workers to have forgotten every sequence",
            )
            after.append(anonymous_bytes(mesh))
            wall_s = max(sample.ended_s for sample in samples)
            print(f"loop {loop + 1}: {wall_s:.1f} s, {after[-1]}")
    for process, after_loop_2 in after[1].items():
        assert after[LOOPS - 1][process] <= 1.05 * after_loop_2, process

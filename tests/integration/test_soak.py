"""Hours of traffic in two minutes: nothing leaks, nothing fails, a third is cancelled."""

from __future__ import annotations

import asyncio
import random

import psutil
import pytest
from support.mesh import Mesh, running_mesh, wait_until
from support.paths import shared

from benchmarks.trace_replay import read_trace, replay

LOOPS = 5
SEED = 20261121


def resident_bytes(mesh: Mesh) -> dict[str, int]:
    """Private resident memory of every process of the mesh."""
    return {
        f"{p['role']} {p['id']}": psutil.Process(p["pid"]).memory_full_info().uss
        for p in mesh.ready["processes"]
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_loops_of_the_trace_leak_nothing() -> None:
    model = shared("models/stories260K")
    trace = read_trace(shared("traces/derived_azure_conv_512ctx.jsonl"))
    random.Random(SEED).shuffle(trace)
    after: list[dict[str, int]] = []
    with running_mesh(model, "--num-blocks", "600") as mesh:
        for loop in range(LOOPS):
            result = asyncio.run(
                replay(mesh.ready["grpc"], trace, streams=64, cancel_share=0.33, seed=SEED + loop)
            )
            assert result.errors == []
            assert result.num_finished + result.num_cancelled == len(trace)
            assert result.num_cancelled > len(trace) // 5
            status = mesh.wait_idle()
            assert status.queue.num_failed == 0
            wait_until(
                lambda: all(w.stats.sequences_held == 0 for w in mesh.status().workers),
                10.0,
                "the workers to have forgotten every sequence",
            )
            after.append(resident_bytes(mesh))
            print(f"loop {loop + 1}: {result.wall_s:.1f} s, {after[-1]}")
    for process, after_loop_2 in after[1].items():
        assert after[LOOPS - 1][process] <= 1.05 * after_loop_2, process

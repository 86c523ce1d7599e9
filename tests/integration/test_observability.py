"""Where the time of real stages goes, as status, metrics and traces tell it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mesh import Mesh, greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.waiting import wait_until

from protos import mesh_pb2
from scheduler.options import SchedulerOptions
from scheduler.server import serve


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_mesh(DEMO_MODEL, stages=2) as running:
        yield running


def told_ns(worker: mesh_pb2.WorkerStatus) -> int:
    stats = worker.stats
    return stats.busy_ns + stats.serialise_ns + stats.output_wait_ns + stats.input_wait_ns


def next_heartbeats(mesh: Mesh) -> tuple[float, mesh_pb2.GetStatusResponse]:
    """A status right after every worker has told its counters anew."""
    before = {worker.worker_id: told_ns(worker) for worker in mesh.status().workers}
    found: list[mesh_pb2.GetStatusResponse] = []

    def all_told() -> bool:
        found.append(mesh.status())
        return all(told_ns(worker) > before[worker.worker_id] for worker in found[-1].workers)

    wait_until(all_told, 10.0, "a heartbeat of every worker")
    return time.monotonic(), found[-1]


def test_the_states_of_a_stage_add_up_to_the_time_that_passed(mesh: Mesh) -> None:
    began_s, before = next_heartbeats(mesh)
    mesh.generate_all([greedy_request([1, n], 100, ignore_eos=True) for n in range(4)])
    ended_s, after = next_heartbeats(mesh)
    for old, new in zip(before.workers, after.workers, strict=True):
        passed_s = (told_ns(new) - told_ns(old)) / 1e9
        # A heartbeat is at most half a second old when it is looked at.
        assert passed_s == pytest.approx(ended_s - began_s, abs=1.0)
        assert new.stats.busy_ns > old.stats.busy_ns
        assert new.stats.serialise_ns > old.stats.serialise_ns
        # A device thread is busy for as long as its steps compute.
        computed_ns = new.stats.compute_ns - old.stats.compute_ns
        assert new.stats.busy_ns - old.stats.busy_ns == pytest.approx(computed_ns, rel=0.1)
    (pipeline,) = after.pipelines
    assert pipeline.unscheduled_ns > before.pipelines[0].unscheduled_ns


def test_a_trace_of_what_two_stages_do(mesh: Mesh, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    command = [
        *(sys.executable, "-m", "stagemesh.cli.main", "trace", "--seconds", "1.5"),
        *("--scheduler", mesh.ready["scheduler"], "-o", str(output)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tracing:
        while tracing.poll() is None:
            mesh.generate_all([greedy_request([1, n], 30, ignore_eos=True) for n in range(4)])
        assert tracing.stdout is not None
        assert str(output) in tracing.stdout.read()
    assert tracing.returncode == 0
    entries = json.loads(output.read_text())["traceEvents"]
    tracks = {
        entry["args"]["name"]: (entry["pid"], entry["tid"])
        for entry in entries
        if entry["ph"] == "M" and entry["name"] == "thread_name"
    }
    steps = {entry["id"] for entry in entries if entry["ph"] == "s"}
    assert len(steps) > 10
    for stage in range(2):
        (track,) = (where for name, where in tracks.items() if name.startswith(f"stage {stage} w"))
        computed = [e for e in entries if e["ph"] == "X" and (e["pid"], e["tid"]) == track]
        assert len(computed) == len(steps)
        assert sum(entry["dur"] for entry in computed) < 3e6, "no more than the time that passed"
    assert any(entry["name"] == "round" for entry in entries)


async def test_a_scheduler_is_asked_for_metrics() -> None:
    facts: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
    options = SchedulerOptions(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
    serving = asyncio.create_task(serve(options, lambda known: facts.set_result(dict(known))))
    url = f"http://{(await facts)['metrics']}/metrics"
    text = (await asyncio.to_thread(_get, url)).decode()
    assert "stagemesh_scheduler_waiting_requests 0.0" in text
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        return bytes(response.read())

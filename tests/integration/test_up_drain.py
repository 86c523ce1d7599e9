"""Workers that are told to go hand their layers over live: by `stagemesh drain`, and by SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from support.mesh import Mesh, collect, greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.waiting import wait_until

from protos import mesh_pb2
from protos import text_generation_pb2 as pb
from stagemesh.cli.drain import DrainOptions, drain
from stagemesh.errors import InvalidRequest

TIMEOUT_S = 60.0
# More than can be computed before a drain is over.
REQUEST = greedy_request("Once upon a time", 240, ignore_eos=True)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    options = ("--spares", "1", "--restart", "--batch-invariant")
    with running_mesh(DEMO_MODEL, *options, stages=2) as running:
        yield running


@pytest.fixture(scope="module")
def expected(mesh: Mesh) -> list[int]:
    return mesh.generate(REQUEST).token_ids


def whole(mesh: Mesh) -> mesh_pb2.GetStatusResponse:
    """The status, once two workers serve and a third one has layers in reserve."""

    def is_whole() -> bool:
        status = mesh.status()
        ready = [w for w in status.workers if w.state == mesh_pb2.WORKER_STATE_READY]
        return status.mesh.serving and len(status.workers) == 3 and len(ready) == 1

    wait_until(is_whole, TIMEOUT_S, "two stages and a spare")
    return mesh.status()


def meanwhile(mesh: Mesh, act: Callable[[], None]) -> list[int]:
    """The tokens of a stream in whose middle `act` is called."""
    stream = mesh.start(REQUEST)
    first: pb.GenerateResponse = next(stream)
    act()
    return collect([first, *stream]).token_ids


def test_a_stage_moves_while_a_stream_goes_through_it(mesh: Mesh, expected: list[int]) -> None:
    worker, other = whole(mesh).pipelines[0].worker_ids
    command = (sys.executable, "-m", "stagemesh.cli.main", "drain", worker, "--scheduler")
    said: list[str] = []

    def act() -> None:
        done = subprocess.run(
            [*command, mesh.ready["scheduler"]], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)

    before = mesh.status().pipelines[0].epoch.n
    assert meanwhile(mesh, act) == expected
    assert said[0].startswith(f"{worker} has been told to end: ")
    assert "of KV moved" in said[0]
    after = whole(mesh).pipelines[0]
    assert after.epoch.n == before + 1
    assert after.worker_ids[1] == other
    assert worker not in after.worker_ids
    wait_until(lambda: f"{worker} is back" in mesh.log.read_text(), TIMEOUT_S, "it to be back")


def test_a_worker_may_stay_as_a_spare(mesh: Mesh, expected: list[int]) -> None:
    status = whole(mesh)
    worker = status.pipelines[0].worker_ids[1]
    (spare,) = {w.worker_id for w in status.workers} - set(status.pipelines[0].worker_ids)
    options = DrainOptions(
        worker=worker, to=spare, stay=True, scheduler=mesh.ready["scheduler"], timeout_s=TIMEOUT_S
    )
    assert meanwhile(mesh, lambda: print(asyncio.run(drain(options)))) == expected
    after = whole(mesh)
    assert after.pipelines[0].worker_ids[1] == spare
    pids = {w.worker_id: w.pid for w in status.workers}
    assert {w.worker_id: w.pid for w in after.workers} == pids


def test_whoever_is_no_worker_cannot_be_drained(mesh: Mesh) -> None:
    options = DrainOptions(worker="worker-9", scheduler=mesh.ready["scheduler"])
    with pytest.raises(InvalidRequest, match="worker-9"):
        asyncio.run(drain(options))


def test_a_rolling_restart_of_all_workers(mesh: Mesh, expected: list[int]) -> None:
    """SIGTERM, one after another. What was handed over is not computed again."""
    for worker in whole(mesh).workers:
        pids = [w.pid for w in whole(mesh).workers if w.worker_id == worker.worker_id]
        tokens = meanwhile(mesh, lambda pid=pids[0]: os.kill(pid, signal.SIGTERM))  # type: ignore[misc]
        assert tokens == expected
        wait_until(
            lambda old=pids[0], name=worker.worker_id: any(  # type: ignore[misc]
                w.worker_id == name and w.pid != old for w in mesh.status().workers
            ),
            TIMEOUT_S,
            f"{worker.worker_id} to be back",
        )
    assert whole(mesh).queue.num_preempted == 0

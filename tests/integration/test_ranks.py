"""Workers whose layers are split over ranks that are processes: they serve, and die together."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.mesh import Mesh, greedy_request, running_mesh, started_up
from support.paths import DEMO_MODEL, shared
from support.waiting import lives, wait_gone, wait_until

from protos import mesh_pb2, mesh_pb2_grpc

MODEL = shared("models/stories260K")
NUM_TOKENS = 200
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Two ranks in the first stage, one in the second."""
    with running_mesh(DEMO_MODEL, "--tensor-parallel", "2,1", "--restart", stages=2) as running:
        yield running


@pytest.fixture(scope="module")
def expected(mesh: Mesh) -> list[int]:
    return mesh.generate(long_request()).token_ids


def long_request() -> Any:
    return greedy_request("Once upon a time", NUM_TOKENS, ignore_eos=True)


@functools.cache
def cases() -> list[dict[str, Any]]:
    return list(json.loads((MODEL / "reference.json").read_text())["cases"])


def ranks_of(pid: int) -> list[int]:
    """A worker has no other children."""
    return [child.pid for child in psutil.Process(pid).children()]


def ranked_worker(mesh: Mesh) -> int:
    return next(w.pid for w in mesh.status().workers if w.tensor_parallel == 2)


def test_status_shows_the_ranks_and_counts_their_memory(mesh: Mesh) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stagemesh.cli.main", "status"),
            *("--scheduler", mesh.ready["scheduler"]),
        ],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "cpu ×2 float32" in done.stdout
    first, second = sorted(mesh.status().workers, key=lambda worker: worker.span.start)
    assert (first.tensor_parallel, second.tensor_parallel) == (2, 1)
    assert (first.span.start, first.span.end) == (0, 4)  # of six layers: in proportion
    (rank,) = ranks_of(first.pid)
    wait_until(
        lambda: ranked_stats(mesh).rss_anon_bytes > psutil.Process(rank).memory_info().data // 8,
        TIMEOUT_S,
        "a heartbeat",
    )


def descriptors(pid: int) -> set[str]:
    """What is open in a process, but for the two streams that it writes to."""
    links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if int(link.name) > 2]
    return {os.readlink(link) for link in links}


def test_a_rank_that_was_forked_has_nothing_of_its_worker(mesh: Mesh) -> None:
    worker = ranked_worker(mesh)
    (rank,) = ranks_of(worker)
    in_common = descriptors(worker) & descriptors(rank)
    assert all("(deleted)" in each for each in in_common), "but the memory in which they meet"


def ranked_stats(mesh: Mesh) -> Any:
    return next(w.stats for w in mesh.status().workers if w.tensor_parallel == 2)


@pytest.mark.parametrize(
    ("number", "who"),
    [
        (signal.SIGKILL, "another rank"),
        (signal.SIGKILL, "rank 0"),
        (signal.SIGSTOP, "another rank"),
    ],
)
def test_a_stream_goes_on_when_a_rank_dies_or_hangs(
    mesh: Mesh, expected: list[int], number: signal.Signals, who: str
) -> None:
    worker = ranked_worker(mesh)
    (rank,) = ranks_of(worker)
    stream = mesh.start(long_request())
    tokens: list[int] = []
    while len(tokens) < 8:  # more steps than those of which nothing is known
        tokens += next(stream).delta.token_ids
    os.kill(rank if who == "another rank" else worker, number)
    for response in stream:
        tokens += response.delta.token_ids
    assert tokens == expected
    assert not lives(worker)
    wait_until(lambda: not lives(rank), 5.0, "the other rank to end")
    wait_until(lambda: len(mesh.status().workers) == 2, TIMEOUT_S, "the worker to be back")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_killed_with_up_or_stopped_leaves_nothing(number: signal.Signals) -> None:
    """Also ranks that are executed, as those of a worker that no template forked."""
    with started_up("--stages", "1", "--tensor-parallel", "2") as up:
        pids = up.pids
        pids += [rank for pid in list(pids) for rank in ranks_of(pid)]
        assert len(pids) == 4
        up.process.send_signal(number)
        up.process.wait(TIMEOUT_S)
        wait_gone(pids)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("3", "--tensor-parallel 3: query heads 8 is no multiple of it"),
        ("2,1,1", "--tensor-parallel has 3 numbers for 2 stages"),
        ("0", "--tensor-parallel must be numbers from 1 on, not 0"),
    ],
)
def test_numbers_that_do_not_fit_are_one_sentence(option: str, told: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stagemesh.cli.main", "up", "--stages", "2"),
            *("--tensor-parallel", option, "--grpc-port", "0", "--http-port", "0"),
            *("--scheduler-port", "0"),
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode != 0
    assert told in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("transport", "ranks"), [("memory", "1,4"), ("gloo", "2,1")])
def test_the_reference_of_stories260k(
    monkeypatch: pytest.MonkeyPatch, transport: str, ranks: str
) -> None:
    monkeypatch.setenv("STAGEMESH_RANK_TRANSPORT", transport)
    some = cases()[::5]
    with running_mesh(MODEL, "--tensor-parallel", ranks, stages=2) as mesh:
        outputs = mesh.generate_all(greedy_request(c["prompt_ids"], 64) for c in some)
    assert [output.token_ids for output in outputs] == [case["output_ids"] for case in some]


def test_a_stage_moves_from_ranks_to_ranks_with_its_pages() -> None:
    with running_mesh(DEMO_MODEL, "--tensor-parallel", "2", "--spares", "1", stages=1) as mesh:
        wanted = mesh.generate(long_request()).token_ids
        wait_until(lambda: len(mesh.status().workers) == 2, TIMEOUT_S, "the spare")
        (worker,) = mesh.status().pipelines[0].worker_ids
        stream = mesh.start(long_request())
        tokens = list(next(stream).delta.token_ids)
        scheduler = mesh_pb2_grpc.SchedulerStub(mesh.scheduler_channel)
        drained = scheduler.DrainWorker(
            mesh_pb2.DrainWorkerRequest(worker_id=worker), timeout=TIMEOUT_S
        )
        for response in stream:
            tokens += response.delta.token_ids
    assert tokens == wanted
    assert drained.successor_id != worker
    assert drained.num_blocks_moved > 0

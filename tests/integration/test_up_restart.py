"""`stagemesh up --spares --restart`: whatever dies is started again where it was."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mesh import Mesh, greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.waiting import wait_until

from stagemesh.cli.child import Child
from stagemesh.cli.held_ports import HeldPorts
from stagemesh.cli.keeper import Keeper
from stagemesh.cli.services import Service
from stagemesh.cli.up_options import UpOptions
from stagemesh.rpc import RpcServer

TIMEOUT_S = 60.0
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_mesh(DEMO_MODEL, "--spares", "1", "--restart", stages=2) as running:
        yield running


@pytest.fixture(scope="module")
def expected(mesh: Mesh) -> list[int]:
    return mesh.generate(greedy_request("Once upon a time", NUM_TOKENS, ignore_eos=True)).token_ids


def processes(mesh: Mesh) -> dict[str, dict[str, object]]:
    """By id, as the ready file has them now."""
    content = json.loads(mesh.ready_file.read_text())
    return {process["id"]: process for process in content["processes"]}


def test_spares_are_there_and_serve_nothing(mesh: Mesh) -> None:
    assert len(mesh.pids("worker")) == 3
    (spare,) = (p for p in mesh.ready["processes"] if p["spare"])
    assert spare["role"] == "worker"
    assert len(mesh.status().workers) == 3
    assert [len(p.worker_ids) for p in mesh.status().pipelines] == [2]
    assert f"{spare['id']}" in mesh.log.read_text()


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_stream_goes_on_while_what_was_killed_comes_back(
    mesh: Mesh, expected: list[int], role: str
) -> None:
    before = processes(mesh)
    victim = mesh.status().pipelines[0].worker_ids[0] if role == "worker" else role
    stream = mesh.start(greedy_request("Once upon a time", NUM_TOKENS, ignore_eos=True))
    tokens = list(next(stream).delta.token_ids)
    os.kill(int(str(before[victim]["pid"])), signal.SIGKILL)
    for response in stream:
        tokens += response.delta.token_ids
    assert tokens == expected
    wait_until(lambda: processes(mesh)[victim] != before[victim], TIMEOUT_S, f"{victim} to be back")
    assert processes(mesh)[victim]["address"] == before[victim]["address"]
    wait_until(lambda: len(mesh.status().workers) == 3, TIMEOUT_S, "three workers")


def test_a_gateway_that_was_killed_serves_again_at_its_address(
    mesh: Mesh, expected: list[int]
) -> None:
    before = processes(mesh)
    os.kill(int(str(before["gateway"]["pid"])), signal.SIGKILL)
    wait_until(lambda: processes(mesh)["gateway"] != before["gateway"], TIMEOUT_S, "the gateway")
    request = greedy_request("Once upon a time", NUM_TOKENS, ignore_eos=True)
    call = mesh.stub.Generate(request, timeout=TIMEOUT_S, wait_for_ready=True)
    assert [token for each in call for token in each.delta.token_ids] == expected


class View:
    """A keeper's, that remembers."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_line(self, process: str, line: str) -> None:
        pass

    def on_started(self, process: str, role: str, pid: int) -> None:
        self.told.append("started")

    def on_ready(self, process: str) -> None:
        self.told.append("ready")

    def on_restarting(self, process: str, why: str, pause_s: float) -> None:
        self.told.append(why)

    def on_restarted(self, process: str, pid: int) -> None:
        self.told.append("restarted")


async def test_nothing_is_started_after_the_stop() -> None:
    view, stop = View(), asyncio.Event()
    command = (sys.executable, "-c", "raise SystemExit(0)")
    keeper = Keeper(Service("worker", "worker-0", command, os.environ), view, None)
    await keeper.start()
    first = keeper.child

    def is_final(child: Child) -> bool:
        asyncio.get_running_loop().call_soon(stop.set)
        return False

    await asyncio.wait_for(keeper.run(is_final, stop), TIMEOUT_S)
    assert keeper.child is first
    assert view.told == ["started", "has left"]


async def test_a_process_that_cannot_be_started_again_is_tried_again(tmp_path: Path) -> None:
    program, away = tmp_path / "service", tmp_path / "away"
    program.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    program.chmod(0o755)

    class PuttingBack(View):
        def on_restarting(self, process: str, why: str, pause_s: float) -> None:
            super().on_restarting(process, why, pause_s)
            if why.startswith("cannot"):
                away.rename(program)

    view, stop, lives = PuttingBack(), asyncio.Event(), set[int]()
    keeper = Keeper(Service("worker", "worker-0", (str(program),), os.environ), view, None)
    await keeper.start()

    def is_final(child: Child) -> bool:
        lives.add(child.pid)
        if len(lives) == 1:
            program.rename(away)
        return len(lives) == 2

    await asyncio.wait_for(keeper.run(is_final, stop), TIMEOUT_S)
    assert view.told == [
        "started",
        "is lost: the process exited with 3",
        "cannot be started: No such file or directory",
    ]


async def test_a_port_is_kept_from_everybody_but_a_listener() -> None:
    with contextlib.closing(HeldPorts()) as ports:
        port = ports.hold("127.0.0.1")
        options = ports.hold_fronts(UpOptions(grpc_port=0, http_port=0, scheduler_port=0))
        assert len({port, options.grpc_port, options.http_port, options.scheduler_port}) == 4
        for _ in range(2):  # one life after another
            server = RpcServer(f"127.0.0.1:{port}")
            assert await server.start() == f"127.0.0.1:{port}"
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            await server.stop(0)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))

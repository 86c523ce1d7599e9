"""Workers that `up` forks from a template: they are what executed ones are, and end as surely."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from support.mesh import collect, greedy_request, template_environ
from support.paths import DEMO_MODEL
from support.waiting import wait_until

from protos import text_generation_pb2_grpc as pb_grpc
from stagemesh.cli.child import Child
from stagemesh.cli.worker_template import WorkerTemplate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="templates are for Linux")

TIMEOUT_S = 60.0


class Up:
    """`stagemesh up --restart` with a template of its own."""

    def __init__(self, process: subprocess.Popen[bytes], ready_file: Path) -> None:
        self.process = process
        self._ready_file = ready_file

    @property
    def ready(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._ready_file.read_text())
        return found

    def workers(self) -> list[psutil.Process]:
        """Those that live."""
        pids = [p["pid"] for p in self.ready["processes"] if p["role"] == "worker"]
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def template(self) -> psutil.Process:
        (found,) = (
            child
            for child in psutil.Process(self.process.pid).children()
            if "stage_worker.template" in child.cmdline()
        )
        return found

    def generate(self) -> list[int]:
        with grpc.insecure_channel(self.ready["grpc"]) as channel:
            request = greedy_request("Once upon a time", 8)
            stub = pb_grpc.TextGenerationStub(channel)
            return collect(stub.Generate(request, timeout=TIMEOUT_S)).token_ids


@contextlib.contextmanager
def up(tmp_path: Path) -> Iterator[Up]:
    ready_file = tmp_path / "ready.json"
    command = [
        *(sys.executable, "-m", "stagemesh.cli.main", "up", "--model", str(DEMO_MODEL)),
        *("--stages", "2", "--restart", "--grpc-port", "0", "--http-port", "0"),
        *("--scheduler-port", "0", "--ready-file", str(ready_file)),
    ]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=template_environ()) as process,
    ):
        everyone: list[psutil.Process] = []
        try:
            wait_until(ready_file.exists, TIMEOUT_S, "the mesh to serve")
            everyone = psutil.Process(process.pid).children(recursive=True)
            yield Up(process, ready_file)
            if process.poll() is None:
                everyone += psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT_S)
            print((tmp_path / "log").read_text())
        _, left = psutil.wait_procs(everyone, timeout=10)
        assert not left


def test_a_lost_worker_and_then_the_template(tmp_path: Path) -> None:
    with up(tmp_path) as mesh:
        template = mesh.template()
        before = mesh.workers()
        assert [worker.ppid() for worker in before] == [template.pid] * 2
        # Each leads a session of its own, so that what it leaves behind can be ended with it.
        assert [os.getsid(worker.pid) for worker in before] == [worker.pid for worker in before]
        tokens = mesh.generate()

        before[0].kill()
        wait_until(lambda: _all_new(mesh, before[:1]), TIMEOUT_S, "another worker")
        assert [worker.ppid() for worker in mesh.workers()] == [template.pid] * 2
        assert mesh.generate() == tokens

        before = mesh.workers()
        template.kill()
        wait_until(lambda: _all_new(mesh, before), TIMEOUT_S, "workers that were executed")
        assert [worker.ppid() for worker in mesh.workers()] == [mesh.process.pid] * 2
        assert mesh.generate() == tokens


def _all_new(mesh: Up, before: list[psutil.Process]) -> bool:
    return len(mesh.workers()) == 2 and not {w.pid for w in mesh.workers()} & {
        w.pid for w in before
    }


def test_nothing_is_left_when_up_is_killed_while_a_worker_is_stopped(tmp_path: Path) -> None:
    with up(tmp_path) as mesh:
        everyone = psutil.Process(mesh.process.pid).children(recursive=True)
        mesh.workers()[0].suspend()
        mesh.process.kill()
        _, left = psutil.wait_procs(everyone, timeout=20)
        assert not left
        mesh.process.wait(TIMEOUT_S)


def _ignore(_name: str, _line: str) -> None:
    pass


@contextlib.asynccontextmanager
async def template() -> Any:
    found = WorkerTemplate()
    await found.begin(template_environ(), _ignore)
    try:
        yield found
    finally:
        await found.end()


async def _start(found: WorkerTemplate, *options: str, **environ: str) -> Child:
    command = [sys.executable, "-m", "stage_worker", *options]
    environment = {**template_environ(), **environ}
    return await Child.start("worker", "w", command, environment, found.start)


async def _end_of(child: Child) -> str:
    lines: list[str] = []
    async with asyncio.timeout(TIMEOUT_S):
        await child.pump(lambda _, line: lines.append(line), None)
    assert not child.alive
    return f"{child.failure()}"


async def test_a_worker_that_fails_says_why_and_one_that_is_killed_how() -> None:
    async with template() as found:
        child = await _start(found, "--model", "/nowhere", "--scheduler", "127.0.0.1:1")
        assert psutil.Process(child.pid).ppid() != os.getpid()
        assert "/nowhere" in await _end_of(child)
        child = await _start(found, STAGEMESH_MODEL=str(DEMO_MODEL))
        child.signal(signal.SIGKILL)
        assert "was ended by SIGKILL" in await _end_of(child)


async def test_another_environment_has_its_worker_executed() -> None:
    async with template() as found:
        child = await _start(found, "--model", "/nowhere", MALLOC_ARENA_MAX="1")
        assert psutil.Process(child.pid).ppid() == os.getpid()
        assert "/nowhere" in await _end_of(child)


async def test_a_template_that_does_not_answer_is_done_without() -> None:
    async with template() as found:
        child = await _start(found, "--model", "/nowhere")
        forker = psutil.Process(child.pid).parent()
        await _end_of(child)
        assert forker is not None
        forker.suspend()
        child = await _start(found, "--model", "/nowhere")
        assert psutil.Process(child.pid).ppid() == os.getpid()
        # Nor does it start that worker after all, once it goes on.
        forker.resume()
        await _end_of(child)
        again = await _start(found, "--model", "/nowhere")
        assert [each.pid for each in forker.children()] == [again.pid]
        await _end_of(again)

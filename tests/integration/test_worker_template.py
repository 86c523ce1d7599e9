"""Workers that `up` forks from a template: they are what executed ones are, and end as surely."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest
from support.mesh import Up, collect, greedy_request, started_up
from support.paths import DEMO_MODEL
from support.template import template_environ
from support.waiting import wait_until

from protos import text_generation_pb2_grpc as pb_grpc
from stagemesh.cli.child import Child
from stagemesh.cli.worker_template import WorkerTemplate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="templates are for Linux")

TIMEOUT_S = 60.0


@contextlib.contextmanager
def restarting() -> Iterator[Up]:
    """`stagemesh up --restart` with a template of its own, which leaves no process behind."""
    everyone: list[psutil.Process] = []
    with started_up("--stages", "2", "--restart") as up:
        everyone += psutil.Process(up.process.pid).children(recursive=True)
        yield up
        if up.process.poll() is None:
            everyone += psutil.Process(up.process.pid).children(recursive=True)
            up.process.send_signal(signal.SIGINT)
            assert up.process.wait(TIMEOUT_S) == 0
    _, left = psutil.wait_procs(everyone, timeout=20)
    assert not left


def workers_of(up: Up) -> list[psutil.Process]:
    """Those that live."""
    pids = [p["pid"] for p in up.ready["processes"] if p["role"] == "worker"]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def template_of(up: Up) -> psutil.Process:
    (found,) = (
        child
        for child in psutil.Process(up.process.pid).children()
        if "stage_worker.template" in child.cmdline()
    )
    return found


def generate(up: Up) -> list[int]:
    with grpc.insecure_channel(up.ready["grpc"]) as channel:
        request = greedy_request("Once upon a time", 8)
        stub = pb_grpc.TextGenerationStub(channel)
        return collect(stub.Generate(request, timeout=TIMEOUT_S)).token_ids


def test_a_lost_worker_and_then_the_template() -> None:
    with restarting() as up:
        template = template_of(up)
        before = workers_of(up)
        assert [worker.ppid() for worker in before] == [template.pid] * 2
        # Each leads a session of its own, so that what it leaves behind can be ended with it.
        assert [os.getsid(worker.pid) for worker in before] == [worker.pid for worker in before]
        tokens = generate(up)

        before[0].kill()
        wait_until(lambda: _all_new(up, before[:1]), TIMEOUT_S, "another worker")
        assert [worker.ppid() for worker in workers_of(up)] == [template.pid] * 2
        assert generate(up) == tokens

        before = workers_of(up)
        template.kill()
        wait_until(lambda: _all_new(up, before), TIMEOUT_S, "workers that were executed")
        assert [worker.ppid() for worker in workers_of(up)] == [up.process.pid] * 2
        assert generate(up) == tokens


def _all_new(up: Up, before: list[psutil.Process]) -> bool:
    now = {worker.pid for worker in workers_of(up)}
    return len(now) == 2 and not now & {worker.pid for worker in before}


def test_nothing_is_left_when_up_is_killed_while_a_worker_is_stopped() -> None:
    with restarting() as up:
        workers_of(up)[0].suspend()
        up.process.kill()
        up.process.wait(TIMEOUT_S)


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

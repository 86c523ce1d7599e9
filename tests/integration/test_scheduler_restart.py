"""The scheduler process from outside: how it ends, and workers that find the next one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from support.pretend_gateway import PretendMesh, prompt_of
from support.pretend_streams import EVERYBODY, streams
from support.pretend_workers import Shape, until

from stagemesh.rpc import make_channel

Process = asyncio.subprocess.Process


@contextlib.asynccontextmanager
async def scheduler_process(listen: str, scratch: Path) -> AsyncIterator[tuple[Process, str]]:
    """(process, address)"""
    ready_file = scratch / "ready.json"
    ready_file.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler", "--listen", listen, "--stages", "2"),
        *("--ready-file", str(ready_file), "--lease", "1s", "--heartbeat-interval", "100ms"),
    )
    try:
        await until(lambda: ready_file.exists(), "the scheduler to listen")
        yield process, json.loads(ready_file.read_text())["address"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run_scheduler(*arguments: str) -> tuple[int | None, str]:
    """(exit code, what it said) of a scheduler that is not to run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler", *arguments), stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    return process.returncode, said.decode()


async def test_it_ends_well_when_told_to(tmp_path: Path) -> None:
    async with scheduler_process("127.0.0.1:0", tmp_path) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_port_in_use_and_a_wrong_option_are_one_line_each(tmp_path: Path) -> None:
    async with scheduler_process("127.0.0.1:0", tmp_path) as (_, address):
        code, said = await run_scheduler("--listen", address)
        assert code == 1
        assert said.splitlines()[-1].endswith(f"{address} is in use by another process")
    code, said = await run_scheduler("--lease", "1s", "--heartbeat-interval", "2s")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "--lease" in said


async def test_workers_find_the_next_scheduler_with_what_they_hold(tmp_path: Path) -> None:
    async with scheduler_process("127.0.0.1:0", tmp_path) as (process, address):
        async with make_channel(address) as channel:
            mesh = PretendMesh(address, channel)
            workers = [await mesh.worker("w0"), await mesh.worker("w1")]
            first = await mesh.wait_serving()
            process.kill()
            await process.wait()
        for worker in workers:
            await worker.detach()
    async with scheduler_process(address, tmp_path), make_channel(address) as channel:
        mesh = PretendMesh(address, channel)
        for worker in reversed(workers):
            worker.attach()
        second = await mesh.wait_serving()
        assert second.term > first.term
        assert list(second.pipelines[0].worker_ids) == list(first.pipelines[0].worker_ids)
        gateway = await mesh.gateway()
        await gateway.submit(1, prompt_of(1, 12), 20)
        await gateway.wait_finished(1)
        gateway.check(1)
        await gateway.close()
        for worker in workers:
            assert worker.num_loads == 1
            await worker.kill()


async def test_a_scheduler_that_was_frozen_goes_on_with_everybody(tmp_path: Path) -> None:
    async with (
        scheduler_process("127.0.0.1:0", tmp_path) as (process, address),
        make_channel(address) as channel,
    ):
        mesh = PretendMesh(address, channel)
        for name in ("w0", "w1"):
            await mesh.worker(name)
        await mesh.wait_serving()
        gateway = await streams(mesh, max_tokens=200)
        process.send_signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        await until(lambda: time.monotonic() > frozen_s + 2.5, "more than two leases")
        process.send_signal(signal.SIGCONT)
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        status = await mesh.wait_idle()
        assert status.queue.num_preempted == status.queue.num_aborted == 0
        assert {worker.worker_id for worker in status.workers} == {"w0", "w1"}
        await gateway.close()
        for worker in mesh.workers.values():
            assert worker.num_loads == 1
            await worker.kill()


async def test_a_term_that_is_too_low_is_raised_or_ends_the_scheduler(tmp_path: Path) -> None:
    async with (
        scheduler_process("127.0.0.1:0", tmp_path) as (process, address),
        make_channel(address) as channel,
    ):
        mesh = PretendMesh(address, channel)
        ahead = time.time_ns() + 10**15
        for name in ("w0", "w1"):
            await mesh.worker(name, shape=Shape(followed_term=ahead))
        assert (await mesh.wait_serving()).term == ahead + 1
        gateway = await streams(mesh, max_tokens=20)
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        await mesh.worker("w2", shape=Shape(followed_term=ahead + 2))
        assert await process.wait() == 1, "another scheduler has been followed since"
        await gateway.close()
        for worker in mesh.workers.values():
            await worker.kill()

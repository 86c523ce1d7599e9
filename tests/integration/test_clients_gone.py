"""Gateways and clients that die, stand still or vanish: nothing of theirs stays in the mesh."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from support.hosts import Host, hosts
from support.paths import DEMO_MODEL, REPO
from support.pretend_gateway import PretendMesh, pretend_mesh
from support.pretend_workers import until
from support.scripted_scheduler import ScriptedScheduler, scripted_gateway
from support.waiting import wait_until

from protos import mesh_pb2
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

CLIENT = REPO / "tests" / "support" / "client_process.py"
SCHEDULER = REPO / "tests" / "support" / "paced_scheduler.py"
NUM_STREAMS = 6
LENGTH = 240


@asynccontextmanager
async def gateway_process(
    scheduler: str, scratch: Path
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """(process, where it serves gRPC)"""
    ready = scratch / "ready.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "--model", str(DEMO_MODEL), "--host", "127.0.0.1"),
        *("--grpc-port", "0", "--http-port", "0", "--scheduler", scheduler),
        *("--ready-file", str(ready)),
        cwd=REPO,
    )
    try:
        await until(ready.exists, "the gateway to listen")
        yield process, json.loads(ready.read_text())["grpc"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def long_request() -> pb.GenerateRequest:
    """Token ids that the pretended model has."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[3, 4, 5]),
        stopping=pb.StoppingCriteria(max_tokens=LENGTH, ignore_eos=True),
    )


async def num_tokens_left(call: grpc.aio.UnaryStreamCall) -> int:  # type: ignore[type-arg]
    """How many come until the end."""
    num = 0
    while (answer := await call.read()) is not grpc.aio.EOF:
        num += len(answer.delta.token_ids)
        last = answer
    assert last.HasField("summary")
    return num


def num_live(status: mesh_pb2.GetStatusResponse) -> int:
    return status.queue.num_running + status.queue.num_waiting


def hold_steps(mesh: PretendMesh, held: bool) -> None:
    for worker in mesh.workers.values():
        worker.gate.clear() if held else worker.gate.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_gateway_that_dies_or_stands_still(tmp_path: Path, number: signal.Signals) -> None:
    async with pretend_mesh(2) as mesh:
        other = await mesh.gateway()
        async with (
            gateway_process(mesh.address, tmp_path) as (process, address),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = pb_grpc.TextGenerationStub(channel)
            calls = [stub.Generate(long_request()) for _ in range(NUM_STREAMS)]
            firsts = await asyncio.gather(*(call.read() for call in calls))
            num_left = [LENGTH - len(first.delta.token_ids) for first in firsts]
            hold_steps(mesh, True)
            await other.submit(1, (7, 8, 9), 100)
            await mesh.wait_status(lambda s: num_live(s) == NUM_STREAMS + 1, "all to be there")
            process.send_signal(number)
            await mesh.wait_status(
                lambda s: num_live(s) == 1 and s.num_gateways == 1, "the gateway to be lost"
            )
            hold_steps(mesh, False)
            await other.wait_finished(1)
            other.check(1)
            await mesh.wait_idle()
            if number == signal.SIGSTOP:
                # It finds its way back, and its requests go on.
                process.send_signal(signal.SIGCONT)
                assert await asyncio.gather(*map(num_tokens_left, calls)) == num_left
                await mesh.wait_idle()


@pytest.mark.parametrize("kind", ["grpc", "http"])
async def test_a_killed_client(kind: str) -> None:
    scheduler = ScriptedScheduler(gate=1)
    async with scripted_gateway(DEMO_MODEL, scheduler) as gateway:
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, str(CLIENT), kind, getattr(gateway, kind), "8"),
            stdout=asyncio.subprocess.PIPE,
        )
        assert client.stdout is not None
        assert await client.stdout.readline() == b"sent\n"
        assert await client.stdout.readline() == b"answer\n"
        assert not scheduler.aborts
        client.kill()
        await client.wait()
        await until(lambda: scheduler.aborts == [scheduler.submits[0].request], "the abort")


# ---- hosts that vanish ----


@contextlib.contextmanager
def front_and_laptop(scratch: Path) -> Iterator[tuple[Host, Host, str]]:
    """A gateway on one host, for clients on another; and the address of its scheduler."""
    with hosts(2, scratch) as (front, laptop):
        address = f"{front.address}:50050"
        log = (scratch / "scheduler.log").open("wb")
        scheduler = subprocess.Popen(
            front.inside(sys.executable, str(SCHEDULER), address), stdout=log, stderr=log, cwd=REPO
        )
        try:
            wait_until(lambda: front.status(address) is not None, 30.0, "the scheduler")
            front.start(
                *("gateway", "gateway", "--scheduler", address, "--model", str(DEMO_MODEL)),
                *("--client-keepalive", "1s", "--slow-client-timeout", "2s"),
            )
            wait_until(lambda: queue_of(front, address)[2] == 1, 30.0, "the gateway")
            yield front, laptop, address
        finally:
            print(front.logs())
            scheduler.kill()
            scheduler.wait()
            log.close()


def queue_of(front: Host, scheduler: str) -> tuple[int, int, int]:
    """(requests accepted, requests aborted, gateways)"""
    status = front.status(scheduler) or mesh_pb2.GetStatusResponse()
    return status.queue.num_accepted, status.queue.num_aborted, status.num_gateways


@pytest.mark.timeout(120)
def test_clients_that_vanish_without_a_word(tmp_path: Path) -> None:
    """Two that wait in silence, and two in the middle of a stream, over gRPC and HTTP."""
    with front_and_laptop(tmp_path) as (front, laptop, scheduler):
        clients = []
        for kind, port in (("grpc", 50051), ("http", 8000)):
            for length in (499, 500):
                client = subprocess.Popen(
                    laptop.inside(
                        *(sys.executable, str(CLIENT)),
                        *(kind, f"{front.address}:{port}", str(length)),
                    ),
                    cwd=REPO,
                    stdout=subprocess.PIPE,
                )
                clients.append(client)
                assert client.stdout is not None
                assert client.stdout.readline() == b"sent\n"
                if length % 2 == 0:
                    assert client.stdout.readline() == b"answer\n"
        wait_until(lambda: queue_of(front, scheduler)[0] == 4, 30.0, "the requests")
        try:
            assert queue_of(front, scheduler)[1] == 0
            laptop.set_cable(plugged_in=False)
            # Probes after 1 s and TCP's own timeout of 2 s: found long before the streams end, in
            # 10 s at the pace of this scheduler.
            wait_until(lambda: queue_of(front, scheduler)[1] == 4, 60.0, "the aborts")
        finally:
            for client in clients:
                client.kill()
                client.wait()
                assert client.stdout is not None
                client.stdout.close()

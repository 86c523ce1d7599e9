"""A supervised process: what it reports, how it fails, and that it ends with its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from support.waiting import wait_until

from stagemesh.cli.child import Child
from stagemesh.errors import AddressInUse, PeerLost

TIMEOUT_S = 30.0

SERVICE = """
import asyncio, os, signal, subprocess, sys
from dataclasses import dataclass
from stagemesh.errors import AddressInUse
from stagemesh.options import option
from stagemesh.process import run_service

@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    how: str = option("serve", help="what it does")

async def serve(options, on_ready):
    if options.how == "fail":
        raise AddressInUse("127.0.0.1:1 is in use by another process")
    if options.how == "die":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if options.how == "stubborn":
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.how == "patient":
        on_ready({"address": "127.0.0.1:1", "pid": os.getpid()})
        await asked.wait()
        print("asked to end", flush=True)
        await asyncio.Event().wait()
    if options.how == "parent":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    on_ready({"address": "127.0.0.1:1", "pid": os.getpid()})
    await asyncio.Event().wait()

asked = asyncio.Event()

def on_terminate():
    asked.set()
    return "patient" in sys.argv

sys.exit(run_service("worker", Options, serve, on_terminate=on_terminate))
"""


class Lines(list[str]):
    def __call__(self, name: str, line: str) -> None:
        self.append(line)


@contextlib.asynccontextmanager
async def started(
    how: str, lines: Lines | None = None, log: Path | None = None
) -> AsyncIterator[Child]:
    command = [sys.executable, "-c", SERVICE, "--how", how]
    child = await Child.start("worker", "worker-0", command, os.environ)
    pump = asyncio.create_task(child.pump(Lines() if lines is None else lines, log))
    try:
        yield child
    finally:
        child.kill_group()
        await asyncio.wait_for(pump, TIMEOUT_S)


async def test_a_child_reports_where_it_is() -> None:
    async with started("serve") as child:
        facts = await asyncio.wait_for(child.wait_ready(), TIMEOUT_S)
        assert facts == {"address": "127.0.0.1:1", "pid": child.pid}
        child.signal(signal.SIGTERM)
        await asyncio.wait_for(child.wait_ended(), TIMEOUT_S)
        assert not child.alive


async def test_a_childs_own_error_arrives() -> None:
    async with started("fail") as child:
        with pytest.raises(AddressInUse, match="in use by another process"):
            await asyncio.wait_for(child.wait_ready(), TIMEOUT_S)


async def test_a_child_that_was_killed_is_told_with_its_last_words() -> None:
    async with started("die") as child:
        with pytest.raises(PeerLost, match="SIGKILL") as caught:
            await asyncio.wait_for(child.wait_ready(), TIMEOUT_S)
        assert "last words" in str(caught.value)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_patient_child_is_asked_first_and_then_ended(second: signal.Signals) -> None:
    lines = Lines()
    async with started("patient", lines) as child:
        await asyncio.wait_for(child.wait_ready(), TIMEOUT_S)
        child.signal(signal.SIGTERM)
        await asyncio.to_thread(wait_until, lambda: "asked to end" in lines, TIMEOUT_S, "a word")
        assert child.alive
        child.signal(second)
        await asyncio.wait_for(child.wait_ended(), TIMEOUT_S)
        assert child.ended_well


async def test_what_a_child_left_behind_ends_with_it() -> None:
    lines = Lines()
    async with started("parent", lines) as child:
        await asyncio.wait_for(child.wait_ready(), TIMEOUT_S)
        (grandchild,) = psutil.Process(child.pid).children()
        child.signal(signal.SIGTERM)
    await asyncio.to_thread(wait_until, lambda: not _lives(grandchild), TIMEOUT_S, "its end")


async def test_a_full_disk_costs_the_log_and_nothing_else() -> None:
    lines = Lines()
    async with started("die", lines, Path("/dev/full")) as child:
        await asyncio.wait_for(child.wait_ended(), TIMEOUT_S)
    assert "last words" in lines


SUPERVISOR = """
import asyncio, os, sys
from stagemesh.cli.child import Child

async def main():
    command = [sys.executable, "-c", *sys.argv[1:]]
    child = await Child.start("worker", "worker-0", command, os.environ)
    pump = asyncio.create_task(child.pump(lambda name, line: None, None))
    await child.wait_ready()
    print(child.pid, flush=True)
    await pump

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_child_that_ignores_everything_ends_with_its_supervisor(stopped: bool) -> None:
    command = [sys.executable, "-c", SUPERVISOR, SERVICE, "--how", "stubborn"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        child = psutil.Process(int(supervisor.stdout.readline()))
        if stopped:
            child.suspend()
        supervisor.kill()
    wait_until(lambda: not _lives(child), TIMEOUT_S, "the orphan's end")


def test_an_early_orphan_ends_as_well(tmp_path: Path) -> None:
    """The supervisor is gone before the child has asked the kernel for anything."""
    pid_file = tmp_path / "pid"
    early = f"""
import os, time, pathlib
pathlib.Path({str(tmp_path / "draft")!r}).write_text(str(os.getpid()))
os.rename({str(tmp_path / "draft")!r}, {str(pid_file)!r})
while os.getppid() == int(os.environ["SUPERVISOR_PID"]):
    time.sleep(0.01)
{SERVICE}"""
    launcher = SUPERVISOR.replace(
        "os.environ)", "{**os.environ, 'SUPERVISOR_PID': str(os.getpid())})"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", launcher, early])
    wait_until(pid_file.exists, TIMEOUT_S, "the child")
    child = psutil.Process(int(pid_file.read_text()))
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not _lives(child), TIMEOUT_S, "the orphan's end")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""A host that runs out: of memory, and of disk under the logs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chaos import DEMO_MODEL, MANY, NUM_LASTING, loaded
from support.chaos_memory import memory_cage
from support.mesh import greedy_request, running_mesh
from support.waiting import wait_until

from benchmarks.recovery.load import Truth
from benchmarks.recovery.part import until
from benchmarks.recovery.parts_mesh import PartsMesh

pytestmark = pytest.mark.timeout(180)


async def test_the_kernel_kills_a_worker_for_want_of_memory(mesh: PartsMesh, truth: Truth) -> None:
    with memory_cage(16 * 2**20) as cage:
        async with loaded(mesh, truth, MANY[:16]) as load:
            victim = mesh.at(await mesh.status(), 1)
            cage.put_in(victim.pid)
            with cage.eater():
                await until(lambda: not victim.alive, "the kernel to kill the worker")
            assert await victim.wait_ended() == -9
            assert cage.num_killed() >= 1  # then maybe the eater
            await load.until_more_tokens(NUM_LASTING)


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A file system of a few pages; skips where none can be mounted."""
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "stagemesh-test", str(at)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root and tmpfs, for a disk that is full")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(disk: Path) -> None:
    """To the last byte."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def test_the_disk_under_the_logs_is_full(tmp_path: Path) -> None:
    """Everything goes on without them, even what has a lot to say: a worker dies and comes back."""
    with small_disk(tmp_path / "logs") as disk:
        options = ("--log-dir", str(disk), "--spares", "1", "--restart")
        with running_mesh(DEMO_MODEL, *options, stages=2) as mesh:
            request = greedy_request("Once upon a time", 100, ignore_eos=True)
            right = mesh.generate(request).token_ids
            fill(disk)
            with pytest.raises(OSError, match="No space left"):
                (disk / "more").write_bytes(b"x" * 4096)
            victim = mesh.status().pipelines[0].worker_ids[1]
            (pid,) = (w.pid for w in mesh.status().workers if w.worker_id == victim)
            call = mesh.start(request)
            os.kill(pid, 9)
            tokens = [token for response in call for token in response.delta.token_ids]
            assert tokens == right
            wait_until(
                lambda: any(w.worker_id == victim and w.pid != pid for w in mesh.status().workers),
                30.0,
                "the worker to be started again",
            )
            assert mesh.generate(request).token_ids == right

"""Memory that runs out: a cgroup with a limit, and something in it that eats memory.

The kernel then kills the process under test, which stands first in its list of what to kill.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")
_EAT = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("0")
eaten = []
while True:
    eaten.append(b"x" * 2**20)
    time.sleep(0.002)
"""


@dataclass
class MemoryCage:
    """A cgroup. What is put in keeps the memory it has; what it takes from now on counts."""

    path: Path

    def put_in(self, pid: int) -> None:
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
        (self.path / "cgroup.procs").write_text(str(pid))

    def num_killed(self) -> int:
        """Processes that the kernel killed here for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            if (self.path / name).exists():
                lines = (self.path / name).read_text().splitlines()
                return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        raise AssertionError("the kernel does not count")

    @contextlib.contextmanager
    def eater(self) -> Iterator[None]:
        """Takes a megabyte every few milliseconds, for the time of the block."""
        joins = str(self.path / "cgroup.procs")
        process = subprocess.Popen([sys.executable, "-c", _EAT, joins])
        try:
            yield
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def memory_cage(limit_bytes: int) -> Iterator[MemoryCage]:
    """Skips where no cgroup can be made."""
    is_v2 = (_ROOT / "cgroup.controllers").exists()
    path = _ROOT / ("" if is_v2 else "memory") / f"stagemesh-{secrets.token_hex(4)}"
    try:
        path.mkdir()
        limit = "memory.max" if is_v2 else "memory.limit_in_bytes"
        (path / limit).write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.rmdir()
        pytest.skip(f"needs a cgroup with a memory limit: {error}")
    try:
        yield MemoryCage(path)
    finally:
        path.rmdir()
